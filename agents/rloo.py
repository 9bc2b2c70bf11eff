"""RLOO: REINFORCE with a leave-one-out baseline (Kool et al. 2019; Ahmadian et al. 2024, arXiv:2402.14740, 3.2).

For G completions y_i of a prompt, each one action with the return R_i = score_i - beta sum_t KL_it:

    A_i = R_i - 1/(G - 1) sum_{j != i} R_j
    L   = - mean_i A_i log pi(y_i | x),     log pi(y | x) = sum_t log pi(y_t | x, y_<t)

The baseline does not depend on y_i, so the gradient is unbiased; with two samples it is half the difference of the
returns times the difference of the scores' gradients. In conversations credit="turn" takes R_i from each turn on, and
baselines at the same turn.

Departures: none in the loss. TRL's RLOO clips a ratio over several epochs; here, as in the paper, a rollout gives one
step, at which the ratio is 1.
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
class RLOOConfig(AgentConfig):
    """Settings of RLOO."""

    group_size: Annotated[int, Ge(2)] = 8
    """G, completions of each prompt, at least 2."""
    credit: functional.Credit = "trajectory"
    """In conversations, what a turn's actions are weighed by: the return of the whole conversation, or the return from
    that turn on, compared with the group's others at the same turn."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs * self.minibatches != 1:
            raise ValueError(f"RLOO takes one step a rollout, got {self.epochs} epochs x {self.minibatches}")


def leave_one_out(return_B: Tensor, group_B: Tensor) -> Tensor:
    """A_i = R_i less the mean of the group's others. [B]; a group of one gets 0."""
    assert return_B.shape == group_B.shape and return_B.ndim == 1, (return_B.shape, group_B.shape)
    row_GN, mask_GN = functional.rows_of_groups(group_B)
    return_GN, others_G1 = return_B[row_GN] * mask_GN, mask_GN.sum(1, keepdim=True) - 1
    advantage_GN = return_GN - (return_GN.sum(1, keepdim=True) - return_GN) / others_G1.clamp(min=1)
    advantage_B = torch.zeros_like(return_B)
    advantage_B[row_GN[mask_GN]] = torch.where(others_G1 > 0, advantage_GN, 0.0)[mask_GN]
    return advantage_B


def rloo_loss(logp_BT: Tensor, part: Minibatch) -> tuple[Tensor, dict[str, Tensor]]:
    """- mean over completions of A_i log pi(y_i | x), A being part.advantage_B; of turns part.advantage_BT."""
    assert logp_BT.shape == part.mask_BT.shape, (logp_BT.shape, part.mask_BT.shape)
    weighted_BT = part.weighted(logp_BT)
    if "advantage_BT" in part.extra:
        loss = -part.mean((part.advantage_BT * weighted_BT * part.mask_BT).sum(1))
    else:
        loss = -part.mean(part.advantage_B * (weighted_BT * part.mask_BT).sum(1))
    return loss, {"loss": loss.detach()}


class RLOO(Agent):
    """REINFORCE leave-one-out; see the head of this file."""

    Config = RLOOConfig
    config: RLOOConfig
    needs_groups = True

    def advantages(self, rollout: Rollout) -> Tensor:
        if self.config.credit == "turn" and rollout.turn_BT is not None:
            rewards = (rollout.reward_BT, rollout.mask_BT, rollout.turn_BT)
            return functional.turn_advantages(*rewards, rollout.group_B, leave_one_out)
        return leave_one_out(rollout.reward_BT.sum(1), rollout.group_B)[:, None] * rollout.mask_BT

    def update(self, rollout: Rollout) -> dict[str, float]:
        # 1. Each completion's return, KL included, against its group's others.
        advantage_B = leave_one_out(rollout.reward_BT.sum(1), rollout.group_B)
        batch = rollout.with_(advantage_B=advantage_B)
        if self.config.credit == "turn" and rollout.turn_BT is not None:
            batch = rollout.with_(advantage_BT=self.advantages(rollout))

        # 2. One step.
        steps = []
        for minibatch in self.minibatches(batch):
            parts = []
            for part in minibatch.micro_batches():
                loss, metrics = rloo_loss(self.policy.logprobs(part), part)
                loss.backward()
                parts.append(metrics)
            steps.append(sum_of(parts) | {"grad_norm": self.step()})
        return functional.mean_of(steps) | {"advantage_std": float(advantage_B.std())}
