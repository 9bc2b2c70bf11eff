"""When a checkpoint is due: by updates, and by time. Loads no torch."""

from __future__ import annotations

import dataclasses
import time
from typing import Annotated

from annotated_types import Ge

from textrl_gym.bounds import check_settings


@dataclasses.dataclass(frozen=True)
class SaveOptions:
    """When a run that goes on is saved."""

    save_every: Annotated[int, Ge(0)] = 0
    """Updates between two checkpoints, beside those by time; 0 for none. One is written at the end and whenever the run
    is stopped, by a signal or an error, too."""
    save_every_minutes: Annotated[float, Ge(0)] = 5.0
    """Minutes between two checkpoints: what a power cut may cost; 0 for none by time."""

    def __post_init__(self) -> None:
        check_settings(self)


class SaveSchedule:
    """Says when the next checkpoint is due."""

    def __init__(self, options: SaveOptions) -> None:
        self.options = options
        # Not the time of day, which may be set back while a run goes on.
        self.saved_time = time.monotonic()

    def due(self, updates: int) -> bool:
        """Whether a checkpoint is due after so many updates."""
        every, minutes = self.options.save_every, self.options.save_every_minutes
        by_updates = bool(every) and updates % every == 0
        return by_updates or (bool(minutes) and time.monotonic() - self.saved_time >= 60 * minutes)

    def saved(self) -> None:
        """A checkpoint was written just now."""
        self.saved_time = time.monotonic()
