"""Files of runs: written whole or not at all, and JSON-lines logs that a killed process may have left torn.

A log has one JSON object in each line. A process that is killed leaves its last line unfinished: readers do not see
that line, and the next process that appends to the log removes it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

STATE_FILE = "agent.json"
"""The JSON part of an agent's checkpoint folder."""


@contextlib.contextmanager
def atomic_writer(path: Path) -> Iterator[TextIO]:
    """Open a file that appears under its name, in place of an older one, only when all of it has been written.

    After an exception the older file is there as before, or none.
    """
    # In the same folder, since a rename is atomic within one file system only; by process, since two may write at once.
    fresh = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        with fresh.open("w", encoding="utf-8") as file:
            yield file
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file by atomic_writer."""
    with atomic_writer(path) as file:
        file.write(text)


def read_json_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a log in order; none where there is no file. Blank lines and an unfinished last one are left out.

    Raises:
        ValueError: naming the line before the last that is no JSON.
    """
    lines = _lines(file)
    rows = (_parse(file, number, lines) for number in range(len(lines)))
    return [row for row in rows if row is not None]


def last_json_line(file: Path) -> dict[str, Any] | None:
    """The last object of a log, without parsing those before it; None where there is none."""
    lines = _lines(file)
    rows = (_parse(file, number, lines) for number in reversed(range(len(lines))))
    return next((row for row in rows if row is not None), None)


def append_json_lines(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append objects to a log, after removing a last line that an earlier process left unfinished."""
    with file.open("ab+") as log:
        size = log.tell()
        log.seek(max(size - 1, 0))
        if log.read() not in (b"", b"\n"):  # the last line has no end
            lines = _lines(file)
            # A line without its end may still be whole: the kill came between the text and its newline.
            if _parse(file, len(lines) - 1, lines) is None:
                log.truncate(size - len(lines[-1]))
            else:
                log.write(b"\n")
        log.write("".join(json.dumps(row) + "\n" for row in rows).encode())


def write_folder(folder: str | Path, fill: Callable[[Path], object]) -> None:
    """Fill a new folder by `fill(path)` and put it in place, so that a crash at any moment leaves a whole checkpoint.

    Until the new folder is full the old checkpoint stands; from then on the new one counts, and whoever reads it
    finishes moving it. What else lies in the folder (logs, a report) stays.
    """
    final = Path(folder)
    final.parent.mkdir(parents=True, exist_ok=True)
    finish_folder(final)
    fresh = final.with_name(f".{final.name}.{os.getpid()}.new")
    shutil.rmtree(fresh, ignore_errors=True)  # of a killed process that had the same number
    fresh.mkdir()
    fill(fresh)
    # A name that says that it is whole: before, a kill between two moves left half of a new checkpoint on half of an
    # old one.
    os.replace(fresh, _whole(final))
    finish_folder(final)


def _whole(final: Path) -> Path:
    """Where a checkpoint stands from when it is complete until it is moved."""
    return final.with_name(f".{final.name}.whole")


def finish_folder(folder: str | Path) -> None:
    """Move a complete checkpoint into place, where a crash has left one."""
    final = Path(folder)
    whole = _whole(final)
    if not whole.is_dir():
        return
    final.mkdir(exist_ok=True)
    for item in whole.iterdir():
        target = final / item.name
        if target.is_dir():  # os.replace overwrites files, but no folder that holds something
            shutil.rmtree(target)
        os.replace(item, target)
    whole.rmdir()


def read_json(file: Path) -> dict[str, Any]:
    """The object of a JSON file.

    Raises:
        ValueError: it is no JSON; the error names the file.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{str(file)!r} is no JSON: {error}") from error


def read_state(folder: str | Path) -> dict[str, Any]:
    """The JSON part of a checkpoint.

    Raises:
        ValueError: the folder holds no checkpoint.
    """
    finish_folder(folder)
    path = Path(folder) / STATE_FILE
    if not path.is_file():
        raise ValueError(f"{str(folder)!r} is no saved agent: it holds no {STATE_FILE}")
    return read_json(path)


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Write the JSON part of a checkpoint."""
    (folder / STATE_FILE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")


def jsonable(value: object) -> bool:
    """Whether a setting can be written down and read back."""
    try:
        # There and back: dumps alone also takes what comes back as something else, such as a dict with integer keys.
        return json.loads(json.dumps(value)) == (list(value) if isinstance(value, tuple) else value)
    except TypeError:
        return False


def _lines(file: Path) -> list[bytes]:
    # Bytes: the tear may be inside a character. Not splitlines(): it also parts lines at characters within a text.
    return file.read_bytes().split(b"\n") if file.is_file() else []


def _parse(file: Path, number: int, lines: list[bytes]) -> dict[str, Any] | None:
    """A line's object; None for a blank line, and for a last one without an end that is no JSON."""
    line = lines[number]
    if not line.strip():
        return None
    try:
        return json.loads(line)
    except ValueError as error:
        if number == len(lines) - 1:
            return None
        raise ValueError(f"{str(file)!r}, line {number + 1} is no JSON: {error}") from error
