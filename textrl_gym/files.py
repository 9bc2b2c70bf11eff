"""Files of runs: written whole or not at all, and JSON-lines logs that a killed process may have left torn.

A log has one JSON object in each line. A process that is killed leaves its last line unfinished: readers do not see
that line, and the next process that appends to the log removes it.

Of the processes of one run (textrl_gym.processes) the first alone writes: to the others each function here that writes
does nothing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from safetensors import SafetensorError

from textrl_gym import processes

STATE_FILE = "agent.json"
"""The JSON part of an agent's checkpoint folder."""
RUN_FILE = "run.json"
"""How a run or a training was started; going on takes its settings from there."""
MANIFEST = "checkpoint.json"
"""Names the files of a checkpoint."""
PREVIOUS = ".previous"
"""Folder in a run's folder with the checkpoint before the newest."""
WHOLE = ".checkpoint.whole"
"""Where a checkpoint stands from when it is complete until its parts are moved."""
RETIRED = ".checkpoint.retired"
"""Takes the parts of the checkpoint before, while they are moved away."""
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
"""How the names of a model's weights end."""
UNLISTED = (
    "model",
    "base",
    "reference",
    "value_model",
    "mask_model",
    "value_head.safetensors",
    "pairs.safetensors",
    "training.safetensors",
    STATE_FILE,
)
"""The parts of checkpoints of version 0.1, which wrote no manifest."""


def make_folder(folder: Path) -> None:
    """Make a folder that a user has named for results, where it is not there.

    Raises:
        ValueError: it cannot be made: a file has its name, or it may not be written.
    """
    if not processes.is_first():
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"the folder {str(folder)!r} cannot be written: {error.strerror or error}") from error


def make_new_folder(folder: Path) -> Path:
    """Make a folder that was not there: under the name, or where that is taken, with -2, -3 and so on behind it.

    Raises:
        ValueError: it may not be written.
    """
    make_folder(folder.parent)
    number, fresh = 1, folder
    while True:
        try:
            # To make it is to ask whether it is there: between the two, another process could make it.
            fresh.mkdir()
            return fresh
        except FileExistsError:
            number += 1
            fresh = folder.with_name(f"{folder.name}-{number}")
        except OSError as error:
            raise ValueError(f"the folder {str(fresh)!r} cannot be written: {error.strerror or error}") from error


@contextlib.contextmanager
def atomic_writer(path: Path) -> Iterator[TextIO]:
    """Open a file that appears under its name, in place of an older one, only when all of it has been written.

    After an exception the older file is there as before, or none.
    """
    if not processes.is_first():
        with open(os.devnull, "w", encoding="utf-8") as nothing:
            yield nothing
        return
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


def append_json_lines(file: Path, rows: Iterable[dict[str, Any]], sync: bool = False) -> None:
    """Append objects to a log, after removing a last line that an earlier process left unfinished.

    Args:
        sync: return only when the disk has them, for what cannot be computed again.
    """
    if not processes.is_first():
        return
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
        if sync:
            log.flush()
            os.fsync(log.fileno())


# -- checkpoints: folders that are written whole, with the one before kept ---------------------------------------------


def write_folder(folder: str | Path, fill: Callable[[Path], object], keep_previous: bool = False) -> None:
    """Fill a new folder by `fill(path)` and put its parts in place of the ones written before, at any moment whole.

    Until the new parts are complete the old ones stand; from then on the new ones count, and whoever reads the folder
    finishes moving them. Afterwards the folder holds what was filled and nothing of the checkpoint before. What else
    lies in it (logs, a report) stays.

    Args:
        keep_previous: keep the parts before in `.previous`, for the case that the new ones are damaged later.
    """
    if not processes.is_first():
        return
    final = Path(folder)
    try:
        final.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"the folder {str(final)!r} cannot be written: {error.strerror}") from error
    finish_folder(final)
    remove_half_made(final)
    # Inside, since beside it may be another file system (a mounted volume, a link), or no folder at all (".").
    fresh = final / f".checkpoint.{os.getpid()}.new"
    try:
        fresh.mkdir()
        try:
            fill(fresh)
        except SafetensorError as error:  # of a disk that is full, among others, and no OSError
            raise OSError(f"{str(folder)!r} cannot be written: {error}") from error
        give_usual_modes(fresh)
        listed = sorted(path.relative_to(fresh).as_posix() for path in fresh.rglob("*") if path.is_file())
        (fresh / MANIFEST).write_text(json.dumps({"files": [*listed, MANIFEST]}, indent=1) + "\n", encoding="utf-8")
        # A damaged one would push the last good one out.
        if keep_previous and damage(final) is None and checkpoint_parts(final):
            (final / RETIRED).mkdir(exist_ok=True)
        # A name that says that it is whole: before, a kill between two moves left half of a new checkpoint on half of
        # an old one.
        os.replace(fresh, final / WHOLE)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)  # else it would keep a full disk full
    finish_folder(final)
    if not keep_previous:
        shutil.rmtree(final / PREVIOUS, ignore_errors=True)


