"""Counting floating-point operations: PyTorch's counter, which also knows oneDNN's layers and attention on a CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode


def counter() -> FlopCounterMode:
    """A context in which the matrix products of all models are counted; see its get_total_flops()."""
    # The counter knows PyTorch's own products, and fused attention on a GPU: where models.onednn is in use, linear
    # layers would count as nothing, and so would fused attention on a CPU.
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    mapping = {
        torch.ops.mkldnn._linear_pointwise: _linear_flop,
        attention: _attention_flop,
        attention_backward: _attention_backward_flop,
    }
    return FlopCounterMode(display=False, custom_mapping=mapping)


def _linear_flop(x_shape: Sequence[int], weight_shape: Sequence[int], *_: object, **__: object) -> int:
    """Of textrl_gym.models.onednn, which PyTorch's counter does not know."""
    return 2 * math.prod(x_shape) * weight_shape[0]


def _attention_flop(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: object, **__: object) -> int:
    """Two products, of the whole square: a causal one does half of it, which PyTorch's counter does not know either."""
    # Not PyTorch's own function: that of 2.11 refuses keys of fewer heads than queries.
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _attention_backward_flop(
    grad: Sequence[int], query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: object, **__: object
) -> int:
    """Five: the scores again, and the gradients of the scores' shares, of values, keys and queries."""
    return 2 * math.prod(query[:-1]) * key[-2] * (3 * query[-1] + 2 * value[-1])
