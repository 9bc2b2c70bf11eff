"""The initial policy: the model as it is given, sampled as it is. No agent of a comparison may fall below it."""

from __future__ import annotations

from textrl_gym.training.agent import Agent


class Reference(Agent):
    """The model that the others start from; learn() evaluates and saves it."""

    trains = False
