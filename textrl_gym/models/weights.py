"""Weight files of a model's folder: safetensors of that folder only, never pickles.

A model's folder is data that may come from others. What it names (an index of shards, a file in its configuration) and
what its files link to must lie in the folder, or loading it would read what its author chose on this machine.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from textrl_gym import files

if TYPE_CHECKING:
    from torch import nn

SUFFIX = ".safetensors"
INDEX = ".safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
"""How the names of weights end that only an unpickler reads."""


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, those that an index names included, sorted.

    Raises:
        ValueError: a name or a link leads out of the folder, an index is no JSON of its form, or the only weights are
            pickles.
    """
    tensor_files = {file for file in folder.iterdir() if file.name.endswith(SUFFIX)}
    named = _configured(folder)
    indexes = [file for file in folder.iterdir() if file.name.endswith(INDEX)]
    for index in dict.fromkeys([*indexes, *(folder / name for name in named if name.endswith(INDEX))]):
        named |= _shards(index)
    for name in sorted(named):
        _check_name(folder, name)
    tensor_files |= {folder / name for name in named if name.endswith(SUFFIX)}
    for file in sorted(tensor_files):
        _check_link(folder, file)
    if not tensor_files:
        _check_no_pickle(folder)
    return sorted(tensor_files)


def differs(model: nn.Module, folder: Path) -> str | None:
    """The name of a tensor in which a model is not the one that a folder holds; None: there is none."""
    from safetensors import safe_open

    own = model.state_dict()
    for file in weight_files(folder):
        with safe_open(file, "pt") as saved:
            # Names that the model lacks are another form's, such as an adapter's.
            for name in own.keys() & saved.keys():
                tensor, now = saved.get_tensor(name), own[name]
                if tensor.shape != now.shape or not tensor.to(now.device, now.dtype).equal(now):
                    return str(name)
    return None


def _configured(folder: Path) -> set[str]:
    """The file that a configuration may name in place of transformers' own names."""
    file = folder / "config.json"
    name = files.read_json(file).get("transformers_weights") if file.is_file() else None
    if name is None:
        return set()
    if not isinstance(name, str):
        raise ValueError(f"{str(file)!r} is damaged: 'transformers_weights' must be a file's name, got {name!r}")
    _check_name(folder, name)
    return {name}


def _shards(index: Path) -> set[str]:
    if not index.is_file():
        raise ValueError(f"there is no file {str(index)!r}, which the configuration beside it names")
    shards = files.read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(f"{str(index)!r} is damaged: 'weight_map' must map names of tensors to names of files")
    return set(shards.values())


def _check_name(folder: Path, name: str) -> None:
    # Backslashes and drives too: the folder may have been made, or be read, elsewhere.
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if not parts or parts[0] == "/" or ":" in parts[0] or ".." in parts:
        raise ValueError(f"the model in {str(folder)!r} names the weights {name!r}, which lie outside of its folder")


def _check_link(folder: Path, file: Path) -> None:
    """Hold that a file is in its folder; the Hub's cache alone keeps files beside it, and links to them."""
    real, place = file.resolve(), folder.resolve()
    # Its layout is models--owner--name/snapshots/REVISION/FILE -> ../../blobs/HASH.
    allowed = [place, *(up.parent / "blobs" for up in place.parents if up.name == "snapshots")]
    if not any(real.is_relative_to(root) for root in allowed):
        raise ValueError(
            f"{str(file)!r} is a link to {str(real)!r}, outside of the model's folder: put the file itself there, or "
            "give the folder that it lies in"
        )


def _check_no_pickle(folder: Path) -> None:
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
    if pickles:
        raise ValueError(
            f"{str(folder)!r} has its weights as a pickle ({', '.join(pickles[:3])}), which could run code and is not "
            "read: save it again as safetensors, as transformers and peft do today (save_pretrained)"
        )
