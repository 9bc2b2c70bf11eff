"""Checkpoints: safetensors and JSON in a folder, nothing pickled.

agent.json              which agent, its config and environment, counters, random streams
model/                  the language model and tokenizer, as transformers saves them
value_head.safetensors, value_model/      the critic, where there is one
base/                   the model under a LoRA, only where it cannot be loaded again by name; model/ has the LoRA then
reference/              only where the reference cannot be loaded again by name
training.safetensors    the optimizer's moments and the sampler's generator
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


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
