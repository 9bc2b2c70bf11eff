"""CISPO: clipped importance sampling policy optimization (MiniMax 2025, MiniMax-M1, arXiv:2506.13585, section 3.1).

    L = - mean_t sg( min(rho_t, 1 + e_high) ) A_i log pi(y_it | x, y_i<t)                            equations 4 and 5

sg is a stopped gradient: the ratio weighs a token's REINFORCE gradient and is bounded, where PPO's clip takes the
gradient of the tokens that moved most away altogether. The advantages are GRPO's; there is no lower bound, as in the
paper's experiments.

Departure: the paper leaves the KL out; kl_coef keeps this project's meaning, and GRPO's KL term is in the loss.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

from annotated_types import Ge
from torch import Tensor

from textrl_gym import functional
from textrl_gym.agents.grpo import GRPO, GroupConfig, action_advantages, kl_penalty
from textrl_gym.training.minibatch import Minibatch


@dataclasses.dataclass(frozen=True)
class CISPOConfig(GroupConfig):
    """Settings of CISPO."""

    minibatches: int = 2
    """Optimizer steps in each pass."""
    clip_high: Annotated[float, Ge(0)] = 0.2
    """The weight of a token is at most 1 + clip_high."""


def cispo_loss(
    logp_BT: Tensor, part: Minibatch, config: CISPOConfig, kl_coef: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Equation 4, with action_advantages, and GRPO's KL term."""
    assert logp_BT.shape == part.mask_BT.shape, (logp_BT.shape, part.mask_BT.shape)
    ratio_BT = (logp_BT - part.logp_BT).detach().exp()
    weight_BT = ratio_BT.clamp(max=1 + config.clip_high)
    loss_BT = -weight_BT * action_advantages(part, logp_BT) * logp_BT
    penalty, kl_metrics = kl_penalty(logp_BT, part, config, kl_coef)
    loss = part.mean(part.weighted(loss_BT), config.aggregation) + penalty
    metrics = {
        "loss": loss.detach(),
        "clip_fraction": part.mean(ratio_BT > weight_BT),
        "ratio": part.mean(ratio_BT),
        "approx_kl_token": part.mean(functional.approx_kl(logp_BT, part.logp_BT)),
    }
    return loss, metrics | kl_metrics


class CISPO(GRPO):
    """GRPO with a clipped weight instead of a clipped gradient; see the head of this file."""

    Config = CISPOConfig
    config: CISPOConfig

    def loss(self, logp_BT: Tensor, part: Minibatch) -> tuple[Tensor, dict[str, Tensor]]:
        return cispo_loss(logp_BT, part, self.config, self.kl.coef_in_loss)
