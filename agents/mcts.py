"""PPO-MCTS: tree search over tokens with PPO's policy and critic (Liu et al. 2023, arXiv:2309.15028).

For each token of the text a tree is grown from the text so far, a node in each of `simulations` rounds:

    select    from the root, argmax_a Q(s, a) + c_puct pi(a | s) sqrt(N(s)) / (1 + N(s, a)), to a node not yet there
    expand    its candidates are the top_k of pi(. | s), with Q(s, a) = V(s) until they are visited
    evaluate  V(s) by the critic, pi(. | s) by the policy, in one pass for all rows
    backup    along the path: Q(s, a) = mean over the visits of r(s, a) + r(s', a') + ... + V(leaf)
              with r(s, a) = -kl_coef (log pi(a | s) - log pi_ref(a | s))

    q(a | root) is proportional to N(root, a)^(1 / visit_temperature)

N(s) is 1 + sum_a N(s, a). The mean of the returns is the paper's Q = r + V-bar of the child, V-bar being the mean over
the child's own evaluation and its edges by visits. With one simulation q is the policy's most likely token.

Departures from the authors' code (liujch1998/ppo-mcts; the paper's own text could not be read here):

- r has the log-ratio, which PPO's penalty has; the code has the difference of the probabilities.
- A finished text is worth the critic's value before its last token, or with end_value="score" its score; in theirs
  the critic's value after it, or its score. Here V after the end is 0 and no state that the critic has learnt.
- A node that is over has no children.
- No temperature of the prior, no top-p, no annealing of visit_temperature; the discount is 1.

A tree holds no chance, so q is the distribution of each token given the text so far: logp_BT is log q, and the mean of
sum(logp - ref_logp) the KL of this agent. Paths are computed anew below the root's cache: they are a few tokens long.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from textrl_gym.core import StopReason
from textrl_gym.training.guided_decoding import CriticAgent, CriticConfig, Endings, Opinion, States


@dataclasses.dataclass(frozen=True)
class MCTSConfig(CriticConfig):
    """Settings of tree search."""

    simulations: Annotated[int, Ge(1)] = 20
    """Nodes grown, one at a time, for each token of the text."""
    c_puct: Annotated[float, Ge(0)] = 8.0
    """Weight of the policy against the critic in the search, in units of the score; 8 is the authors'. With a poor
    critic a small one does harm: see docs/decoding.md."""
    visit_temperature: Annotated[float, Gt(0)] = 1.0
    """Divides the log of the visit counts that the token is sampled by; greedy decoding takes the most visited."""


@dataclasses.dataclass(frozen=True)
class Leaves:
    """A new node of each row."""

    token_BK: Tensor
    """Candidates, the most likely first."""
    prior_BK: Tensor
    """pi of them."""
    reward_BK: Tensor
    """Of taking them: the KL penalty."""
    value_B: Tensor
    over_B: Tensor
    """bool: the text is finished here, and nothing follows."""


Grow = Callable[[Tensor, Tensor, Tensor, Tensor], Leaves]
"""f(path_BD, length_B, before_B, fresh_B): the nodes after the first length_B tokens of each path, before_B being the
value of the node above. Rows where fresh_B is False have been there: whatever is given for them is not read."""


class Tree:
    """M nodes of each row in arrays; node 0 is the root, and node i was grown in simulation i."""

    def __init__(self, root: Leaves, nodes: int) -> None:
        rows, candidates = root.token_BK.shape
        zeros_BMK = root.prior_BK.new_zeros(rows, nodes, candidates)
        self.row_B = torch.arange(rows, device=zeros_BMK.device)
        # -1: nothing has grown there yet. Arrays and not node objects, so that all rows take each step together.
        self.token_BMK, self.child_BMK = zeros_BMK.long(), zeros_BMK.long() - 1
        self.prior_BMK, self.reward_BMK, self.total_BMK = zeros_BMK, zeros_BMK.clone(), zeros_BMK.clone()
        self.visits_BMK, self.value_BM = zeros_BMK.clone(), zeros_BMK[..., 0].clone()
        self.over_BM = torch.zeros_like(self.value_BM, dtype=torch.bool)
        self.parent_BM, self.slot_BM = self.over_BM.long(), self.over_BM.long()
        self.put(0, root)

    def put(self, node: int, leaves: Leaves) -> None:
        """Fill node i of every row."""
        self.token_BMK[:, node], self.prior_BMK[:, node] = leaves.token_BK, leaves.prior_BK
        self.reward_BMK[:, node] = leaves.reward_BK
        self.value_BM[:, node], self.over_BM[:, node] = leaves.value_B, leaves.over_B

    def best_slots(self, node_B: Tensor, c_puct: float) -> Tensor:
        """The candidate that PUCT selects in a node of each row."""
        at = self.row_B, node_B
        return puct(self.prior_BMK[at], self.visits_BMK[at], self.total_BMK[at], self.value_BM[at], c_puct).argmax(1)

    def select(self, c_puct: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """path_BD, length_B; the last node before the end of the path, its slot, and the node there (-1: none yet)."""
        node_B, path = torch.zeros_like(self.row_B), []
        slot_B, next_B, length_B = (torch.zeros_like(node_B) for _ in range(3))
        moving_B = torch.ones_like(node_B, dtype=torch.bool)
        while moving_B.any():
            node_B = torch.where(moving_B & (length_B > 0), next_B, node_B)
            slot_B = torch.where(moving_B, self.best_slots(node_B, c_puct), slot_B)
            path.append(self.token_BMK[self.row_B, node_B, slot_B] * moving_B)
            length_B = length_B + moving_B
            next_B = self.child_BMK[self.row_B, node_B, slot_B]
            # Rows that have arrived wait for the deepest one; their part of the path is 0 and not read.
            moving_B = moving_B & (next_B >= 0) & ~self.over_BM[self.row_B, next_B.clamp(min=0)]
        return torch.stack(path, 1), length_B, node_B, slot_B, next_B

    def back_up(self, leaf_B: Tensor) -> None:
        """One more visit of every edge above the leaves, with the return from there on."""
        return_B = self.value_BM[self.row_B, leaf_B]
        while (leaf_B > 0).any():
            below_B = leaf_B > 0
            at = self.row_B, self.parent_BM[self.row_B, leaf_B], self.slot_BM[self.row_B, leaf_B]
            return_B = return_B + self.reward_BMK[at] * below_B
            self.visits_BMK[at] += below_B
            self.total_BMK[at] += return_B * below_B
            leaf_B = torch.where(below_B, at[1], 0)


def puct(prior_BK: Tensor, visits_BK: Tensor, total_BK: Tensor, value_B: Tensor, c_puct: float) -> Tensor:
    """Q + c_puct prior sqrt(N) / (1 + visits), with Q = total / visits, or V where there are no visits. [B, K]"""
    assert prior_BK.shape == visits_BK.shape == total_BK.shape and value_B.shape == prior_BK.shape[:1]
    # An edge without visits is worth what its node is, so that the prior alone says which is tried first.
    mean_BK = torch.where(visits_BK > 0, total_BK / visits_BK.clamp(min=1), value_B[:, None])
    return mean_BK + c_puct * prior_BK * (1 + visits_BK.sum(1, keepdim=True)).sqrt() / (1 + visits_BK)


def search(root: Leaves, grow: Grow, simulations: int, c_puct: float) -> Tree:
    """The tree after so many simulations, all rows side by side."""
    tree = Tree(root, simulations + 1)
    for node in range(1, simulations + 1):
        # 1. Select.
        path_BD, length_B, above_B, slot_B, there_B = tree.select(c_puct)
        # 2. Expand and evaluate.
        fresh_B = there_B < 0
        if fresh_B.any():
            tree.put(node, grow(path_BD, length_B, tree.value_BM[tree.row_B, above_B], fresh_B))
            at = tree.row_B[fresh_B], above_B[fresh_B], slot_B[fresh_B]
            tree.child_BMK[at] = node
            tree.parent_BM[at[0], node], tree.slot_BM[at[0], node] = at[1:]
        # 3. Backup.
        tree.back_up(torch.where(fresh_B, node, there_B))
    return tree


class MCTS(CriticAgent):
    """PPO-MCTS; see the head of this file."""

    Config = MCTSConfig
    config: MCTSConfig

    @property
    def asks_reference(self) -> bool:  # type: ignore[override]
        return self.kl.coef > 0

    def next_token(
        self, states: States, endings: Endings, row_b: list[int], texts: list[list[int]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        calls_b = torch.zeros_like(states.now.value_B)

        def grow(path_bD: Tensor, length_b: Tensor, before_b: Tensor, fresh_b: Tensor) -> Leaves:
            paths = zip(texts, path_bD.tolist(), length_b.tolist(), strict=True)
            longer = [ids + path[:length] for ids, path, length in paths]
            stops = endings.stops(longer)
            runs_b = torch.tensor(stops, device=self.device) == StopReason.RUNNING
            value_b = endings.values(row_b, longer, stops, before_b)
            # No pass where every new node is over or has been there: a model call costs more than all of the rest.
            opinion = states.look(path_bD, length_b) if (runs_b & fresh_b).any() else states.now
            calls_b.add_((runs_b & fresh_b) * states.models)
            return self._leaves(opinion, torch.where(runs_b, opinion.value_B, value_b), ~runs_b)

        root = self._leaves(states.now, states.now.value_B, torch.zeros_like(calls_b, dtype=torch.bool))
        tree = search(root, grow, self.config.simulations, self.config.c_puct)
        logp_bK = (tree.visits_BMK[:, 0].log() / self.config.visit_temperature).log_softmax(1)
        return tree.token_BMK[:, 0], logp_bK, calls_b

    def _leaves(self, opinion: Opinion, value_B: Tensor, over_B: Tensor) -> Leaves:
        token_BK = self.candidates(opinion.logp_BV)
        logp_BK = opinion.logp_BV.gather(1, token_BK)
        reward_BK = torch.zeros_like(logp_BK)
        if opinion.ref_logp_BV is not None:
            reward_BK = -self.kl.coef * (logp_BK - opinion.ref_logp_BV.gather(1, token_BK))
        return Leaves(token_BK, logp_BK.exp(), reward_BK, value_B, over_B)
