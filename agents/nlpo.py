"""NLPO: natural language policy optimization (Ramamurthy et al. 2022, arXiv:2210.01241, section 4).

PPO whose actions are restricted to a set that an older policy finds likely:

    pi(a | s)  is proportional to  pi_theta(a | s) [a in top_p(pi_psi(. | s))],    psi <- theta every mu updates

The mask is meant to keep the many tokens that are never right out of exploration, and to move with the policy. All else
is agents/ppo.py; with top_p = 1 this is PPO, bit for bit. The paper tunes p and mu for each of its tasks.

What the authors' code does (allenai/RL4LMs at 01477e4, 0e3a809 and a45ab3e, read in November 2026): the masks of a
rollout are kept and applied in the update too; the KL in the reward is of the unmasked policy; special tokens and, by
default, the 100 most likely ones are always allowed. Its refresh replaces the policy's `_mask_model`, while the logits
processor of the sampler keeps the model that it was made with, so that, as read, rollouts go on being masked by the
initial policy.

What is done here: log-probabilities, ratio, entropy and KL are all of the masked distribution, which is what was
sampled from, so the first ratio is 1 and the penalty is the KL of the text that is written. The set is the top-p one
alone, and the refresh reaches the sampler. It comes after an update, so that all of an update has its rollout's mask.

What follows from it: the policy starts up to -log(p) nats a token away from the reference, and a token that is
forbidden gets no gradient of its own. The paper's gain over PPO on sentiment is small, and a user who reran it found
NLPO behind PPO (RL4LMs issue 28).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Unpack

import torch
from annotated_types import Ge, Gt, Le

from textrl_gym.agents.ppo import PPO, PPOConfig
from textrl_gym.core import Rollout
from textrl_gym.models import loading, lora
from textrl_gym.policy.policy import Policy
from textrl_gym.policy.top_p_policy import MaskedPolicy
from textrl_gym.training.agent import PolicySettings

MASK_FOLDER = "mask_model"


@dataclasses.dataclass(frozen=True)
class NLPOConfig(PPOConfig):
    """Settings of NLPO."""

    top_p: Annotated[float, Gt(0), Le(1)] = 0.9
    """Probability of the mask policy's most likely tokens that actions are taken from; 1 allows all tokens."""
    refresh_every: Annotated[int, Ge(1)] = 20
    """Updates after which the mask policy becomes the policy."""


class NLPO(PPO):
    """PPO on the top-p tokens of a slower policy; see the head of this file."""

    Config = NLPOConfig
    config: NLPOConfig
    policy: MaskedPolicy
    starts_at_reference = False
    by_server = False  # it samples from the tokens that another model masks
    shardable = False  # the mask's own model is asked within a pass of the policy

    def _new_policy(self, model: torch.nn.Module, **settings: Unpack[PolicySettings]) -> Policy:
        return MaskedPolicy(model, top_p=self.config.top_p, **settings)

    def update(self, rollout: Rollout) -> dict[str, float]:
        metrics = super().update(rollout)
        if self.clock.update % self.config.refresh_every == 0:
            self.policy.refresh()
        return metrics

    def save_extra(self, folder: Path) -> None:
        with loading.no_bars():
            lora.save(self.policy.mask.model, folder / MASK_FOLDER, base=False)

    def load_extra(self, folder: Path) -> None:
        saved = folder / MASK_FOLDER
        lora.restore_(self.policy.mask.model, saved, lambda: loading.load_model(str(saved)))
