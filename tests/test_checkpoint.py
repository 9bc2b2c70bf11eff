"""Checkpoints: killed at any moment, the folder holds the old one or the new one whole."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from textrl_gym import files

NAMES = ("model", "agent.json", "training")


def fill(number: int) -> Any:
    def into(folder: Path) -> None:
        for name in NAMES:
            if name == "model":
                (folder / name).mkdir()
                (folder / name / f"part{number}").write_text(str(number))
            else:
                (folder / name).write_text(f'{{"number": {number}}}')

    return into


def number_of(folder: Path) -> set[int]:
    """The numbers of the checkpoint's parts: one, where it is whole."""
    state = files.read_state(folder)["number"]
    parts = {int(path.read_text()) for path in (folder / "model").iterdir()}
    return {state, json.loads((folder / "training").read_text())["number"]} | parts


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    plain, seen = os.replace, set()
    for moment in range(6):
        folder = tmp_path / str(moment) / "run"
        folder.mkdir(parents=True)
        (folder / "progress.json").write_text("kept")
        files.write_folder(folder, fill(1))
        calls = 0

        def replace(source: Any, target: Any, moment: int = moment) -> None:
            nonlocal calls
            if calls == moment:
                raise Killed
            calls += 1
            plain(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            with contextlib.suppress(Killed):
                files.write_folder(folder, fill(2))
        found = number_of(folder)
        seen |= found
        assert len(found) == 1, f"killed at move {moment}: parts of checkpoints {found}"
        assert (folder / "progress.json").read_text() == "kept"
        files.write_folder(folder, fill(3))  # and it goes on
        assert number_of(folder) == {3}
        assert [path.name for path in folder.parent.iterdir() if path.name.endswith(".whole")] == []
    assert seen == {1, 2}
