"""GSPO: group sequence policy optimization (Zheng et al. 2025, arXiv:2507.18071, section 4).

A completion has one ratio, the geometric mean of its tokens', and is clipped whole:

    s_i = exp( 1/|y_i| sum_t (log pi - log pi_old)(y_it) )                                             equation 7
    L   = - mean_i min(s_i A_i, clip(s_i, 1 - e_low, 1 + e_high) A_i)                                   equation 5

with GRPO's advantages. For completions of one token it is GRPO. Off-policy token ratios are noise; their mean is the
sequence's own likelihood ratio, which is what the rewarded unit was sampled by.

Departure: the paper leaves the KL out; kl_coef keeps this project's meaning, and GRPO's KL term is in the loss.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from textrl_gym import functional
from textrl_gym.agents.grpo import GRPO, GRPOConfig, kl_penalty
from textrl_gym.training.minibatch import Minibatch


@dataclasses.dataclass(frozen=True)
class GSPOConfig(GRPOConfig):
    """Settings of GSPO."""

    minibatches: int = 2
    """Optimizer steps in each pass."""
    clip_low: float = 3e-4
    """The sequence's ratio is clipped to at least 1 - clip_low (the paper's; ratios of means hardly move)."""
    clip_high: float = 4e-4
    """The sequence's ratio is clipped to at most 1 + clip_high."""
    aggregation: functional.Aggregation = "sequence"
    """Of the KL term: "token" is a mean over all tokens of the batch, "sequence" over each sequence first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.credit != "trajectory":
            raise ValueError(f"credit must be 'trajectory', got {self.credit!r}: GSPO has one ratio for a sequence")


def sequence_log_ratio(logp_BT: Tensor, old_logp_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """log s_i: the mean over each completion's tokens of log pi - log pi_old. [B]."""
    assert logp_BT.shape == old_logp_BT.shape == mask_BT.shape
    return ((logp_BT - old_logp_BT) * mask_BT).sum(1) / mask_BT.sum(1).clamp(min=1)


def gspo_loss(logp_BT: Tensor, part: Minibatch, config: GSPOConfig, kl_coef: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Equation 5, with part.advantage_B, and GRPO's KL term."""
    assert logp_BT.shape == part.mask_BT.shape, (logp_BT.shape, part.mask_BT.shape)
    log_ratio_B = sequence_log_ratio(logp_BT, part.logp_BT, part.mask_BT)
    loss_B, ratio_B, clipped_B = functional.clipped_surrogate(
        log_ratio_B, torch.zeros_like(log_ratio_B), part.advantage_B, config.clip_low, config.clip_high
    )
    penalty, kl_metrics = kl_penalty(logp_BT, part, config, kl_coef)
    loss = part.mean(part.weighted(loss_B)) + penalty
    metrics = {
        "loss": loss.detach(),
        "clip_fraction": part.mean(clipped_B.float()),
        "ratio": part.mean(ratio_B.detach()),
        "approx_kl_token": part.mean(functional.approx_kl(logp_BT, part.logp_BT)),
    }
    return loss, metrics | kl_metrics


class GSPO(GRPO):
    """GRPO with one ratio a sequence; see the head of this file."""

    Config = GSPOConfig
    config: GSPOConfig

    def loss(self, logp_BT: Tensor, part: Minibatch) -> tuple[Tensor, dict[str, Tensor]]:
        return gspo_loss(logp_BT, part, self.config, self.kl.coef_in_loss)
