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
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from textrl_gym import functional
from textrl_gym.core import Rollout
from textrl_gym.training.agent import Agent
from textrl_gym.training.config import AgentConfig
from textrl_gym.training.minibatch import Minibatch, sum_of


@dataclasses.dataclass(frozen=True)
class RAFTConfig(AgentConfig):
    """Settings of RAFT."""

    group_size: Annotated[int, Ge(2)] = 8
    """G, completions of each prompt, at least 2."""


def best_of_groups(return_B: Tensor, group_B: Tensor) -> Tensor:
    """The row with the highest return of each group, the first of equals. int64 [groups]."""
    assert return_B.shape == group_B.shape and return_B.ndim == 1, (return_B.shape, group_B.shape)
    row_GN, mask_GN = functional.rows_of_groups(group_B)
    best_G1 = return_B[row_GN].masked_fill(~mask_GN, -torch.inf).argmax(1, keepdim=True)
    return row_GN.gather(1, best_G1).squeeze(1)


def raft_loss(logp_BT: Tensor, part: Minibatch) -> tuple[Tensor, dict[str, Tensor]]:
    """- mean over tokens of log pi."""
    assert logp_BT.shape == part.mask_BT.shape, (logp_BT.shape, part.mask_BT.shape)
    loss = -part.mean(logp_BT)
    return loss, {"loss": loss.detach()}


class RAFT(Agent):
    """Reward-ranked fine-tuning; see the head of this file."""

    Config = RAFTConfig
    config: RAFTConfig
    needs_groups = True

    def update(self, rollout: Rollout) -> dict[str, float]:
        # 1. The best completion of each prompt, KL included.
        return_B = functional.without_noise(rollout.reward_BT.sum(1))
        best = rollout.select(best_of_groups(return_B, rollout.group_B))

        # 2. Supervised steps on them.
        steps = []
        for minibatch in self.minibatches(best):
            parts = []
            for part in minibatch.micro_batches():
                loss, metrics = raft_loss(self.policy.logprobs(part), part)
                loss.backward()
                parts.append(metrics)
            steps.append(sum_of(parts) | {"grad_norm": self.step()})
        return functional.mean_of(steps) | {"best_return": float(best.reward_BT.sum(1).mean())}
