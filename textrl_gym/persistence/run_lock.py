"""The lock of a run's folder: one process at a time trains in it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from textrl_gym import files, processes

LOCK = ".training.lock"
"""Locked while something trains in the folder."""


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Make the folder, and train in it alone; the processes of one run together, by the lock of the first.

    Raises:
        ValueError: it cannot be written, or another process or agent trains in it.
    """
    if not processes.is_first():
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Opened for writing, as network file systems want it of what is locked; so is found out whether one may write.
        lock = (folder / LOCK).open("a", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"the folder {str(folder)!r} cannot be written: {error.strerror or error}") from error
    with lock:
        # The system lets go of it when the process ends, however it ends.
        if not files.lock(lock.fileno(), wait=False):
            raise ValueError(
                f"another process or agent trains in {str(folder)!r}: wait for its end, or name another folder (out)"
            )
        files.remove_half_made(folder)
        yield
