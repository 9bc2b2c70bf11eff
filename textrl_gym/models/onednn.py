"""Linear layers by oneDNN, on processors where PyTorch's own matrix products use half of the machine.

On x86 PyTorch multiplies float32 matrices by Intel's MKL, which uses AVX-512 on Intel's processors only. oneDNN, which
comes with PyTorch too, uses it on any: on an AMD EPYC of 2025 it is 2.2 times as fast (docs/performance.md). PyTorch
goes there by itself for bfloat16 and not for float32; this module does for the linear layers of a model. The sums are
the same in another order.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

LEAST_PRODUCT = 2**20
"""Rows x inputs x outputs below which the call of oneDNN takes longer than the product."""


@functools.cache
def is_faster() -> bool:
    """Whether this processor has AVX-512 and is AMD's. A rule and no timing: the same machine always computes alike."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    cpus = Path("/proc/cpuinfo")
    return cpus.exists() and "AuthenticAMD" in cpus.read_text(encoding="utf-8")


class OneDNNLinear(nn.Linear):
    """A linear layer that goes by oneDNN inside `fast`, and is PyTorch's own outside."""

    def forward(self, input: Tensor) -> Tensor:
        # torch.compile reads no context variables, and its compiler takes that call of oneDNN from nobody but itself.
        if not torch.compiler.is_compiling() and _fast.get() and not _twice_differentiable.get():
            return linear(self, input)
        return super().forward(input)


# Context variables and no attributes: several models, and copies of one, may be in passes of different threads.
_fast = ContextVar("fast", default=False)
_twice_differentiable = ContextVar("twice_differentiable", default=False)


def prepare_(model: nn.Module) -> None:
    """Turn the plain linear layers of a model into OneDNNLinear, in place and once, where oneDNN is faster.

    Outside `fast` the model computes what it computed before, and its parameters, state_dict and copies are the same.
    """
    if not is_faster():
        return
    for module in model.modules():
        # Not subclasses: quantised layers and those of other libraries have a forward of their own.
        if type(module) is nn.Linear:
            # The class changes and the object stays, as in PyTorch's parametrize and fully_shard: tied weights, hooks
            # and whoever holds the layer (peft's base_layer, a classifier's score) see no difference.
            module.__class__ = OneDNNLinear


@contextlib.contextmanager
def fast() -> Iterator[None]:
    """Inside, prepared layers go by oneDNN in float32 on a CPU."""
    token = _fast.set(True)
    try:
        yield
    finally:
        _fast.reset(token)


@contextlib.contextmanager
def twice_differentiable() -> Iterator[None]:
    """Inside, gradients have gradients: those of `fast` layers and of PyTorch's fused attention have none."""
    token = _twice_differentiable.set(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        _twice_differentiable.reset(token)


def linear(module: nn.Linear, x: Tensor) -> Tensor:
    """x W^T + b of a linear layer, differentiable once."""
    weight, bias = module.weight, module.bias
    # Autocast would not see the call of oneDNN, and PyTorch goes there by itself for bfloat16.
    suits = x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    if not suits or x.numel() * weight.shape[0] < LEAST_PRODUCT:
        return nn.functional.linear(x, weight, bias)
    # The call of oneDNN has no derivative in PyTorch.
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _Linear.apply(x, weight, bias)
    return _product(x.contiguous(), weight, bias)


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a b^T + bias, by the function that torch.compile uses for linear layers on a CPU."""
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    """dL/dx = dL/dy W;  dL/dW = (dL/dy)^T x;  dL/db = the sum of dL/dy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad_NO = grad.reshape(-1, grad.shape[-1]).contiguous()  # a sum's gradient is one number, expanded
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            _product(grad_NO, weight.t()).view(x.shape) if of_x else None,
            _product(grad_NO.t(), x.view(-1, x.shape[-1]).t()) if of_weight else None,
            grad_NO.sum(0) if of_bias else None,
        )
