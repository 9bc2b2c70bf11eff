"""Group-prefix attention: the prompt of a group is attended once for all its completions.

transformers lets an attention function be registered by name. This one reads the keys and values of U prompts where
they stand, once for each prompt: the queries of a prompt's G rows go through one matrix product with them, the rows'
own completions through another, and one softmax spans both (as in Hydragen, Juravsky et al. 2024, arXiv:2402.05099, and
cascade inference). No copy of a prompt's cache is made for its rows, in sampling or in training, and gradients flow
into the prompt through all of them. It is plain differentiable PyTorch, the same for rotary and learned positions,
grouped-query attention, sliding windows and capped logits. Teacher-forced passes, which would keep the scores for the
backward pass, go by PyTorch's fused kernels where these do the same (policy.attention_kernels).

Shape legend: U prompts, P prompt positions, G rows of the largest group, B rows, T new positions, S own positions so
far (in training S = T), H query heads, K key-value heads, R = H / K, D head width, W T or more preallocated positions.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, Cache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin

from textrl_gym.policy import attention_kernels
from textrl_gym.policy.attention_kernels import HIDDEN, Kernel, attend

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
    filled_UG: Tensor | None
    """bool: which places of the groups have a row; None: all."""
    place_B: Tensor | None
    """int64: where row b stands among the U * G rows of all groups; None: row u * G + g is group u's g-th."""
    padded: bool
    """Whether any prompt is shorter than P."""
    written: Tensor | None = None
    """int64 [1], for decoding at fixed shapes: so many own positions are written, and the rest of S is yet to come."""

    @staticmethod
    def of(keys: list[Tensor], values: list[Tensor], mask_UP: Tensor, source_B: Tensor) -> Prefix:
        """The prompts of which these are the keys and values."""
        return Prefix(keys, values, mask_UP, source_B, *_slots(source_B, len(mask_UP)), not bool(mask_UP.all()))

    @property
    def places(self) -> int:
        """P."""
        return self.mask_UP.shape[1]

    @property
    def positions(self) -> Tensor:
        """The position of each row's first own token, int64 [B, 1]."""
        return self.mask_UP.sum(1)[self.source_B][:, None]

    @property
    def group(self) -> int:
        """G."""
        # Of shapes and no field of its own: for each new number torch.compile would compile anew.
        return len(self.source_B) // len(self.mask_UP) if self.filled_UG is None else self.filled_UG.shape[1]

    def to_groups(self, tensor: Tensor, key_heads: int) -> Tensor:
        """[B, H, T, *] to [U, K, G R T, *], which one product with a prompt's keys takes; short groups get zeros."""
        _, heads, new, width = tensor.shape
        prompts, repeats = len(self.mask_UP), heads // key_heads
        if self.place_B is not None:
            # Zeros and not some row again: what is done with a gradient here must add nothing.
            filled = tensor.new_zeros(prompts * self.group, heads, new, width)
            tensor = filled.index_copy(0, self.place_B, tensor)
        grouped = tensor.reshape(prompts, self.group, key_heads, repeats, new, width).permute(0, 2, 1, 3, 4, 5)
        return grouped.reshape(prompts, key_heads, self.group * repeats * new, width)

    def to_rows(self, grouped: Tensor, heads: int) -> Tensor:
        """[U, K, G R T, *] to [B, H, T, *], which `to_groups` came from."""
        prompts, key_heads, _, width = grouped.shape
        spread = grouped.view(prompts, key_heads, self.group, heads // key_heads, -1, width).permute(0, 2, 1, 3, 4, 5)
        flat = spread.reshape(prompts * self.group, heads, -1, width)
        return flat if self.place_B is None else flat[self.place_B]

    def hidden(self, new: int, own: int, sliding_window: int | None) -> Tensor | None:
        """What the last `new` of `own` positions do not see: bool, broadcasts to [U, K, G R, T, P + S]; None: none."""
        device, places = self.mask_UP.device, self.places
        if new == 1 and not self.padded and self.written is None and sliding_window is None:
            return None
        at_T = torch.arange(own - new, own, device=device)
        if self.written is not None:
            at_T = self.written + torch.arange(new, device=device)
        ahead_TX = (at_T + places)[:, None] - torch.arange(places + own, device=device)  # X = P + S
        hidden_TX = ahead_TX < 0
        if sliding_window is not None:
            hidden_TX |= ahead_TX >= sliding_window
        if not self.padded:
            return hidden_TX
        return hidden_TX | torch.nn.functional.pad(~self.mask_UP, (0, own))[:, None, None, None, :]

    def keep(self, keep_b: Tensor) -> None:
        """Go on with some of the rows, in order. Prompts without rows are dropped when they are a quarter or more."""
        self.source_B = self.source_B[keep_b]
        used_u, renumbered_b = self.source_B.unique(return_inverse=True)
        # Copying the keys and values of the rest costs more than reading a few prompts too many.
        if len(used_u) <= 0.75 * len(self.mask_UP):
            self.keys = [key[used_u] for key in self.keys]
            self.values = [value[used_u] for value in self.values]
            self.mask_UP, self.source_B = self.mask_UP[used_u], renumbered_b
        self.filled_UG, self.place_B = _slots(self.source_B, len(self.mask_UP))


def _slots(source_B: Tensor, prompts: int) -> tuple[Tensor | None, Tensor | None]:
    """filled_UG and place_B of a Prefix; None where groups of the same size stand in the prompts' order."""
    rows = torch.arange(len(source_B), device=source_B.device)
    count_U = torch.bincount(source_B, minlength=prompts)
    most = int(count_U.max())
    # A stable sort keeps the rows of a group in order: then the usual batch (G rows a prompt) needs no gather at all.
    sorted_B, order_B = source_B.sort(stable=True)
    if prompts * most == len(source_B) and torch.equal(order_B, rows):
        return None, None
    rank_B = rows - (count_U.cumsum(0) - count_U)[sorted_B]  # of the sorted rows within their groups
    place_B = torch.empty_like(rows).index_copy_(0, order_B, sorted_B * most + rank_B)
    filled_UG = torch.arange(most, device=rows.device) < count_U[:, None]
    return filled_UG, place_B


class _Active(threading.local):
    """What `attached` has set, in each thread apart. (Not a ContextVar: torch.compile cannot read one.)"""

    def __init__(self) -> None:
        # Not a default of the class, which torch.compile of PyTorch 2.11 would take for the value.
        self.prefix: Prefix | None = None


_active = _Active()


# -- attention --------------------------------------------------------------------------------------------------------


def prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """The registered attention function: own keys and values as given, the prompts' from the active Prefix.

    Args:
        query: [B, H, T, D].
        key, value: [B, K, S, D], the rows' own positions, of which the last T are the queries'.

    Returns:
        [B, T, H, D] and no weights.

    Raises:
        NotImplementedError: an argument of this model family that is not known here (attention sinks, biases).
    """
    prefix = _active.prefix
    assert prefix is not None, "group-prefix attention outside `attached`"
    unknown = [name for name in ("s_aux", "position_bias", "indices") if others.get(name) is not None]
    if unknown:
        raise NotImplementedError(f"attention arguments {unknown}")
    layer = cast("int", module.layer_idx)
    tensors = (query, key, value, prefix.keys[layer], prefix.values[layer])
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    if prefix.places + key.shape[2] <= (sliding_window or 0):
        sliding_window = None  # every query sees all that came before
    # No fused kernel knows what a window or a cap does to the scores.
    kernel = None if sliding_window or softcap else _fused(prefix, query, key, value)
    if kernel is None:
        out = _plain(*tensors, prefix, scale, sliding_window, softcap)
    else:
        out = attend(kernel, *tensors, prefix, prefix.mask_UP if prefix.padded else None, scale)
    return out.transpose(1, 2), None


AttentionInterface.register(NAME, prefix_attention)


def _plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    prefix: Prefix,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention by matrix products, [B, H, T, D]."""
    rows, heads, new, width = query.shape
    key_heads, own = key.shape[1:3]
    repeats = heads // key_heads

    # 1. Scores: of the rows' own positions, each row apart, and of the prompts, all rows of a group at once.
    # Scaled before the products, where it is [T, D] numbers and not [T, P + S].
    query = query * scale
    own_score = (query.reshape(rows, key_heads, repeats * new, width) @ key.transpose(2, 3)).view(rows, heads, new, own)
    prompt_score = prefix.to_groups(query, key_heads) @ prompt_key.transpose(2, 3)
    score = torch.cat([prompt_score, prefix.to_groups(own_score, key_heads)], 3)
    # The softmax is taken in float32, as in transformers' eager attention.
    score = score.float() if score.dtype in (torch.float16, torch.bfloat16) else score
    if softcap is not None:
        score = softcap * torch.tanh(score / softcap)
    hidden = prefix.hidden(new, own, sliding_window)
    if hidden is not None:
        score = score.unflatten(2, (-1, new)).masked_fill_(hidden, HIDDEN).flatten(2, 3)

    # 2. One softmax over both, and the values of each part.
    prompt_share, own_share = score.softmax(3).to(value.dtype).split([prefix.places, own], 3)
    prompt_out = prefix.to_rows(prompt_share @ prompt_value, heads)
    own_out = prefix.to_rows(own_share, heads).reshape(rows, key_heads, repeats * new, own) @ value
    return own_out.view(rows, heads, new, width) + prompt_out


# -- try before trust -------------------------------------------------------------------------------------------------


def _fused(prefix: Prefix, query: Tensor, key: Tensor, value: Tensor) -> Kernel | None:
    """The fused kernel that does a pass as plain products do; None: there is none, or it would gain nothing."""
    kernel, device = attention_kernels.KERNELS.get(query.device.type), query.device.type
    # A decode step, or a look at some tokens more, has few scores and keeps none.
    teacher_forced = query.shape[2] == key.shape[2] > 1 and prefix.written is None
    if kernel is None or not teacher_forced or prefix.places < kernel.least_positions:
        return None
    return kernel if _trusted(kernel, device, value.dtype, query.shape[3], value.shape[3]) else None


_TRUSTED: dict[tuple[Kernel, str, torch.dtype, int, int], bool] = {}


def _trusted(kernel: Kernel, device: str, dtype: torch.dtype, width: int, value_width: int) -> bool:
    """Whether a fused kernel gives our numbers for heads of these widths; if not, it is said once, with the reason."""
    key = (kernel, device, dtype, width, value_width)
    # A dict and not functools.cache, which torch.compile would not see.
    if key not in _TRUSTED:
        _TRUSTED[key] = _passes(*key)
    return _TRUSTED[key]


@torch.compiler.disable
def _passes(kernel: Kernel, device: str, dtype: torch.dtype, width: int, value_width: int) -> bool:
    obstacle = "queries and values differ in width" if width != value_width else _obstacle(kernel, device, dtype, width)
    if obstacle:
        warnings.warn(
            f"training passes do without fused attention on {device} in {dtype} at a head width of {width} "
            f"({obstacle}): scores are kept, which takes more memory and gives the same results",
            stacklevel=2,
        )
    return not obstacle


def _obstacle(kernel: Kernel, device: str, dtype: torch.dtype, width: int) -> str:
    """Why a kernel is not used; "" where output and gradients are those of plain products on made-up numbers."""
    # bfloat16 keeps 2 to 3 digits and float32 7; a fault of ours changes the first.
    digits = 1e-3 if dtype in (torch.float32, torch.float64) else 5e-2
    shapes = [(3, 4, 5), (3, 2, 5), (3, 2, 5), (2, 2, 7), (2, 2, 7), (3, 4, 5)]  # two query heads for a key head
    # The first pass that asks may be one without gradients.
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device, enabled=False):
        generator = torch.Generator().manual_seed(0)
        given = [torch.randn(*shape, width, generator=generator).to(device, dtype) for shape in shapes]
        exact = [x.to(torch.promote_types(dtype, torch.float32)) for x in given]
        source_B = torch.tensor([0, 0, 1], device=device)  # groups of unequal sizes
        for padding in (0, 3):
            mask_UP = torch.arange(7, device=device) >= torch.tensor([[padding], [0]], device=device)
            prefix = Prefix([], [], mask_UP, source_B, *_slots(source_B, 2), padded=padding > 0)
            plain = _with_gradients(functools.partial(_plain, prefix=prefix, scale=0.3), exact)
            mask = mask_UP if padding else None
            try:
                fused = _with_gradients(
                    functools.partial(attend, kernel, groups=prefix, mask_UP=mask, scale=0.3), given
                )
            except RuntimeError as error:  # what PyTorch raises for a kernel that this device lacks
                return str(error).splitlines()[0].partition(". ")[0]
            # Written as "not <=", so that a NaN is an obstacle too.
            if any(not (x - y).abs().max() <= digits * y.abs().max() for x, y in zip(fused, plain, strict=True)):
                return "its numbers would change"
    return ""


def _with_gradients(attention: Callable[..., Tensor], given: list[Tensor]) -> list[Tensor]:
    """An attention's output and its gradients with respect to all inputs; the last tensor is the output's gradient."""
    *inputs, grad = given
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = attention(*inputs)
    return [out, *torch.autograd.grad(out, inputs, grad)]


# -- caches -----------------------------------------------------------------------------------------------------------


class StopAtLastLayer(Exception):
    """The last layer's keys and values are there, and nothing else of the pass is wanted."""


class PromptLayer(CacheLayerMixin):
    """Keys and values of prompts as the model gives them; the last layer's end the pass."""

    is_sliding = False

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.last = last

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        self.keys, self.values = key_states.contiguous(), value_states.contiguous()  # read at every token
        if self.last:
            raise StopAtLastLayer
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


def prompt_cache(layers: int, stops: bool = True) -> Cache:
    """An empty cache for prompts; a pass that fills it ends with `StopAtLastLayer`, if it `stops`."""
    return Cache(layers=[PromptLayer(last=stops and number == layers - 1) for number in range(layers)])


def contents(cache: Cache) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values of all layers."""
    layers: list[Any] = cache.layers
    return [layer.keys for layer in layers], [layer.values for layer in layers]


class OwnLayer(CacheLayerMixin):
    """Keys and values of the rows' own tokens in preallocated tensors [B, K, W, D]; `length` of them are written.

    With `written` (int64 [1], on the device) the next position is read from there and all W are handed out, so that
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

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
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


def own_cache(layers: int, length: int, written: Tensor | None = None) -> Cache:
    """An empty cache for at most `length` tokens of each row."""
    return Cache(layers=[OwnLayer(length, written) for _ in range(layers)])


# -- models -----------------------------------------------------------------------------------------------------------


def configs(model: nn.Module) -> list[PreTrainedConfig]:
    """The configurations from which the model's parts read the name of their attention function."""
    by_id = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    return [config for config in by_id.values() if isinstance(config, PreTrainedConfig)]


@contextlib.contextmanager
def capped(configs: Sequence[PreTrainedConfig]) -> Iterator[None]:
    """Inside, models that cap their attention's logits do so: by eager attention, where theirs would be PyTorch's own.

    PyTorch's attention knows no caps, and transformers before 5.18 gave Gemma 2 to it all the same.
    """
    uncapped = [
        config
        for config in configs
        if getattr(config, "attn_logit_softcapping", None) and config._attn_implementation == "sdpa"
    ]
    try:
        for config in uncapped:
            config._attn_implementation = "eager"
        yield
    finally:
        for config in uncapped:
            config._attn_implementation = "sdpa"


@contextlib.contextmanager
def attached(configs: Sequence[PreTrainedConfig], prefix: Prefix) -> Iterator[None]:
    """Inside, attention is this one and goes on from these prompts; afterwards it is as before."""
    # Models read the name from their configurations at each forward. It is set for the pass only: set once, the model's
    # own forward, its masks and its saved config would be others. The prefix itself goes by a variable of
    # the thread, which reaches the attention whatever a family's layers do with keywords.
    before = [config._attn_implementation for config in configs]
    outer, _active.prefix = _active.prefix, prefix
    try:
        for config in configs:
            config._attn_implementation = NAME
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name
        _active.prefix = outer
