"""REINFORCE++: no critic and no groups, but PPO's clip and one scale for the batch (Hu et al. 2025, arXiv:2501.03262).

    A_t = score - beta sum_{k >= t} KL_k                                          equation 2: token-level KL, gamma = 1
    A_t <- (A_t - mean(A)) / std(A)                                      over all tokens of the whole rollout
    L   = mean_t max(-A_t ratio_t, -A_t clip(ratio_t, 1 - e, 1 + e))

A_t is the return-to-go of the environment's token rewards.

Departures: the paper's REINFORCE++-baseline (group mean first) is left to GRPO. The variance is the biased one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import Tensor

from textrl_gym import functional
from textrl_gym.core import Rollout
from textrl_gym.training.agent import Agent
from textrl_gym.training.config import AgentConfig


@dataclasses.dataclass(frozen=True)
class ReinforcePPConfig(AgentConfig):
    """Settings of REINFORCE++."""

    group_size: int = 8
    """Completions of each prompt. REINFORCE++ needs no groups; they share the cost of their prompt."""
    minibatches: int = 2
    """Optimizer steps in each pass."""
    clip_range: float = 0.2
    """The ratio is clipped to 1 +- this."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clip_range <= 0:
            raise ValueError(f"clip_range must be > 0, got {self.clip_range}")


def reinforce_pp_loss(
    logp_BT: Tensor, old_logp_BT: Tensor, advantage_BT: Tensor, mask_BT: Tensor, clip_range: float, tokens: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped surrogate over a micro-batch, divided by the minibatch's `tokens`."""
    assert logp_BT.shape == old_logp_BT.shape == advantage_BT.shape == mask_BT.shape
    loss_BT, ratio_BT, clipped_BT = functional.clipped_surrogate(
        logp_BT, old_logp_BT, advantage_BT, clip_range, clip_range
    )
    loss = functional.aggregate(loss_BT, mask_BT, "token", 0, tokens)
    metrics = {
        "loss": loss.detach(),
        "clip_fraction": (clipped_BT * mask_BT).sum() / tokens,
        "ratio": (ratio_BT.detach() * mask_BT).sum() / tokens,
    }
    return loss, metrics


class ReinforcePP(Agent):
    """REINFORCE++; see the head of this file."""

    Config = ReinforcePPConfig
    config: ReinforcePPConfig

    def advantages(self, rollout: Rollout) -> Tensor:
        return functional.whiten(functional.returns_to_go(rollout.reward_BT, rollout.mask_BT), rollout.mask_BT)

    def update(self, rollout: Rollout) -> dict[str, float]:
        # 1. Returns-to-go with the KL in them, on one scale for the batch.
        advantage_BT = self.advantages(rollout)

        # 2. Clipped steps on minibatches.
        def loss(
            part: Rollout, pick: Callable[[Tensor], Tensor], rows: int, tokens: int
        ) -> tuple[Tensor, dict[str, Tensor]]:
            return reinforce_pp_loss(
                self.policy.logprobs(part),
                part.logp_BT,
                pick(advantage_BT),
                part.mask_BT,
                self.config.clip_range,
                tokens,
            )

        return functional.mean_of([self.minimise(rollout, rows, loss) for rows in self.shuffled(rollout)])
