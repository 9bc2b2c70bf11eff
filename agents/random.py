"""Uniform over the action space at every step: what the scores of a task are worth without a model.

    pi(a | s) = 1 / V

An episode ends when EOS is drawn, V tokens from here on average, or with its budget. The KL is still to the task's
model, to whom such texts are very unlikely.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from textrl_gym.core import Rollout
from textrl_gym.mdp.text_env import TextVectorEnv
from textrl_gym.policy.policy import Policy
from textrl_gym.training.agent import Agent, EnvLike, Indices, ModelLike, Observation, PredictState


class UniformPolicy(Policy):
    """A policy with the same logit for every token, on any model's trunk."""

    def logits(self, hidden_ND: Tensor, token_N: Tensor | None = None) -> Tensor:
        return torch.zeros(len(hidden_ND), self.vocab_size, device=hidden_ND.device)


class Random(Agent):
    """Uniform tokens; there are no most likely ones, so that greedy decoding samples too."""

    trains = False

    def _make_policy(self, mdp: TextVectorEnv, model: ModelLike, reference: ModelLike) -> Policy:
        start = super()._make_policy(mdp, model, reference)
        return UniformPolicy(start.model, start.reference, vocab_size=start.vocab_size)

    def predict(
        self,
        observation: Observation,
        state: PredictState = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, PredictState]:
        return super().predict(observation, state, episode_start)

    def play(
        self,
        env: EnvLike,
        *,
        greedy: bool = False,
        generator: torch.Generator | None = None,
        prompt_indices: Indices = None,
    ) -> Rollout:
        return super().play(env, generator=generator, prompt_indices=prompt_indices)