def give_usual_modes(folder: Path) -> None:
    """Give every file below a folder the mode of a new one: safetensors writes files that only their owner may read."""
    probe = folder / f".mode.{os.getpid()}"
    probe.touch()  # asking for the umask would set it, for all threads
    mode = probe.stat().st_mode
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def finish_folder(folder: str | Path) -> None:
    """Move a complete checkpoint into place, where a crash has left one."""
    if not processes.is_first():
        return
    final = Path(folder)
    _finish_of_0_1(final)
    whole = final / WHOLE
    with _only_one(whole) as found:
        if not found:
            return
        retired = final / RETIRED
        if retired.is_dir():
            _move(checkpoint_parts(final), final, retired)
            shutil.rmtree(final / PREVIOUS, ignore_errors=True)
            os.replace(retired, final / PREVIOUS)
        parts = checkpoint_parts(whole)
        if parts:  # else all of it has been moved: the manifest goes last
            for stale in set(checkpoint_parts(final)) - set(parts):
                _remove(final / stale)
            _move(parts, whole, final)
        whole.rmdir()


def checkpoint_parts(folder: Path) -> list[str]:
    """The files and folders that a checkpoint is made of, its manifest last; none where there is no checkpoint."""
    if (folder / MANIFEST).is_file():
        with contextlib.suppress(ValueError):  # damaged: taken for one of an earlier version
            return list(dict.fromkeys(name.partition("/")[0] for name in _listed(folder)))
    # Without a manifest it is one of an earlier version.
    parts = [name for name in (*UNLISTED, MANIFEST) if (folder / name).exists()]
    return parts if STATE_FILE in parts or MANIFEST in parts else []


def damage(folder: str | Path) -> str | None:
    """What is wrong with the files of a checkpoint, in words; None where all are there and whole."""
    file = folder = Path(folder)
    try:
        for name in _listed(folder):
            file = folder / name
            if not file.is_file():
                return f"{str(file)!r} is missing"
            if file.suffix == ".json":
                json.loads(file.read_text(encoding="utf-8"))
            if file.suffix == ".safetensors":
                _check_length(file)
    except (ValueError, RecursionError) as error:
        reason = str(error)
        return reason if str(folder) in reason else f"{str(file)!r} is no JSON: {error}"
    except OSError as error:
        return str(error)
    return None


def whole_checkpoint(folder: str | Path) -> Path:
    """Where to load a checkpoint from: the folder or, where the newest one is damaged, the one before in it.

    Raises:
        ValueError: the newest is damaged, and there is no whole one before it.
    """
    folder = Path(folder)
    finish_folder(folder)
    processes.wait()  # until the first has moved what a crash has left
    if not checkpoint_parts(folder) and not (folder / PREVIOUS).is_dir():
        return folder  # the reader says that nothing is there
    wrong = damage(folder) if checkpoint_parts(folder) else f"{str(folder / STATE_FILE)!r} is missing"
    if wrong is None:
        return folder
    previous = folder / PREVIOUS
    if not previous.is_dir() or (before := damage(previous)):
        other = f"; the one before it too: {before}" if previous.is_dir() else ""
        raise ValueError(f"the checkpoint in {str(folder)!r} is damaged: {wrong}{other}")
    print(f"the newest checkpoint in {str(folder)!r} is damaged ({wrong}): taking the one before it", file=sys.stderr)
    return previous


def remove_half_made(folder: Path) -> None:
    """Remove what processes that no longer run were writing into a folder when they were killed."""
    for path in [*folder.glob(".*.new"), *folder.absolute().parent.glob(f".{folder.absolute().name}.*.new")]:
        number = path.suffixes[-2].removeprefix(".") if len(path.suffixes) > 1 else ""
        # Of this process's number: of an earlier one that had it, as in a container that is started again.
        if number.isdecimal() and (int(number) == os.getpid() or not _runs(int(number))):
            _remove(path)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _move(names: Iterable[str], source: Path, target: Path) -> None:
    """Move files and folders in order; those that an earlier call has moved are left out."""
    for name in names:
        if not (source / name).exists():
            continue
        if (target / name).is_dir():  # os.replace overwrites files, but no folder that holds something
            shutil.rmtree(target / name)
        os.replace(source / name, target / name)


def lock(descriptor: int, wait: bool = True) -> bool:
    """Lock an open file or folder for this process; False where another one has it and `wait` is off.

    A file system that knows no locks (some network ones) is told of by a warning, and counts as locked.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF):
            raise
        reason = error.strerror or error
        warnings.warn(f"no lock on this file system ({reason}): nothing keeps two processes apart", stacklevel=3)
    return True


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[bool]:
    """Only one process at a time is inside; whether the folder is (still) there."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):
        yield False
        return
    try:
        lock(descriptor)
        # The one before may have moved it away in the meantime, and another may stand under its name by now.
        yield folder.is_dir() and os.path.samestat(os.fstat(descriptor), folder.stat())
    finally:
        os.close(descriptor)


