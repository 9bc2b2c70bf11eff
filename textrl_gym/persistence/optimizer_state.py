"""The optimizer's state in a safetensors file, with other tensors beside it."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def save_optimizer(path: Path, optimizer: torch.optim.Optimizer, extra: dict[str, Tensor]) -> None:
    """Write the optimizer's state tensors by parameter number, with other tensors beside them."""
    tensors = {f"extra.{name}": tensor.contiguous() for name, tensor in extra.items()}
    for number, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            # Adam's step count is a number in older versions of PyTorch, and safetensors holds tensors only.
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
