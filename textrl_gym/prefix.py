"""Group-prefix attention: the prompt of a group is attended once for all its completions.

transformers lets an attention function be registered by name. This one reads the keys and values of U prompts where
they stand, once for each prompt: the queries of a prompt's G rows go through one matrix product with them, the rows'
own completions through another, and the two softmaxes are merged by their normalisers (as in Hydragen, Juravsky et al.
2024, arXiv:2402.05099, and cascade inference). No copy of a prompt's cache is made for its rows, in sampling or in
training, and gradients flow into the prompt through all of them. It is plain differentiable PyTorch, and the same for
rotary and learned positions, grouped-query attention, sliding windows and capped logits.

Shape legend: U prompts, P prompt places, G rows of the largest group, B rows, T new places, S own places so far (in
training S = T), H query heads, K key-value heads, R = H / K, D head width, W T or more preallocated places.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin

NAME = "textrl_gym_prefix"
LAYERS = frozenset({"full_attention", "sliding_attention"})
"""Kinds of layers, by transformers' names, that this attention knows."""


@dataclass
class Prefix:
    """Prompts that have been computed, and which rows go on from which."""

    keys: list[Tensor]
    """One [U, K, P, D] for each layer."""
    values: list[Tensor]
    mask_UP: Tensor
    """bool, left-padded."""
    source_B: Tensor
    """int64: row b goes on from prompt source_B[b]."""
    slot_UG: Tensor | None
    """int64: the rows of each prompt, a short group filled up with row 0; None: row u * G + g is group u's g-th."""
    place_B: Tensor | None
    """int64: where row b stands in slot_UG, flattened."""
    written: Tensor | None = None
    """int64 [1], for decoding at fixed shapes: so many own places are written, and the rest of S is yet to come."""

    @staticmethod
    def of(cache: DynamicCache, mask_UP: Tensor, source_B: Tensor) -> Prefix:
        """The prompts in a cache."""
        layers: Any = cache.layers
        keys, values = [layer.keys for layer in layers], [layer.values for layer in layers]
        return Prefix(keys, values, mask_UP, source_B, *_slots(source_B, len(mask_UP)))

    @property
    def positions(self) -> Tensor:
        """The position of each row's first own token, int64 [B, 1]."""
        return self.mask_UP.sum(1)[self.source_B][:, None]

    @property
    def group(self) -> int:
        """G."""
        return len(self.source_B) // len(self.mask_UP) if self.slot_UG is None else self.slot_UG.shape[1]

    def to_groups(self, tensor: Tensor, key_heads: int, fill: float | None = None) -> Tensor:
        """[B, H, T, *] to [U, K, G R T, *]: what goes through one product with a prompt's keys.

        Args:
            fill: what stands in the places that only fill up a group; None: row 0.
        """
        _, heads, new, width = tensor.shape
        prompts, repeats = len(self.mask_UP), heads // key_heads
        if self.slot_UG is not None and self.place_B is not None:
            if fill is None:
                tensor = tensor[self.slot_UG.flatten()]
            else:
                filled = tensor.new_full((self.slot_UG.numel(), heads, new, width), fill)
                tensor = filled.index_copy_(0, self.place_B, tensor)
        grouped = tensor.reshape(prompts, self.group, key_heads, repeats, new, width).permute(0, 2, 1, 3, 4, 5)
        return grouped.reshape(prompts, key_heads, self.group * repeats * new, width)

    def to_rows(self, grouped: Tensor, heads: int) -> Tensor:
        """[U, K, G R T, *] to [B, H, T, *], which `to_groups` came from."""
        prompts, key_heads, _, width = grouped.shape
        spread = grouped.view(prompts, key_heads, self.group, heads // key_heads, -1, width).permute(0, 2, 1, 3, 4, 5)
        flat = spread.reshape(prompts * self.group, heads, -1, width)
        return flat if self.place_B is None else flat[self.place_B]

    def bias(self, grouped: Tensor) -> Tensor:
        """What is added to scores so that a prompt's padding is not looked at, broadcast to [U, 1, G R T, P]."""
        hidden_U11P = ~self.mask_UP[:, None, None, :]
        zeros = torch.zeros(hidden_U11P.shape, dtype=grouped.dtype, device=grouped.device)
        return zeros.masked_fill_(hidden_U11P, -1e30).expand(-1, -1, grouped.shape[2], -1)

    def keep(self, keep_b: Tensor) -> None:
        """Go on with some of the rows, in order. Prompts without rows are dropped when they are a quarter or more."""
        self.source_B = self.source_B[keep_b]
        used_u, renumbered_b = self.source_B.unique(return_inverse=True)
        if len(used_u) <= 0.75 * len(self.mask_UP):
            self.keys = [key[used_u] for key in self.keys]
            self.values = [value[used_u] for value in self.values]
            self.mask_UP, self.source_B = self.mask_UP[used_u], renumbered_b
        self.slot_UG, self.place_B = _slots(self.source_B, len(self.mask_UP))


def _slots(source_B: Tensor, prompts: int) -> tuple[Tensor | None, Tensor | None]:
    """slot_UG and place_B of a Prefix; None and None where groups of the same size stand in the prompts' order."""
    rows = torch.arange(len(source_B), device=source_B.device)
    count_U = torch.bincount(source_B, minlength=prompts)
    most = int(count_U.max())
    sorted_B, order_B = source_B.sort(stable=True)
    if prompts * most == len(source_B) and torch.equal(order_B, rows):
        return None, None
    rank_B = rows - (count_U.cumsum(0) - count_U)[sorted_B]  # of the sorted rows within their groups
    place_B = torch.empty_like(rows).index_copy_(0, order_B, sorted_B * most + rank_B)
    slot_X = rows.new_zeros(prompts * most).index_copy_(0, place_B, rows)
    return slot_X.view(prompts, most), place_B


_active: ContextVar[Prefix | None] = ContextVar("prefix", default=None)


# -- attention --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """Attention over some of the keys, before division by its normaliser."""

    out: Tensor
    """sum_k exp(score_k - top) value_k."""
    total: Tensor
    """sum_k exp(score_k - top), float32."""
    top: Tensor
    """The largest score, without gradient: it cancels."""


def _attend(
    query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None, scaling: float, cap: float | None
) -> _Part:
    """Queries [..., N, D] against keys [..., S, D]; `hidden` (bool, broadcast to [..., N, S]) is not looked at."""
    score = (query * scaling) @ key.transpose(-1, -2)
    if cap is not None:
        score = cap * torch.tanh(score / cap)
    score = score.float() if score.dtype in (torch.float16, torch.bfloat16) else score
    if hidden is not None:
        # Finite: a row that sees nothing here has weight exp(-1e30 - top of the other part) = 0, and no NaN.
        score = score.masked_fill(hidden, -1e30)
    top = score.detach().amax(-1, keepdim=True)
    weight = (score - top).exp()
    return _Part(weight.to(value.dtype) @ value, weight.sum(-1, keepdim=True), top)


def prefix_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The registered attention function: own keys and values as given, the prompts' from the active Prefix.

    Args:
        query: [B, H, T, D].
        key, value: [B, K, S, D], the rows' own places, of which the last T are the queries'.

    Returns:
        [B, T, H, D] and no weights.

    Raises:
        NotImplementedError: an argument of this model family that is not known here (attention sinks, biases).
    """
    prefix = _active.get()
    assert prefix is not None, "group-prefix attention outside `attached`"
    unknown = [name for name in ("s_aux", "position_bias", "indices") if others.get(name) is not None]
    if unknown:
        raise NotImplementedError(f"attention arguments {unknown}")
    rows, heads, new, width = query.shape
    key_heads, own = key.shape[1:3]
    repeats = heads // key_heads
    scale = width**-0.5 if scaling is None else scaling
    prompt_key, prompt_value = prefix.keys[module.layer_idx], prefix.values[module.layer_idx]
    places = prompt_key.shape[2]

    # 1. What a query cannot see: later places of its own, the prompt's padding, what lies behind a sliding window.
    at_T = torch.arange(own - new, own, device=query.device)
    if prefix.written is not None:
        at_T = prefix.written + torch.arange(new, device=query.device)
    ahead_TS = at_T[:, None] - torch.arange(own, device=query.device)
    own_hidden_TS = ahead_TS < 0 if new > 1 or prefix.written is not None else None
    prompt_hidden = ~prefix.mask_UP[:, None, None, None, :]
    if sliding_window is not None and own + places > sliding_window:
        own_hidden_TS = (ahead_TS < 0) | (ahead_TS >= sliding_window)
        behind_TP = at_T[:, None] + places - torch.arange(places, device=query.device)
        prompt_hidden = prompt_hidden | (behind_TP >= sliding_window)

    # 2. Many queries at once on a CPU: PyTorch's flash kernel, which keeps no scores.
    if new > 1 and query.device.type == "cpu" and sliding_window is None and softcap is None:
        key, value = (tensor.repeat_interleave(repeats, 1) if repeats > 1 else tensor for tensor in (key, value))
        out = _FlashMerge.apply(query, key, value, prompt_key, prompt_value, prefix, scale)
        return out.transpose(1, 2), None

    # 3. Else plain products. The rows' own places, each row apart.
    own_query = query.view(rows, key_heads, repeats, new, width)
    mine = _attend(own_query, key[:, :, None], value[:, :, None], own_hidden_TS, scale, softcap)

    # 4. The prompts, all rows of a group at once.
    if prompt_hidden.shape[3] > 1:  # what is hidden differs from query to query
        prompt_hidden = prompt_hidden.expand(-1, -1, prefix.group * repeats, -1, -1)
    grouped = prefix.to_groups(query, key_heads)
    theirs = _attend(grouped, prompt_key, prompt_value, prompt_hidden.flatten(2, 3), scale, softcap)

    def back(tensor: Tensor) -> Tensor:
        return prefix.to_rows(tensor, heads).view(rows, key_heads, repeats, new, -1)

    # 5. One softmax of the two.
    prompt_top = back(theirs.top)
    top = torch.maximum(mine.top, prompt_top)
    own_weight, prompt_weight = (mine.top - top).exp(), (prompt_top - top).exp()
    total = own_weight * mine.total + prompt_weight * back(theirs.total)
    out = mine.out * (own_weight / total).to(value.dtype) + back(theirs.out) * (prompt_weight / total).to(value.dtype)
    return out.reshape(rows, heads, new, width).transpose(1, 2), None


class _FlashMerge(torch.autograd.Function):
    """The same by PyTorch's flash kernel for CPUs, which gives each part's log-sum-exp.

    Backwards, a part's kernel that is given the merged output and the merged log-sum-exp computes its share of the
    gradient of the whole softmax, as in ring attention (Liu et al. 2023, arXiv:2310.01889): no scores are kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prompt_key: Tensor,
        prompt_value: Tensor,
        prefix: Prefix,
        scale: float,
    ) -> Tensor:
        """query, key, value [B, H, T, D]; prompt_key, prompt_value [U, K, P, D]; returns [B, H, T, D]."""
        heads, key_heads = query.shape[1], prompt_key.shape[1]
        own_out, own_lse = _flash(query, key, value, is_causal=True, scale=scale)
        grouped = prefix.to_groups(query, key_heads)
        prompt_out, prompt_lse = _flash(grouped, prompt_key, prompt_value, attn_mask=prefix.bias(grouped), scale=scale)
        prompt_out = prefix.to_rows(prompt_out, heads)
        prompt_lse = prefix.to_rows(prompt_lse[..., None], heads)
        own_lse = own_lse[..., None]
        lse = torch.logaddexp(own_lse, prompt_lse)
        out = own_out * (own_lse - lse).exp().to(value.dtype) + prompt_out * (prompt_lse - lse).exp().to(value.dtype)
        ctx.save_for_backward(query, key, value, prompt_key, prompt_value, out, lse)
        ctx.prefix, ctx.scale = prefix, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        query, key, value, prompt_key, prompt_value, out, lse = ctx.saved_tensors
        prefix, heads, key_heads = ctx.prefix, query.shape[1], prompt_key.shape[1]
        grad = grad.contiguous()
        own = _flash_backward(grad, query, key, value, out, lse[..., 0], 0.0, True, scale=ctx.scale)
        grouped = prefix.to_groups(query, key_heads)
        prompt = _flash_backward(
            prefix.to_groups(grad, key_heads, fill=0.0),  # rows that only fill up a group have no gradient
            grouped,
            prompt_key,
            prompt_value,
            prefix.to_groups(out, key_heads),
            prefix.to_groups(lse, key_heads)[..., 0],
            0.0,
            False,
            attn_mask=prefix.bias(grouped),
            scale=ctx.scale,
        )
        return own[0] + prefix.to_rows(prompt[0], heads), own[1], own[2], prompt[1], prompt[2], None, None


