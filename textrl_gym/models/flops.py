"""Counting floating-point operations: PyTorch's counter, which also knows this project's linear layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def counter() -> FlopCounterMode:
    """A context in which the matrix products of all models are counted; see its get_total_flops()."""
    return FlopCounterMode(display=False, custom_mapping={torch.ops.mkldnn._linear_pointwise: _linear_flop})


def _linear_flop(x_shape: Sequence[int], weight_shape: Sequence[int], *_: Any, **__: Any) -> int:
    """Of textrl_gym.models.onednn, which PyTorch's counter does not know."""
    return 2 * math.prod(x_shape) * weight_shape[0]
