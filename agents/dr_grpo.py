"""Dr. GRPO: GRPO done right (Liu et al. 2025, "Understanding R1-Zero-like training", arXiv:2503.20783, section 3.2).

    A_i = R_i - mean(R)                                   no division by the group's standard deviation
    L   = - 1/(rows N) sum_i sum_t min(rho_it A_i, clip(rho_it) A_i)        N: the token budget, a constant

GRPO divides by std(R), which favours prompts that are nearly always or nearly never solved, and by |y_i|, which favours
long wrong answers. Both are gone: the gradient is the policy gradient with the group's mean as its baseline, up to a
constant.

Departure: the paper has no KL; kl_coef keeps this project's meaning, and the penalty is in the loss as in GRPO.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from textrl_gym.agents.grpo import GRPO, GRPOConfig
from textrl_gym.training.minibatch import Minibatch


@dataclasses.dataclass(frozen=True)
class DrGRPOConfig(GRPOConfig):
    """Settings of Dr. GRPO."""

    scale_by_std: bool = False
    """Divide advantages by the group's standard deviation: what this algorithm leaves out."""


class DrGRPO(GRPO):
    """GRPO without its two biases; see the head of this file."""

    Config = DrGRPOConfig
    config: DrGRPOConfig

    def loss(self, logp_BT: Tensor, part: Minibatch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = super().loss(logp_BT, part)
        if self.config.aggregation == "token":
            # From a mean over the tokens that there were to one over those that there might have been.
            loss = loss * (part.tokens / (part.rows * self.env.max_new_tokens))
        return loss, metrics | {"loss": loss.detach()}
