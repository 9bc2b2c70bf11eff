"""PPO on tokens, as RLHF does it (Schulman et al. 2017, arXiv:1707.06347; Ziegler et al. 2019, arXiv:1909.08593).

    r_t   = [t = T] score - beta KL_t                                     the environment's token reward
    A_t   = sum_l (gamma lambda)^l delta_{t+l},  delta_t = r_t + gamma V(s_{t+1}) - V(s_t)                 (GAE)
    L_pi  = mean_t max(-A_t ratio_t, -A_t clip(ratio_t, 1 - e, 1 + e))
    L_V   = 1/2 mean_t max((V - R)^2, (clip(V, V_old - e_v, V_old + e_v) - R)^2),   R_t = A_t + V_old(s_t)
    L     = L_pi + vf_coef L_V - entropy_coef H

Details of the reference implementations that are in: one temperature everywhere and no top-k; dropout off; position ids
under left padding; masks from lengths; the score on the last action, with V = 0 after it; values taken before each
action; masked, biased-variance whitening of advantages, and optionally of rewards without shifting their mean; value
clipping; a zero-initialised value head; Adam's eps 1e-5; linear decay of the learning rate; KL per token by k1,
unclamped, fixed or adaptive by the sequence's sum; log-probabilities recomputed by the training forward below float32.

Absent, with the reason:

- A critic initialised from the reward model: the reward model may be any function. `separate_value_model` starts it
  from the policy's own weights instead.
- EOS forbidden and texts cut after sampling (lm-human-preferences): here EOS ends the episode, as in an MDP.
- TensorFlow's bias correction in Adam: PyTorch's takes larger first steps; target_kl and a smaller learning rate
  are the practical replacement.
- Dual clipping for negative advantages: the ratio's gradient is bounded by target_kl here.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from textrl_gym import functional
from textrl_gym.core import Rollout
from textrl_gym.mdp.text_env import TextVectorEnv
from textrl_gym.training.agent import Agent
from textrl_gym.training.config import AgentConfig
from textrl_gym.training.minibatch import Minibatch, sum_of


@dataclasses.dataclass(frozen=True)
class PPOConfig(AgentConfig):
    """Settings of PPO."""

    learning_rate: float = 3e-4
    """Adam's step size. 3e-4 suits the embedded 1M-parameter model; 1e-6 to 1e-5 suits models of 100M and more."""
    group_size: int = 8
    """Completions of each prompt. PPO needs no groups; they share the cost of their prompt. 1 is the classic."""
    epochs: int = 2
    """Passes over each rollout."""
    minibatches: int = 2
    """Optimizer steps in each pass."""
    gamma: Annotated[float, Ge(0), Le(1)] = 1.0
    """Discount of a token step."""
    gae_lambda: Annotated[float, Ge(0), Le(1)] = 1.0
    """Bias against variance in the advantage. 1 is return minus value; with one score at the end and a critic that
    starts at 0, a smaller one hides the score from early tokens (0.95^30 = 0.2)."""
    clip_range: Annotated[float, Gt(0)] = 0.2
    """The policy's ratio is clipped to 1 +- this."""
    clip_range_value: Annotated[float | None, Gt(0)] = 0.2
    """The value's move from the rollout's value is clipped to +- this; None: not clipped."""
    vf_coef: Annotated[float, Ge(0)] = 0.1
    """Weight of the value loss. The critic shares the policy's trunk: 0.5 threw the policy 22 nats away at first."""
    entropy_coef: Annotated[float, Ge(0)] = 0.0
    """Weight of the entropy bonus."""
    whiten_advantages: bool = True
    """Scale advantages to mean 0 and variance 1 under the mask, over the whole rollout."""
    whiten_rewards: bool = False
    """Scale token rewards to variance 1 under the mask, keeping their mean."""
    target_kl: Annotated[float | None, Gt(0)] = None
    """Stop a rollout's remaining minibatches once the policy is this many nats per token (k3) from the sampling one."""
    separate_value_model: bool = False
    """Give the critic its own copy of the model instead of a head on the policy's."""


