"""CISPO: clipped importance sampling policy optimization (MiniMax 2025, MiniMax-M1, arXiv:2506.13585, section 3.1).

    L = - mean_t sg( min(rho_t, 1 + e_high) ) A_i log pi(y_it | x, y_i<t)                            equations 4 and 5

sg is a stopped gradient: the ratio weighs a token's REINFORCE gradient and is bounded, where PPO's clip takes the
gradient of the tokens that moved most away altogether. The advantages are GRPO's; there is no lower bound, as in the
paper's experiments.

Departure: the paper leaves the KL out; kl_coef keeps this project's meaning, and GRPO's KL term is in the loss.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from textrl_gym import functional
from textrl_gym.agents.grpo import GRPO, GroupConfig, kl_penalty


@dataclasses.dataclass(frozen=True)
class CISPOConfig(GroupConfig):
    """Settings of CISPO."""

    minibatches: int = 2
    """Optimizer steps in each pass."""
    clip_high: float = 0.2
    """The weight of a token is at most 1 + clip_high."""


def cispo_loss(
    logp_BT: Tensor,
    old_logp_BT: Tensor,
    ref_logp_BT: Tensor,
    advantage_B: Tensor,
    mask_BT: Tensor,
    config: CISPOConfig,
    kl_coef: float,
    rows: int,
    tokens: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Equation 4 over a micro-batch, divided by the minibatch's counts."""
    assert logp_BT.shape == old_logp_BT.shape == ref_logp_BT.shape == mask_BT.shape
    assert advantage_B.shape == logp_BT.shape[:1]
    ratio_BT = (logp_BT - old_logp_BT).detach().exp()
    weight_BT = ratio_BT.clamp(max=1 + config.clip_high)
    loss_BT = -weight_BT * advantage_B[:, None] * logp_BT
    penalty, kl_metrics = kl_penalty(logp_BT, ref_logp_BT, mask_BT, config, kl_coef, rows, tokens)
    loss = functional.aggregate(loss_BT, mask_BT, config.aggregation, rows, tokens) + penalty
    metrics = {
        "loss": loss.detach(),
        "clip_fraction": ((ratio_BT > weight_BT) * mask_BT).sum() / tokens,
        "ratio": (ratio_BT * mask_BT).sum() / tokens,
    }
    return loss, metrics | kl_metrics


class CISPO(GRPO):
    """GRPO with a clipped weight instead of a clipped gradient; see the head of this file."""

    Config = CISPOConfig
    config: CISPOConfig
    loss_function = staticmethod(cispo_loss)
