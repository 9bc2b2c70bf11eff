"""The optimizer's state: in a safetensors file with other tensors beside it, and handed to another optimizer."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from textrl_gym import processes


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by parameter number; of one that is sharded, gathered on the first process alone.

    All processes of a run call it: each has a part of the moments.
    """
    tensors: dict[str, Tensor] = {}
    for number, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            # Adam's step count is a number in older versions of PyTorch, and safetensors holds tensors only.
            whole = processes.whole(torch.as_tensor(value)).contiguous()
            if processes.is_first():
                tensors[f"optimizer.{number}.{name}"] = whole
    return tensors


def save_tensors(path: Path, optimizer: dict[str, Tensor], extra: dict[str, Tensor]) -> None:
    """Write what `optimizer_tensors` gave, with other tensors beside it."""
    save_file(optimizer | {f"extra.{name}": tensor.contiguous() for name, tensor in extra.items()}, path)


def load_optimizer(path: Path, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Restore what save_tensors wrote; returns the other tensors."""
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


def with_moments(new: torch.optim.Optimizer, old: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The new optimizer with the old one's moments, cut or gathered as the new one's parameters are."""
    pairs = zip(_parameters(new), _parameters(old), strict=True)
    for p, before in pairs:
        for name, value in old.state.get(before, {}).items():
            is_moment = torch.is_tensor(value) and value.ndim
            new.state[p][name] = processes.like(p, processes.whole(value)) if is_moment else value
    return new


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
