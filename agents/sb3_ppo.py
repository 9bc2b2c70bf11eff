"""PPO as Stable-Baselines3 has it (Schulman et al. 2017, arXiv:1707.06347; stable_baselines3/ppo/ppo.py).

    L = mean_t max(-A_t ratio_t, -A_t clip(ratio_t, 1 - e, 1 + e)) + vf_coef mean_t (R_t - V_t)^2 - ent_coef H

The loop and the loss are SB3's; see integrations/sb3_agent.py for what is around them. It is here as the ground that
agents/ppo.py stands on: the same algorithm with no knowledge of text. What differs from agents/ppo.py:

- a rollout is a fixed number of tokens of each row and cuts texts; the rest of one is estimated by V;
- a minibatch holds single tokens of many texts, so that nearly every text is computed again in each;
- advantages are scaled within a minibatch, by the unbiased variance; the value loss has no 1/2;
- the KL penalty comes with the environment's rewards, step by step.

Departures from SB3's defaults: a smaller vf_coef, since the critic shares the LM's trunk; fewer epochs and larger
minibatches, since a text's cost is shared by its tokens in the same minibatch.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

from annotated_types import Ge, Gt
from stable_baselines3 import PPO

from textrl_gym.integrations.sb3_agent import SB3Agent, SB3Config


@dataclasses.dataclass(frozen=True)
class SB3PPOConfig(SB3Config):
    """Settings of SB3's PPO."""

    epochs: int = 2
    """Passes over each rollout."""
    minibatches: int = 2
    """Optimizer steps in each pass; divides the tokens of a rollout."""
    clip_range: Annotated[float, Gt(0)] = 0.2
    """The policy's ratio is clipped to 1 +- this."""
    clip_range_value: Annotated[float | None, Gt(0)] = None
    """The value's move from the rollout's value is clipped to +- this; None: not clipped."""
    vf_coef: Annotated[float, Ge(0)] = 0.1
    """Weight of the value loss."""
    entropy_coef: Annotated[float, Ge(0)] = 0.0
    """Weight of the entropy bonus."""
    whiten_advantages: bool = True
    """Scale advantages to mean 0 and variance 1 within each minibatch."""
    target_kl: Annotated[float | None, Gt(0)] = None
    """Stop a rollout's updates at 1.5 times so many nats per token from the sampling policy."""


class SB3PPO(SB3Agent):
    """Stable-Baselines3's PPO; see the head of this file."""

    Config = SB3PPOConfig
    config: SB3PPOConfig

    def make_algorithm(self, **common: Any) -> PPO:
        config = self.config
        return PPO(
            **common,
            batch_size=self.batch_steps // config.minibatches,
            n_epochs=config.epochs,
            clip_range=config.clip_range,
            clip_range_vf=config.clip_range_value,
            normalize_advantage=config.whiten_advantages,
            ent_coef=config.entropy_coef,
            vf_coef=config.vf_coef,
            max_grad_norm=config.max_grad_norm,
            target_kl=config.target_kl,
        )
