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
    prompts, _, places, _ = prompt_key.shape

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

    # 2. The rows' own places, each row apart.
    own_query = query.view(rows, key_heads, repeats, new, width)
    mine = _attend(own_query, key[:, :, None], value[:, :, None], own_hidden_TS, scale, softcap)

    # 3. The prompts, all rows of a group at once.
    grouped = query if prefix.slot_UG is None else query[prefix.slot_UG.flatten()]
    group = len(grouped) // prompts
    grouped = grouped.view(prompts, group, key_heads, repeats, new, width).permute(0, 2, 1, 3, 4, 5)
    grouped = grouped.reshape(prompts, key_heads, group * repeats * new, width)
    if prompt_hidden.shape[3] > 1:  # what is hidden differs from query to query
        prompt_hidden = prompt_hidden.expand(-1, -1, group * repeats, -1, -1)
    theirs = _attend(grouped, prompt_key, prompt_value, prompt_hidden.flatten(2, 3), scale, softcap)

    def back(tensor: Tensor) -> Tensor:
        """[U, K, G R T, *] to [B, K, R, T, *]."""
        spread = tensor.view(prompts, key_heads, group, repeats, new, -1).permute(0, 2, 1, 3, 4, 5)
        flat = spread.reshape(prompts * group, key_heads, repeats, new, -1)
        return flat if prefix.place_B is None else flat[prefix.place_B]

    # 4. One softmax of the two.
    prompt_top = back(theirs.top)
    top = torch.maximum(mine.top, prompt_top)
    own_weight, prompt_weight = (mine.top - top).exp(), (prompt_top - top).exp()
    total = own_weight * mine.total + prompt_weight * back(theirs.total)
    out = mine.out * (own_weight / total).to(value.dtype) + back(theirs.out) * (prompt_weight / total).to(value.dtype)
    return out.reshape(rows, heads, new, width).transpose(1, 2), None


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
