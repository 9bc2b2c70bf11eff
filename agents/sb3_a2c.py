"""A2C as Stable-Baselines3 has it (Mnih et al. 2016, arXiv:1602.01783; stable_baselines3/a2c/a2c.py).

    L = - mean_t A_t log pi(y_t | x, y_<t) + vf_coef mean_t (R_t - V_t)^2 - ent_coef H

One step on each rollout. The loop and the loss are SB3's; see integrations/sb3_agent.py for what is around them.

Departures from SB3's defaults: AdamW for RMSprop; advantages are scaled to variance 1, since rewards of texts may have
any scale; rollouts of a token budget instead of 5 steps, since the score comes with the last token; a smaller vf_coef,
since the critic shares the LM's trunk.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

from annotated_types import Ge
from stable_baselines3 import A2C

from textrl_gym.integrations.sb3_agent import SB3Agent, SB3Config


@dataclasses.dataclass(frozen=True)
class SB3A2CConfig(SB3Config):
    """Settings of SB3's A2C."""

    vf_coef: Annotated[float, Ge(0)] = 0.1
    """Weight of the value loss."""
    entropy_coef: Annotated[float, Ge(0)] = 0.0
    """Weight of the entropy bonus."""
    whiten_advantages: bool = True
    """Scale advantages to mean 0 and variance 1 over the rollout."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs * self.minibatches != 1:
            raise ValueError(f"A2C takes one step a rollout, got {self.epochs} epochs x {self.minibatches}")


class SB3A2C(SB3Agent):
    """Stable-Baselines3's A2C; see the head of this file."""

    Config = SB3A2CConfig
    config: SB3A2CConfig

    def make_algorithm(self, **common: Any) -> A2C:
        config = self.config
        return A2C(
            **common,
            use_rms_prop=False,
            normalize_advantage=config.whiten_advantages,
            ent_coef=config.entropy_coef,
            vf_coef=config.vf_coef,
            max_grad_norm=config.max_grad_norm,
        )
