"""When a checkpoint is due: by updates, by time, and when a run breaks off. Loads no torch."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
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


def rescue(
    error: BaseException,
    folder: Path,
    updates: int,
    saved_at: int | None,
    whole: bool,
    save: Callable[[], object],
) -> str:
    """Save the last whole update before a run ends by an error or a signal; returns what became of it. Raises nothing.

    Args:
        updates: whole ones.
        saved_at: the update of the checkpoint that is there; None: there is none.
        whole: whether the state in memory is that of a whole update.
    """
    if not whole:
        outcome = f"update {updates + 1} was broken off in its middle: {folder} keeps what was saved before"
    elif saved_at == updates:
        outcome = f"{folder} has the checkpoint of update {updates}"
    else:
        try:
            save()
            outcome = f"saved the checkpoint of update {updates} in {folder}"
        except Exception as failed:  # noqa: BLE001 - the error that ends the run is the one to raise
            outcome = f"the checkpoint of update {updates} could not be saved in {folder}: {failed}"
    why = "interrupted" if isinstance(error, KeyboardInterrupt) else "stopped by an error"
    return f"{why}: {outcome}"
