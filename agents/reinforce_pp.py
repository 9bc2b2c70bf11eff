"""REINFORCE++: no critic and no groups, but PPO's clip and one scale for the batch (Hu et al. 2025, arXiv:2501.03262).

    A_t = score - beta sum_{k >= t} KL_k                                          equation 2: token-level KL, gamma = 1
    A_t <- (A_t - mean(A)) / std(A)                                      over all tokens of the whole rollout
    L   = mean_t max(-A_t ratio_t, -A_t clip(ratio_t, 1 - e, 1 + e))

A_t is the return-to-go of the environment's token rewards.

Departures: the paper's REINFORCE++-baseline (group mean first) is left to GRPO. The variance is the biased one.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

from annotated_types import Gt
from torch import Tensor

from textrl_gym import functional
from textrl_gym.core import Rollout
from textrl_gym.training.agent import Agent
from textrl_gym.training.config import AgentConfig
from textrl_gym.training.minibatch import Minibatch, sum_of


@dataclasses.dataclass(frozen=True)
class ReinforcePPConfig(AgentConfig):
    """Settings of REINFORCE++."""

    group_size: int = 8
    """Completions of each prompt. REINFORCE++ needs no groups; they share the cost of their prompt."""
    minibatches: int = 2
    """Optimizer steps in each pass."""
    clip_range: Annotated[float, Gt(0)] = 0.2
    """The ratio is clipped to 1 +- this."""


def reinforce_pp_loss(logp_BT: Tensor, part: Minibatch, clip_range: float) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped surrogate of part.advantage_BT."""
    assert logp_BT.shape == part.mask_BT.shape, (logp_BT.shape, part.mask_BT.shape)
    loss_BT, ratio_BT, clipped_BT = functional.clipped_surrogate(
        logp_BT, part.logp_BT, part.advantage_BT, clip_range, clip_range
    )
    loss = part.mean(part.weighted(loss_BT))
    metrics = {
        "loss": loss.detach(),
        "clip_fraction": part.mean(clipped_BT),
        "ratio": part.mean(ratio_BT.detach()),
        "approx_kl_token": part.mean(functional.approx_kl(logp_BT, part.logp_BT)),
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
        # Whitened over the rollout and not in each minibatch, where a small one's mean would be noise.
        batch = rollout.with_(advantage_BT=self.advantages(rollout))

        # 2. Clipped steps on minibatches.
        steps = []
        for minibatch in self.minibatches(batch):
            parts = []
            for part in minibatch.micro_batches():
                loss, metrics = reinforce_pp_loss(self.policy.logprobs(part), part, self.config.clip_range)
                loss.backward()
                parts.append(metrics)
            steps.append(sum_of(parts) | {"grad_norm": self.step()})
        return functional.mean_of(steps)