_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


AttentionInterface.register(NAME, prefix_attention)


# -- the rows' own cache ----------------------------------------------------------------------------------------------


class _OwnLayer(CacheLayerMixin):
    """Keys and values of the rows' own tokens in preallocated tensors [B, K, W, D]; `length` of them are written.

    With `written` (int64 [1], on the device) the next place is read from there and all W places are handed out, so that
    no shape changes from step to step.
    """

    is_sliding = False

    def __init__(self, places: int, written: Tensor | None) -> None:
        super().__init__()
        self.places, self.length, self.written = places, 0, written

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        rows, heads, _, width = key_states.shape
        self.keys = key_states.new_zeros(rows, heads, self.places, width)
        self.values = value_states.new_zeros(rows, heads, self.places, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        if self.written is not None:
            self.keys.index_copy_(2, self.written, key_states)
            self.values.index_copy_(2, self.written, value_states)
            return self.keys, self.values
        end = self.length + key_states.shape[2]
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only what is written is copied."""
        if not self.is_initialized:
            return
        end = self.places if self.written is not None else self.length
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros(len(indices), *old.shape[1:])
            new[:, :, :end] = old[indices, :, :end]
            setattr(self, name, new)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.places


def own_cache(layers: int, places: int, written: Tensor | None = None) -> Cache:
    """An empty cache for at most `places` tokens of each row."""
    return Cache(layers=[_OwnLayer(places, written) for _ in range(layers)])


# -- models -----------------------------------------------------------------------------------------------------------


def configs(model: Any) -> list[PreTrainedConfig]:
    """The configurations from which the model's parts read the name of their attention function."""
    found = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    return [config for config in found.values() if isinstance(config, PreTrainedConfig)]


@contextlib.contextmanager
def attached(configs: Sequence[PreTrainedConfig], prefix: Prefix) -> Iterator[None]:
    """Inside, attention is this one and goes on from these prompts; afterwards it is as before."""
    before = [config._attn_implementation for config in configs]
    token = _active.set(prefix)
    try:
        for config in configs:
            config._attn_implementation = NAME
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name
        _active.reset(token)