def ppo_loss(
    logp_BT: Tensor, value_BT: Tensor, entropy_BT: Tensor | None, part: Minibatch, config: PPOConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss at the head of this file, with part.advantage_BT and part.return_BT."""
    assert logp_BT.shape == value_BT.shape == part.mask_BT.shape, (logp_BT.shape, value_BT.shape, part.mask_BT.shape)
    policy_BT, ratio_BT, clipped_BT = functional.clipped_surrogate(
        logp_BT, part.logp_BT, part.advantage_BT, config.clip_range, config.clip_range
    )
    error_BT = (value_BT - part.return_BT) ** 2
    if config.clip_range_value is not None:
        move_BT = (value_BT - part.value_BT).clamp(-config.clip_range_value, config.clip_range_value)
        error_BT = torch.maximum(error_BT, (part.value_BT + move_BT - part.return_BT) ** 2)
    policy_loss = part.mean(part.weighted(policy_BT))
    value_loss = 0.5 * part.mean(error_BT)
    loss = policy_loss + config.vf_coef * value_loss
    metrics = {
        "policy_loss": policy_loss.detach(),
        "value_loss": value_loss.detach(),
        "clip_fraction": part.mean(clipped_BT),
        "ratio": part.mean(ratio_BT.detach()),
        "approx_kl_token": part.mean(functional.approx_kl(logp_BT, part.logp_BT)),
    }
    if entropy_BT is not None:
        bonus = part.mean(entropy_BT)
        loss = loss - config.entropy_coef * bonus
        metrics["entropy"] = bonus.detach()
    return loss, metrics | {"loss": loss.detach()}


class PPO(Agent):
    """Proximal policy optimization on tokens; see the head of this file."""

    Config = PPOConfig
    config: PPOConfig
    uses_value = True

    def _make_value_model(self, mdp: TextVectorEnv, model: torch.nn.Module) -> torch.nn.Module | None:
        return copy.deepcopy(model).to(self.device).float() if self.config.separate_value_model else None

    def estimates(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Advantages and returns from token rewards, in which score and KL are."""
        config = self.config
        reward_BT = rollout.reward_BT
        if config.whiten_rewards:
            reward_BT = functional.whiten(reward_BT, rollout.mask_BT, shift_mean=False)
        advantage_BT, return_BT = functional.gae(
            reward_BT, rollout.value_BT, rollout.mask_BT, config.gamma, config.gae_lambda
        )
        if config.whiten_advantages:
            advantage_BT = functional.whiten(advantage_BT, rollout.mask_BT)
        return advantage_BT, return_BT

    def advantages(self, rollout: Rollout) -> Tensor:
        return self.estimates(rollout)[0]

    def update(self, rollout: Rollout) -> dict[str, float]:
        config = self.config
        # 1. Token rewards to advantages and returns.
        advantage_BT, return_BT = self.estimates(rollout)
        batch = rollout.with_(advantage_BT=advantage_BT, return_BT=return_BT)

        # 2. Clipped steps on minibatches, until the policy has moved far enough.
        steps: list[dict[str, float]] = []
        for minibatch in self.minibatches(batch):
            parts = []
            for part in minibatch.micro_batches():
                now = self.policy.response(part, entropy=bool(config.entropy_coef))
                loss, metrics = ppo_loss(now.logp_BT, now.value_BT, now.entropy_BT, part, config)
                loss.backward()
                parts.append(metrics)
            steps.append(sum_of(parts) | {"grad_norm": self.step()})
            if config.target_kl is not None and steps[-1]["approx_kl_token"] > config.target_kl:
                break

        # 3. What to log.
        explained = _explained_variance(rollout.value_BT, return_BT, rollout.mask_BT)
        return functional.mean_of(steps) | {"optimizer_steps": len(steps), "explained_variance": explained}


def _explained_variance(value_BT: Tensor, return_BT: Tensor, mask_BT: Tensor) -> float:
    """1 - Var(return - value) / Var(return) over the masked places; 0 where returns do not vary."""
    returns, errors = return_BT[mask_BT], (return_BT - value_BT)[mask_BT]
    spread = float(returns.var(correction=0))
    return 1.0 - float(errors.var(correction=0)) / spread if spread > 0 else 0.0