def _listed(folder: Path) -> list[str]:
    """The files of a checkpoint, relative to its folder."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        parts = [folder / name for name in UNLISTED if (folder / name).exists()]
        inside = [file for part in parts for file in (part.rglob("*") if part.is_dir() else [part]) if file.is_file()]
        return [file.relative_to(folder).as_posix() for file in inside]
    listed = read_json(manifest).get("files")
    # A checkpoint is data that may come from others: what it lists is moved and removed, and must lie inside.
    if not isinstance(listed, list) or not all(isinstance(name, str) and _inside(name) for name in listed):
        raise ValueError(f"{str(manifest)!r} must list files of its folder under 'files'")
    return listed


def _inside(name: str) -> bool:
    parts = name.split("/")
    return (
        bool(name) and not any(part in ("", ".", "..") for part in parts) and parts[0] not in (WHOLE, RETIRED, PREVIOUS)
    )


def _check_length(file: Path) -> None:
    """Hold that a safetensors file is as long as its header says.

    Raises:
        ValueError: it is not, or has no header.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length)) if length < size else {}
        ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        whole = 8 + length + max(ends, default=0) == size
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        whole = False
    if not whole:
        raise ValueError(f"{str(file)!r} is no whole safetensors file: it has {size:,} bytes")


def _finish_of_0_1(final: Path) -> None:
    """Move a complete checkpoint that 0.1 has left beside its folder into place."""
    whole = final.absolute().with_name(f".{final.absolute().name}.whole") if final.absolute().name else None
    if whole is None or not whole.is_dir():
        return
    final.mkdir(exist_ok=True)
    _move([item.name for item in whole.iterdir()], whole, final)
    whole.rmdir()


def read_json(file: Path) -> dict[str, Any]:
    """The object of a JSON file.

    Raises:
        ValueError: it is no JSON, or no object; the error names the file.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError too
        raise ValueError(f"{str(file)!r} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{str(file)!r} must hold an object, not {type(value).__name__}")
    return value


Kinds = dict[str, tuple[type, ...]]
"""Field -> the types that its value may have."""
NUMBER = (int, float)


def check_fields(row: Mapping[str, Any], where: str | Path, required: Kinds, optional: Kinds | None = None) -> None:
    """Hold that what was read from a file has the fields, of the types, that it is read for.

    Raises:
        ValueError: naming the file (or what `where` says), the field, and what is allowed.
    """
    for name, kinds in {**required, **(optional or {})}.items():
        if name in row and not isinstance(row[name], kinds):
            allowed = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
            raise ValueError(f"{str(where)!r} is damaged: {name!r} must be {allowed}, got {row[name]!r}")
        if name not in row and name in required:
            raise ValueError(f"{str(where)!r} is damaged: it has no {name!r}")


def check_numbers(row: Mapping[str, Any], where: str | Path) -> None:
    """Hold that every value is a number.

    Raises:
        ValueError: naming the file (or what `where` says) and the field.
    """
    check_fields(row, where, dict.fromkeys(row, NUMBER))


def began(folder: Path) -> str:
    """What to say of a folder in which something began and nothing was saved yet, or ""."""
    has_begun = (folder / RUN_FILE).is_file()
    return "; what began there has saved nothing yet: its own command goes on" if has_begun else ""


def check_free(folder: str | Path, command: str) -> None:
    """Hold that no model and no other command's run is lost where a run begins in a folder.

    Args:
        command: train, sft or reward-model. Earlier runs of its own in the folder are its own affair.

    Raises:
        ValueError: naming what the folder holds.
    """
    place = Path(folder)
    record = read_json(place / RUN_FILE) if (place / RUN_FILE).is_file() else {}
    # The one before too: the newest may be damaged.
    is_agent = any((place / part / STATE_FILE).is_file() for part in (".", PREVIOUS)) or "command" in record
    owner = record.get("pipeline", "train" if is_agent else None)
    if owner not in (None, command):
        raise ValueError(
            f"{str(folder)!r} holds a run of `textrl-gym {owner}`, which would be lost: name another folder"
        )
    weights = next((file.name for end in WEIGHTS for file in sorted(place.glob(f"*{end}"))), None)
    if owner is None and weights is not None:
        raise ValueError(f"{str(folder)!r} holds a model ({weights}), which would be lost: name another folder")


def read_state(folder: str | Path) -> dict[str, Any]:
    """The JSON part of a checkpoint.

    Raises:
        ValueError: the folder holds no checkpoint.
    """
    finish_folder(folder)
    path = Path(folder) / STATE_FILE
    if not path.is_file():
        hint = began(path.parent)
        if (path.parent / "config.json").is_file():  # as transformers saves one
            hint = f"; it holds a model: `textrl-gym train reference ENV --model {folder}` evaluates it as it is"
        raise ValueError(f"{str(folder)!r} is no saved agent: it holds no {STATE_FILE}{hint}")
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
