"""Files that are whole or not there, and logs with a torn last line."""

import errno
import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from textrl_gym import files

WHOLE = '{"timesteps": 0, "text": "a\u2028b"}\n\n{"timesteps": 9}\n'
"""Two objects and a blank line. U+2028 ends a line for str.splitlines(), but not in JSON lines."""
OBJECTS: list[dict[str, Any]] = [{"timesteps": 0, "text": "a\u2028b"}, {"timesteps": 9}]


@pytest.mark.parametrize(
    ("tail", "more"),
    [
        (b"", []),
        (b'{"timesteps": 18, "jud', []),  # killed while it wrote
        ('{"text": "é'.encode()[:-1], []),  # in the middle of a character
        (b'{"timesteps": 18}', [{"timesteps": 18}]),  # whole, though its end is missing
        (b"  ", []),
    ],
)
def test_a_torn_last_line_is_not_read_nor_built_upon(tmp_path: Path, tail: bytes, more: list[dict[str, Any]]) -> None:
    log = tmp_path / "log.jsonl"
    log.write_bytes(WHOLE.encode() + tail)
    assert files.read_json_lines(log) == OBJECTS + more
    assert files.last_json_line(log) == (OBJECTS + more)[-1]
    files.append_json_lines(log, [{"timesteps": 27}, {"timesteps": 36}])
    assert files.read_json_lines(log) == OBJECTS + more + [{"timesteps": 27}, {"timesteps": 36}]


def test_a_log_begins_empty(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    assert files.read_json_lines(log) == []
    assert files.last_json_line(log) is None
    files.append_json_lines(log, OBJECTS)
    assert files.read_json_lines(log) == OBJECTS


@pytest.mark.parametrize("read", [files.read_json_lines, files.last_json_line])
def test_a_broken_line_is_named(tmp_path: Path, read: Callable[[Path], Any]) -> None:
    (tmp_path / "log.jsonl").write_text('{"a": 1}\n{"b": \n')  # it has an end, so that no kill has torn it
    with pytest.raises(ValueError, match=r"log.jsonl', line 2 is no JSON"):
        read(tmp_path / "log.jsonl")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    files.write_text(file, "old")

    def fail() -> None:
        with files.atomic_writer(file) as out:
            out.write("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert file.read_text() == "old"
    files.write_text(file, "new")
    assert file.read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_a_lock_is_had_once_and_its_errors_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "a").open("w") as one, (tmp_path / "a").open("w") as two:
        assert files.lock(one.fileno())
        assert not files.lock(two.fileno(), wait=False)

        def fail(number: int) -> None:
            def flock(*_: object) -> None:
                raise OSError(number, os.strerror(number))

            monkeypatch.setattr(fcntl, "flock", flock)

        fail(errno.ENOLCK)  # a network file system
        with pytest.warns(UserWarning, match=r"no lock on this file system \(No locks available\)"):
            assert files.lock(two.fileno())
        fail(errno.EIO)
        with pytest.raises(OSError, match="Input/output error"):
            files.lock(two.fileno())


@pytest.mark.parametrize("command", ["train", "sft", "reward-model"])
@pytest.mark.parametrize("holds", ["train", "sft", "reward-model", "a model"])
def test_no_model_and_no_run_of_another_command_is_lost(command: str, holds: str, tmp_path: Path) -> None:
    record = {"train": {"command": ["train"]}, "a model": None}.get(holds, {"pipeline": holds})
    if record is not None:
        (tmp_path / files.RUN_FILE).write_text(json.dumps(record))
    (tmp_path / "model.safetensors").touch()
    if command == holds:
        files.check_free(tmp_path, command)
        assert (tmp_path / "model.safetensors").exists()
        return
    words = r"holds a model \(model\.safetensors\)" if record is None else f"holds a run of `textrl-gym {holds}`"
    with pytest.raises(ValueError, match=f"{words}, which would be lost: name another folder"):
        files.check_free(tmp_path, command)


def test_a_new_folder_takes_no_other_ones_name(tmp_path: Path) -> None:
    folders = [files.make_new_folder(tmp_path / "runs" / "a") for _ in range(3)]
    assert [folder.name for folder in folders] == ["a", "a-2", "a-3"] and all(folder.is_dir() for folder in folders)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file' cannot be written: File exists"):
        files.make_new_folder(tmp_path / "file" / "a")
