"""Attention over a shared prompt and over a row's own tokens by PyTorch's fused kernels, which keep no scores.

A fused kernel (flash attention, Dao et al. 2022, arXiv:2205.14135) returns the output and the log-sum-exp of its
scores. Two parts of the keys are attended apart and merged by them: out = sum of exp(lse_part - lse) out_part. Of the
softmax, the backward pass needs lse and the output only (its algorithm 4). With those of the merged attention each
part's kernel gives the exact gradients of its own keys and values, and its share of the queries' gradient.

Shape legend: B rows, H query heads, K key-value heads, R = H / K, T queries, P prompt positions, S = T own positions, D
head width, U prompts, G rows of the largest group, M = G R T, N keys of a part. Parts are [B, H, T, D] with N = T or
[U, K, M, D] with N = P.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

HIDDEN = -1e30
"""A score far below any real one. Finite: of a row of -inf only (left padding) a kernel makes NaN."""


class Part(NamedTuple):
    """What a kernel attends to: queries, keys and values of one head count, contiguous."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None
    """[U, 1, 1, N], added to the scores of all queries alike; None: nothing is hidden."""
    causal: bool
    scale: float


class Kernel(NamedTuple):
    """Fused attention of one kind of device."""

    forward: Callable[[Part], tuple[Tensor, Tensor, tuple[Any, ...]]]
    """out [*, T, D], lse float32 [*, T], and what the kernel wants back."""
    backward: Callable[[Part, Tensor, Tensor, Tensor, tuple[Any, ...]], tuple[Tensor, Tensor, Tensor]]
    """The gradients of query, key and value, of: grad of the output, output, lse, and what it wanted back."""
    least_positions: int = 0
    """Prompts from which on it is no slower than plain products."""


class Groups(Protocol):
    """Which prompt each row goes on from: a Prefix."""

    def to_groups(self, tensor: Tensor, key_heads: int) -> Tensor: ...
    def to_rows(self, grouped: Tensor, heads: int) -> Tensor: ...


# -- kernels ----------------------------------------------------------------------------------------------------------

_aten = torch.ops.aten


def _cpu_forward(part: Part) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    mask = None if part.bias is None else part.bias.to(part.query.dtype)
    out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
        part.query, part.key, part.value, 0.0, part.causal, attn_mask=mask, scale=part.scale
    )
    return out, lse, ()


def _cpu_backward(
    part: Part, grad: Tensor, out: Tensor, lse: Tensor, rest: tuple[Any, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    mask = None if part.bias is None else part.bias.to(part.query.dtype)
    return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, part.query, part.key, part.value, out, lse, 0.0, part.causal, attn_mask=mask, scale=part.scale
    )


def _by_flash(part: Part) -> bool:
    # Flash attention takes no bias and no float32; the memory-efficient kernel takes both, and is slower.
    return part.bias is None and part.query.dtype in (torch.float16, torch.bfloat16)


def _cuda_bias(part: Part) -> Tensor | None:
    """The bias as the memory-efficient kernel reads it: at every query, rows aligned to 16 numbers."""
    if part.bias is None:
        return None
    keys = part.bias.shape[-1]
    padded = torch.nn.functional.pad(part.bias.to(part.query.dtype), (0, -keys % 16))
    return padded.narrow(-1, 0, keys).expand(*part.query.shape[:3], keys)


def _cuda_forward(part: Part) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    query, key, value = part.query, part.key, part.value
    if _by_flash(part):
        out, lse, *rest = _aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, part.causal, False, scale=part.scale
        )
        return out, lse, tuple(rest[:6])
    out, lse, *rest = _aten._scaled_dot_product_efficient_attention(
        query, key, value, _cuda_bias(part), True, 0.0, part.causal, scale=part.scale
    )
    return out, lse.narrow(-1, 0, query.shape[2]), tuple(rest)


