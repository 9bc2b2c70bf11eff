"""Checkpoints: safetensors and JSON in a folder, nothing pickled.

agent.json              which agent, its config and environment, counters, random streams
model/                  the language model and tokenizer, as transformers saves them
value_head.safetensors, value_model/      the critic, where there is one
base/                   the model under a LoRA, only where it cannot be loaded again by name; model/ has the LoRA then
reference/              only where the reference cannot be loaded again by name
training.safetensors    the optimizer's moments and the sampler's generator
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

STATE_FILE = "agent.json"


def write(folder: str | Path, fill: Any) -> None:
    """Fill a new folder by `fill(path)` and put it in place, so that a crash at any moment leaves a whole checkpoint.

    Until the new folder is full the old checkpoint stands; from then on the new one counts, and whoever reads it
    finishes moving it. What else lies in the folder (logs, a report) stays.
    """
    final = Path(folder)
    final.parent.mkdir(parents=True, exist_ok=True)
    finish(final)
    fresh = final.with_name(f".{final.name}.{os.getpid()}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    fill(fresh)
    os.replace(fresh, _whole(final))
    finish(final)


def _whole(final: Path) -> Path:
    """Where a checkpoint stands from when it is complete until it is moved."""
    return final.with_name(f".{final.name}.whole")


def finish(folder: str | Path) -> None:
    """Move a complete checkpoint into place, where a crash has left one."""
    final = Path(folder)
    whole = _whole(final)
    if not whole.is_dir():
        return
    final.mkdir(exist_ok=True)
    for item in whole.iterdir():
        target = final / item.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(item, target)
    whole.rmdir()


def read_state(folder: str | Path) -> dict[str, Any]:
    """The JSON part of a checkpoint.

    Raises:
        ValueError: the folder holds no checkpoint.
    """
    finish(folder)
    path = Path(folder) / STATE_FILE
    if not path.is_file():
        raise ValueError(f"{str(folder)!r} is no saved agent: it holds no {STATE_FILE}")
    return json.loads(path.read_text(encoding="utf-8"))


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Write the JSON part of a checkpoint."""
    (folder / STATE_FILE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")


def save_optimizer(path: Path, optimizer: torch.optim.Optimizer, extra: dict[str, Tensor]) -> None:
    """The optimizer's state tensors by parameter number, with other tensors beside them."""
    tensors = {f"extra.{name}": tensor.contiguous() for name, tensor in extra.items()}
    for number, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            tensors[f"optimizer.{number}.{name}"] = torch.as_tensor(value).contiguous()
    save_file(tensors, path)


def load_optimizer(path: Path, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Restore what save_optimizer wrote; returns the other tensors."""
    state: dict[int, dict[str, Tensor]] = {}
    extra: dict[str, Tensor] = {}
    for key, tensor in load_file(path).items():
        kind, _, rest = key.partition(".")
        if kind == "extra":
            extra[rest] = tensor
        else:
            number, _, name = rest.partition(".")
            state.setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return extra


def jsonable(value: Any) -> bool:
    """Whether a setting can be written down and read back."""
    try:
        return json.loads(json.dumps(value)) == (list(value) if isinstance(value, tuple) else value)
    except TypeError:
        return False
