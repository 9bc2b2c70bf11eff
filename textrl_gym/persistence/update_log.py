"""The log of updates: JSON lines and TensorBoard by Stable-Baselines3's Logger; cut at a checkpoint to go on from."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from textrl_gym import files, processes
from textrl_gym.persistence.run_lock import LOCK

if TYPE_CHECKING:
    from stable_baselines3.common.logger import Logger

EVENTS = "events.out.tfevents*"
"""TensorBoard's files."""
UPDATES = "train/updates"
"""The key of the number of updates in a row."""


def new_logger(folder: Path) -> Logger:
    """Stable-Baselines3's logger; a resumed run gets a file of its own, since its JSON writer empties what it opens."""
    # Here, not above: reading a log needs no torch.
    from stable_baselines3.common.logger import Logger, make_output_format

    if not processes.is_first():
        return Logger(str(folder), [])
    folder.mkdir(parents=True, exist_ok=True)
    # SB3's writer opens its file for writing: the rows of the first call would be gone.
    before = len(list(folder.glob("progress*.json")))
    json_format = make_output_format("json", str(folder), f"_{before}" if before else "")
    return Logger(str(folder), [json_format, make_output_format("tensorboard", str(folder))])


def update_logs(folder: Path) -> list[Path]:
    """The logs of updates: in the folder, and in one that learn()'s tb_log_name names."""
    # A folder of its own run, as where out is runs/, has a lock of its own.
    inside = [file for file in folder.glob("*/progress*.json") if not (file.parent / LOCK).exists()]
    return [*folder.glob("progress*.json"), *inside]


def clear(folder: Path, more: Iterable[Path] = ()) -> None:
    """Remove the logs of a run that begins anew.

    Args:
        more: further logs of the folder.
    """
    if not processes.is_first():
        return
    for file in [*more, *update_logs(folder), *folder.glob(EVENTS)]:
        file.unlink(missing_ok=True)


def cut(folder: Path, updates: int, timesteps: int = 0, more: Iterable[Path] = ()) -> None:
    """Take out what was logged after the checkpoint that the run goes on from: it will be logged again.

    Args:
        updates: of the checkpoint.
        timesteps: of the checkpoint, for logs of versions that did not write the updates.
        more: further logs of the folder.
    """
    if not processes.is_first():
        return
    # Between the last checkpoint and a kill, updates were logged that are now done again.
    for file in [*more, *update_logs(folder)]:
        if not file.is_file():
            continue
        rows = files.read_json_lines(file)
        earlier = [row for row in rows if _logged_by(row, updates, timesteps)]
        # Also where none is taken out: the unfinished line of a kill goes.
        files.write_text(file, "".join(json.dumps(row) + "\n" for row in earlier))


def _logged_by(row: dict[str, Any], updates: int, timesteps: int) -> bool:
    number = row.get("updates", row.get(UPDATES))
    if number is not None:
        return number <= updates
    return row.get("timesteps", row.get("time/total_timesteps", 0)) <= timesteps
