"""RLOO: REINFORCE with a leave-one-out baseline (Kool et al. 2019; Ahmadian et al. 2024, arXiv:2402.14740, 3.2).

For G completions y_i of a prompt, each one action with the return R_i = score_i - beta sum_t KL_it:

    A_i = R_i - 1/(G - 1) sum_{j != i} R_j
    L   = - mean_i A_i log pi(y_i | x),     log pi(y | x) = sum_t log pi(y_t | x, y_<t)

The baseline does not depend on y_i, so the gradient is unbiased; with two samples it is half the difference of the
returns times the difference of the scores' gradients.

Departures: none in the loss. TRL's RLOO clips a ratio over several epochs; here, as in the paper, a rollout gives one
step, at which the ratio is 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from textrl_gym.core import Rollout
from textrl_gym.training.agent import Agent
from textrl_gym.training.config import AgentConfig


@dataclasses.dataclass(frozen=True)
class RLOOConfig(AgentConfig):
    """Settings of RLOO."""

    group_size: int = 8
    """G, completions of each prompt, at least 2."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size < 2:
            raise ValueError(
                f"RLOO compares completions of a prompt: group_size must be at least 2, got {self.group_size}"
            )
        if self.epochs * self.minibatches != 1:
            raise ValueError(f"RLOO takes one step a rollout, got {self.epochs} epochs x {self.minibatches}")


def leave_one_out(return_B: Tensor, group_B: Tensor) -> Tensor:
    """A_i = R_i less the mean of the group's others. [B]; a group of one gets 0."""
    assert return_B.shape == group_B.shape and return_B.ndim == 1, (return_B.shape, group_B.shape)
    _, number_B = group_B.unique(return_inverse=True)
    sum_G = torch.zeros(int(number_B.max()) + 1, dtype=return_B.dtype, device=return_B.device)
    sum_B = sum_G.index_add(0, number_B, return_B)[number_B]
    others_B = torch.bincount(number_B)[number_B] - 1
    return torch.where(others_B > 0, return_B - (sum_B - return_B) / others_B.clamp(min=1), 0.0)


def rloo_loss(logp_BT: Tensor, advantage_B: Tensor, mask_BT: Tensor, rows: int) -> tuple[Tensor, dict[str, Tensor]]:
    """- sum of A_i log pi(y_i | x) over a micro-batch, divided by the batch's `rows`."""
    assert logp_BT.shape == mask_BT.shape and advantage_B.shape == logp_BT.shape[:1]
    loss = -(advantage_B * (logp_BT * mask_BT).sum(1)).sum() / rows
    return loss, {"loss": loss.detach()}


class RLOO(Agent):
    """REINFORCE leave-one-out; see the head of this file."""

    Config = RLOOConfig
    config: RLOOConfig
    needs_groups = True

    def advantages(self, rollout: Rollout) -> Tensor:
        return leave_one_out(rollout.reward_BT.sum(1), rollout.group_B)[:, None] * rollout.mask_BT

    def update(self, rollout: Rollout) -> dict[str, float]:
        # 1. Each completion's return, KL included, against its group's others.
        advantage_BT = self.advantages(rollout)

        # 2. One step.
        def loss(
            part: Rollout, pick: Callable[[Tensor], Tensor], rows: int, tokens: int
        ) -> tuple[Tensor, dict[str, Tensor]]:
            return rloo_loss(self.policy.logprobs(part), pick(advantage_BT)[:, 0], part.mask_BT, rows)

        rows = torch.arange(len(rollout), device=self.device)
        return self.minimise(rollout, rows, loss) | {"advantage_std": float(advantage_BT[:, 0].std())}
