"""Fingerprints: hashes of a model's weights, by which a run knows again what it depends on.

A checkpoint names its base model and its reward model by folder. Another model may stand under that name later, or
the same one elsewhere; the hash tells. Names of the Hub and of packages have none: what they mean does not move.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from textrl_gym import files
from textrl_gym.models import adapters, weights

NUMBERS = ("reward_model.json", "ensemble.json")
"""Files by which a reward model's raw value becomes its score."""


def of(spec: str | Path, depth: int = adapters.DEPTH) -> str | None:
    """The fingerprint of a folder's weights; None of what is no folder, or has none.

    An adapter's has its base's in it, a saved agent's is its model's, and an ensemble's has all of its members'.

    Args:
        depth: so many adapters may stand on each other.
    """
    folder = Path(spec).expanduser()
    if not folder.is_dir():
        return None
    if (folder / files.STATE_FILE).is_file():
        folder = files.whole_checkpoint(folder) / "model"
    hashes = [_of_file(file.resolve(), *_stamp(file)) for file in _files(folder)]
    if hashes and depth and adapters.is_adapter(folder) and adapters.stated_base(folder):
        base = base_name(folder)
        hashes.append(of(base, depth - 1) or base)
    return hashlib.blake2b("\n".join(hashes).encode(), digest_size=16).hexdigest() if hashes else None


def _files(folder: Path) -> list[Path]:
    """A folder's weights, and what a reward model's scores are made of beside them."""
    weight_files = [*weights.weight_files(folder), *(folder / name for name in NUMBERS)]
    ensemble = folder / "ensemble.json"
    for name in files.read_json(ensemble).get("members", []) if ensemble.is_file() else []:
        weight_files += [*weights.weight_files(folder / name), folder / name / NUMBERS[0]]
    return [file for file in weight_files if file.is_file()]


def _stamp(file: Path) -> tuple[int, int]:
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns


@functools.lru_cache(maxsize=256)
def _of_file(file: Path, size: int, changed: int) -> str:
    """The hash of a file's bytes; size and time of change are arguments so that a changed file is read again."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "blake2b").hexdigest()


def locate(name: str, folder: Path, expected: str | None = None, say: str = "write its whole path there") -> str:
    """Where the model is that a folder names: what from_pretrained takes; the name itself where no folder is called so.

    A relative name was right in the working folder where it was written, which nothing tells. It is looked for beside
    the folder, in those above it, and in the working folder.

    Args:
        name: a folder or a Hub id.
        folder: whose file has the name.
        expected: the fingerprint of what is meant, where it is known.
        say: in the error, how to tell where the model is.

    Raises:
        ValueError: the folders of that name are other models, or different ones and nothing tells which is meant.
    """
    there = _candidates(name, folder)
    if expected is not None:
        by_path = {path: of(path) for path in there}
        right = next((path for path, fingerprint in by_path.items() if fingerprint == expected), None)
        if right is not None:
            return right
        others = ", ".join(f"{str(Path(path).resolve())!r} has {other}" for path, other in by_path.items())
        state = f"there is another model: {others}" if others else "there is no such folder"
        raise ValueError(
            f"{str(folder)!r} depends on the model {name!r} with the fingerprint {expected}, and {state}; {say}"
        )
    if len(there) > 1:
        raise ValueError(
            f"{str(folder)!r} stands on the model {name!r}, and there are {len(there)} folders of that name: "
            f"{', '.join(str(Path(path).resolve()) for path in there)}; {say}"
        )
    return there[0] if there else name


def _candidates(name: str, folder: Path) -> list[str]:
    path, near = Path(name).expanduser(), folder.resolve()
    if path.is_absolute():
        return [str(path)] if path.is_dir() else []
    # By its name where that is right here: it stays right when all of it is moved.
    there = {str(path.resolve()): str(path)} if path.is_dir() else {}
    for place in near.parents:
        if (found := place / path).is_dir():
            there.setdefault(str(found.resolve()), str(found))
    there.pop(str(near), None)  # an adapter does not stand on itself
    return list(there.values())


def base_name(folder: Path) -> str:
    """The model that a saved adapter stands on, as from_pretrained takes it.

    Raises:
        ValueError: the adapter names none, or different folders have that name.
    """
    name = adapters.stated_base(folder)
    if name is None:
        raise ValueError(f"the adapter in {str(folder)!r} names no base model (base_model_name_or_path)")
    return locate(name, folder, say=f"write its whole path into {adapters.CONFIG_FILE}")
