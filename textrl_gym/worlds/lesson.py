"""Lesson: what a task shows about RL from feedback, as runs to compare and findings that may come out or not.

`experiments.lessons` runs it, `textrl-gym lesson ENV` prints and draws it. Nothing here knows how it ends.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any, Literal

Numbers = Mapping[str, float]
"""Metrics of an evaluation."""
START = "start"
"""The trial of the initial policy, which every lesson has."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """One way to train, of which a lesson compares several."""

    words: str
    """What is different about it."""
    agent: str
    total_timesteps: int
    """Generated tokens of a run."""
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Of the agent."""
    reward: str | Mapping[str, float] | None = None
    """A reward's name, or names with weights; None: the task's own."""

    dataset: str | None = None
    """Rows that are trained and evaluated on; None: the task's own."""
    on_bad_health: Literal["stop", "warn"] = "stop"
    """As in a training; "warn" where the lesson is what the health card warns of."""

    @property
    def reward_flag(self) -> str | None:
        """The reward as a command line names it (`mdp.env_settings.parse_reward`)."""
        return json.dumps(dict(self.reward)) if isinstance(self.reward, Mapping) else self.reward


@dataclasses.dataclass(frozen=True)
class Finding:
    """A sentence, and the number that is above 0 where it holds."""

    words: str
    effect: Callable[[Mapping[str, Numbers]], float]
    """Of one seed: from the metrics of each trial, and of `start`, to the size of what the sentence says."""


@dataclasses.dataclass(frozen=True)
class Lesson:
    """Trials of a task, and what they are to show."""

    words: str
    """The lesson in a sentence."""
    trials: Mapping[str, Trial]
    findings: tuple[Finding, ...]
    metrics: tuple[str, ...]
    """The metrics that tell it, in the order of the table."""
    samples: int = 1
    """Completions of each prompt that gold_best_of_k is measured on; 1: not measured."""
    extremes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Names of scores, and the rewards that give them, of which the maximum over these completions is measured too:
    NAME_max_of_k and NAME_any_of_k (`experiments.lessons.extremes_of`)."""
    plane: tuple[str, str] | None = None
    """Two metrics that the page draws against each other, a point for each trial, as a front."""
    annotators: Mapping[str, float] | None = None
    """Settings of the simulated annotators (judges.annotators) who compare each trial's completions with the initial
    policy's: annotators_win_rate, and annotators_length_controlled at equal length; None: nobody does."""

    def __post_init__(self) -> None:
        if START in self.trials:
            raise ValueError(f"a trial may not be called {START!r}, which is the initial policy")


def rise(after: str, before: str, name: str, least: float = 0.0) -> Callable[[Mapping[str, Numbers]], float]:
    """By how much more than `least` a metric is larger in one trial than in another: an effect of a Finding."""
    return lambda of: of[after][name] - of[before][name] - least
