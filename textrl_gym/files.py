"""Files of runs: written whole or not at all, and JSON-lines logs that a killed process may have left torn.

A log has one JSON object in each line. A process that is killed leaves its last line unfinished: readers do not see
that line, and the next process that appends to the log removes it.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO


@contextlib.contextmanager
def atomic_writer(path: Path) -> Iterator[TextIO]:
    """Open a file that appears under its name, in place of an older one, only when all of it has been written.

    After an exception the older file is there as before, or none.
    """
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
    found = (_parse(file, number, lines) for number in range(len(lines)))
    return [row for row in found if row is not None]


def last_json_line(file: Path) -> dict[str, Any] | None:
    """The last object of a log, without parsing those before it; None where there is none."""
    lines = _lines(file)
    found = (_parse(file, number, lines) for number in reversed(range(len(lines))))
    return next((row for row in found if row is not None), None)


def append_json_lines(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append objects to a log, after removing a last line that an earlier process left unfinished."""
    with file.open("ab+") as log:
        size = log.tell()
        log.seek(max(size - 1, 0))
        if log.read() not in (b"", b"\n"):  # the last line has no end
            lines = _lines(file)
            if _parse(file, len(lines) - 1, lines) is None:
                log.truncate(size - len(lines[-1]))
            else:
                log.write(b"\n")
        log.write("".join(json.dumps(row) + "\n" for row in rows).encode())


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
