"""Counting floating-point operations: PyTorch's counter, which also knows this project's linear layers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode


def counter() -> FlopCounterMode:
    """A context in which the matrix products of all models are counted; see its get_total_flops()."""
    # The counter knows PyTorch's own products only: where models.onednn is in use, linear layers would
    # count as nothing.
    return FlopCounterMode(display=False, custom_mapping={torch.ops.mkldnn._linear_pointwise: _linear_flop})


def _linear_flop(x_shape: Sequence[int], weight_shape: Sequence[int], *_: object, **__: object) -> int:
    """Of textrl_gym.models.onednn, which PyTorch's counter does not know."""
    return 2 * math.prod(x_shape) * weight_shape[0]