def _cuda_backward(
    part: Part, grad: Tensor, out: Tensor, lse: Tensor, rest: tuple[Any, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    given = (grad, part.query, part.key, part.value)
    if _by_flash(part):
        *cumulative, seed, offset = rest
        return _aten._scaled_dot_product_flash_attention_backward(
            *given, out, lse, *cumulative, 0.0, part.causal, seed, offset, scale=part.scale
        )
    # This kernel reads lse in blocks of 32 queries, and wants infinity beyond the last.
    blocks = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=float("inf"))
    gradients = _aten._scaled_dot_product_efficient_attention_backward(
        *given, _cuda_bias(part), out, blocks, *rest, 0.0, [True, True, True, False], part.causal, scale=part.scale
    )
    return gradients[0], gradients[1], gradients[2]


KERNELS = {
    # Measured on an AMD EPYC with heads of 32 and 64: 0.7 to 1.2 times as fast at 32 positions, 1.0 to 1.3 times at
    # 128, 1.1 to 2.5 times at 350 (docs/performance.md). A rule and no timing, so that results do not vary.
    "cpu": Kernel(_cpu_forward, _cpu_backward, least_positions=128),
    "cuda": Kernel(_cuda_forward, _cuda_backward),
}
"""By the kind of device."""


# -- two parts --------------------------------------------------------------------------------------------------------


class _TwoParts(torch.autograd.Function):
    """Attention over own and prompt keys: forward merges by the log-sum-exps, backward gives each kernel the merged."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prompt_key: Tensor,
        prompt_value: Tensor,
        kernel: Kernel,
        groups: Groups,
        bias: Tensor | None,
        scale: float,
    ) -> Tensor:
        heads, key_heads = query.shape[1], key.shape[1]
        own = Part(query, _repeated(key, heads), _repeated(value, heads), None, True, scale)
        prompt = Part(groups.to_groups(query, key_heads), prompt_key, prompt_value, bias, False, scale)
        own_out, own_lse, own_rest = kernel.forward(own)
        prompt_out, prompt_lse, prompt_rest = kernel.forward(prompt)
        prompt_out = groups.to_rows(prompt_out, heads)
        prompt_lse = groups.to_rows(prompt_lse[..., None], heads).squeeze(-1)
        lse = torch.logaddexp(own_lse, prompt_lse)
        out = own_out * (own_lse - lse).exp()[..., None] + prompt_out * (prompt_lse - lse).exp()[..., None]
        if out.dtype != query.dtype:  # the weights are float32
            # Only where it changes something: compiled by PyTorch 2.11, a `to` that changes nothing lost all gradients.
            out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, prompt_key, prompt_value, bias, out, lse)
        ctx.kernel, ctx.groups, ctx.scale, ctx.rest = kernel, groups, scale, (own_rest, prompt_rest)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, prompt_key, prompt_value, bias, out, lse = ctx.saved_tensors
        kernel, groups, scale, (own_rest, prompt_rest) = ctx.kernel, ctx.groups, ctx.scale, ctx.rest
        heads, key_heads = query.shape[1], key.shape[1]
        grad = grad.contiguous()

        own = Part(query, _repeated(key, heads), _repeated(value, heads), None, True, scale)
        own_query, own_key, own_value = kernel.backward(own, grad, out, lse, own_rest)

        grouped = functools.partial(groups.to_groups, key_heads=key_heads)
        prompt = Part(grouped(query), prompt_key, prompt_value, bias, False, scale)
        prompt_lse = grouped(lse[..., None]).squeeze(-1)
        of_prompt = kernel.backward(prompt, grouped(grad), grouped(out), prompt_lse, prompt_rest)
        return (
            own_query + groups.to_rows(of_prompt[0], heads),
            own_key.unflatten(1, (key_heads, -1)).sum(2),
            own_value.unflatten(1, (key_heads, -1)).sum(2),
            *of_prompt[1:],
            *[None] * 4,
        )


def _repeated(tensor: Tensor, heads: int) -> Tensor:
    """[B, K, S, D] to [B, H, S, D]: each key-value head stands once for each of its query heads."""
    return tensor.repeat_interleave(heads // tensor.shape[1], 1) if tensor.shape[1] < heads else tensor.contiguous()


def attend(
    kernel: Kernel,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    groups: Groups,
    mask_UP: Tensor | None,
    scale: float,
) -> Tensor:
    """Causal attention of rows over their own positions, and over all of their prompt.

    Differentiable once.

    Args:
        kernel: of the tensors' device.
        query: [B, H, T, D].
        key, value: [B, K, T, D].
        prompt_key, prompt_value: [U, K, P, D].
        mask_UP: bool, which prompt positions there are; None: all.
        scale: of the scores.

    Returns:
        [B, H, T, D] in the type of the values.
    """
    # Under autocast rotary positions leave queries and keys in float32, where values are bfloat16.
    query, key, prompt_key = (x.to(value.dtype).contiguous() for x in (query, key, prompt_key))
    bias = None
    if mask_UP is not None:
        bias = torch.where(mask_UP, 0.0, HIDDEN)[:, None, None, :]
    return cast(
        "Tensor",
        _TwoParts.apply(
            query, key, value.contiguous(), prompt_key, prompt_value.contiguous(), kernel, groups, bias, scale
        ),
    )
