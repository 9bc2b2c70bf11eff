"""RewardHackingMonitor: looks at every evaluation of a training run for signs of reward hacking, and warns or stops.

The rules are in textrl_gym.evaluation.reward_hacking; a report applies the same ones to a finished run.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback

from textrl_gym.core import Rollout
from textrl_gym.evaluation.reward_hacking import GOLD_ALARM, Alarm, AlarmBounds, Evaluation, alarms, best
from textrl_gym.training.run_folder import BEST, append_alarm


def locals_of_rollout(rollout: Rollout) -> dict[str, Any]:
    """What Stable-Baselines3's callbacks read of a step from `self.locals`: dones, rewards, infos.

    A rollout is a step here, so that each of its episodes has ended, and its reward is the return.
    """
    return_B, length_B = rollout.reward_BT.sum(1).tolist(), rollout.mask_BT.sum(1).tolist()
    infos = [{"episode": {"r": r, "l": length}} for r, length in zip(return_B, length_B, strict=True)]
    return {"dones": np.ones(len(rollout), bool), "rewards": np.array(return_B), "infos": infos}


class EvaluationCallback(BaseCallback):
    """A callback of Stable-Baselines3 that training also tells of its evaluations."""

    def on_evaluation(self, row: dict[str, Any], samples: list[dict[str, Any]]) -> bool:
        """Look at an evaluation: its metrics and completions. False ends the training."""
        return True

    def remember_evaluations(self, earlier: list[Evaluation]) -> None:
        """Before a run that goes on: its evaluations so far, in their order."""

    def _on_step(self) -> bool:
        return True


class RewardHackingMonitor(EvaluationCallback):
    """Raises an alarm once when a measure leaves its bounds, and again if it has been back in between.

    Alarms are told, and are lines of alarms.jsonl in the run's folder. With on_hacking="stop" the run ends at the first
    one about gold (where there is no gold score, at the first of any kind), and OUT/best holds the checkpoint of the
    evaluation with the best gold score.

    Args:
        on_hacking: "warn" or "stop".
        bounds: None for the usual ones.
        tell: called with the words of each alarm.
    """

    def __init__(
        self,
        on_hacking: Literal["warn", "stop"] = "warn",
        bounds: AlarmBounds | None = None,
        tell: Callable[[str], None] = print,
    ) -> None:
        super().__init__()
        if on_hacking not in ("warn", "stop"):
            raise ValueError(f"on_hacking must be 'warn' or 'stop', got {on_hacking!r}")
        self.on_hacking, self.bounds, self.tell = on_hacking, bounds or AlarmBounds(), tell
        self._forget()

    def _forget(self) -> None:
        self.start: Evaluation | None = None
        self.best: Evaluation | None = None
        self.now: list[Alarm] = []
        """Of the last evaluation."""
        self.stopped = False

    def remember_evaluations(self, earlier: list[Evaluation]) -> None:
        self._forget()
        for evaluation in earlier:
            self._see(evaluation)

    def _see(self, evaluation: Evaluation) -> list[Alarm]:
        """The alarms that were not there at the last evaluation."""
        self.start = self.start or evaluation
        if "gold" in evaluation.row:
            self.best = best([evaluation] if self.best is None else [self.best, evaluation])
        # By measure and not by words, which have the number of each evaluation in them.
        before = {alarm.measure for alarm in self.now}
        self.now = alarms(self.start, self.best, evaluation, self.bounds)
        return [alarm for alarm in self.now if alarm.measure not in before]

    def on_evaluation(self, row: dict[str, Any], samples: list[dict[str, Any]]) -> bool:
        evaluation = Evaluation(row, samples)
        new = self._see(evaluation)
        for alarm in new:
            self._log(row, alarm)
        if self.on_hacking == "warn":
            return True
        if self.best is evaluation and row["updates"]:
            self.model.save(self._out / BEST)
        # Form and length may drift for good reasons; where there is a gold score it alone decides.
        decisive = [alarm for alarm in self.now if alarm.measure == GOLD_ALARM or self.best is None]
        if decisive and not self.stopped:  # a run that ends is evaluated once more
            self.stopped = True
            self.tell(f"stopped by {decisive[0].measure}{self._where_best()}")
        return not self.stopped

    @property
    def _out(self) -> Path:
        return Path(self.model.out)  # type: ignore[attr-defined] # an agent of this project

    def _log(self, row: dict[str, Any], alarm: Alarm) -> None:
        self.tell(alarm.line)
        append_alarm(self._out, row, alarm)

    def _where_best(self) -> str:
        if self.best is None:
            return ""
        row = self.best.row
        if not row["updates"]:
            return f"; no evaluation had a better gold score than the initial policy ({row['gold']:.3f})"
        return f"; {self._out / BEST} has the best gold score, {row['gold']:.3f} at {row['timesteps']:,} tokens"
