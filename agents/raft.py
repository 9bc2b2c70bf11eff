"""RAFT: reward-ranked fine-tuning, or best-of-n distillation (Dong et al. 2023, arXiv:2304.06767).

For each prompt G completions are sampled from the policy as it is now, and the best by its return R is learnt as a
supervised example:

    y* = argmax_i R_i,   R_i = score_i - beta sum_t KL_it,   L = - 1/tokens sum_t log pi(y*_t | x, y*_<t)

The mean is over all tokens of the batch's best completions. Nothing pushes the others down, and how good the best was
does not matter. beta = kl_coef holds the policy near the reference through the ranking only; but that is enough for the
KL-regularised optimum to be where it rests: there R is the same for all completions, and none is better than another.

Departures: the paper fine-tunes on the best of a large batch until converged; here a rollout gives `epochs` passes. It
sometimes ranks over the whole batch; here always within a prompt. Of equal best completions the first is taken.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from textrl_gym import functional
from textrl_gym.core import Rollout
from textrl_gym.training.agent import Agent
from textrl_gym.training.config import AgentConfig


@dataclasses.dataclass(frozen=True)
class RAFTConfig(AgentConfig):
    """Settings of RAFT."""

    group_size: int = 8
    """G, completions of each prompt, at least 2."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size < 2:
            raise ValueError(f"RAFT takes the best of a group: group_size must be at least 2, got {self.group_size}")


def best_of_groups(return_B: Tensor, group_B: Tensor) -> Tensor:
    """The row with the highest return of each group, the first of equals. int64 [groups]."""
    assert return_B.shape == group_B.shape and return_B.ndim == 1, (return_B.shape, group_B.shape)
    every = [(group_B == group).nonzero().squeeze(1) for group in group_B.unique()]
    return torch.stack([rows[return_B[rows].argmax()] for rows in every])


def raft_loss(logp_BT: Tensor, mask_BT: Tensor, tokens: int) -> tuple[Tensor, dict[str, Tensor]]:
    """- sum of log pi over a micro-batch's tokens, divided by the minibatch's `tokens`."""
    assert logp_BT.shape == mask_BT.shape, (logp_BT.shape, mask_BT.shape)
    loss = -(logp_BT * mask_BT).sum() / tokens
    return loss, {"loss": loss.detach()}


class RAFT(Agent):
    """Reward-ranked fine-tuning; see the head of this file."""

    Config = RAFTConfig
    config: RAFTConfig
    needs_groups = True

    def update(self, rollout: Rollout) -> dict[str, float]:
        # 1. The best completion of each prompt, KL included.
        return_B = rollout.reward_BT.sum(1)
        best = rollout.select(best_of_groups(return_B, rollout.group_B))

        # 2. Supervised steps on them.
        def loss(
            part: Rollout, pick: Callable[[Tensor], Tensor], rows: int, tokens: int
        ) -> tuple[Tensor, dict[str, Tensor]]:
            return raft_loss(self.policy.logprobs(part), part.mask_BT, tokens)

        steps = [self.minimise(best, rows, loss) for rows in self.shuffled(best)]
        return functional.mean_of(steps) | {"best_return": float(best.reward_BT.sum(1).mean())}
