"""Trunk: a decoder's body run on prompts and completions, each prompt computed once for all its rows.

Everything that reads a language model here goes through a Trunk: teacher-forced passes for training, for the reference,
for values and for rewards, and the sampler's decoding. Where the model's attention can go on from shared prompts
(policy.prefix_attention) it does; where it cannot, each row computes its own prompt: slower, and the same numbers.

Shape legend: U unique prompts, P prompt positions, B rows, T response positions, N positions in any order, D hidden
width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.utils.generic import ModelOutput

from textrl_gym.models import lora, onednn
from textrl_gym.policy.prefix_attention import LAYERS, Prefix, StopAtLastLayer, attached, capped, configs, prompt_cache

if TYPE_CHECKING:
    from peft import PeftModel


def position_ids(mask_BL: Tensor) -> Tensor:
    """0, 1, 2, ... over the real tokens of each row; 0 on left padding. int64 [B, L]."""
    return (mask_BL.long().cumsum(-1) - 1).clamp(min=0)


def no_mask(like: Tensor) -> Tensor:
    """A mask of four dimensions, which models pass on as it is: group-prefix attention makes its own."""
    return torch.zeros(1, 1, 1, 1, device=like.device)


def fill(body: nn.Module, prompt_UP: Tensor, mask_UP: Tensor, cache: Cache | None) -> ModelOutput:
    """The body's output on prompts, whose keys and values go to the cache (None: one of the model's own making)."""
    return body(
        input_ids=prompt_UP,
        attention_mask=mask_UP.long(),
        position_ids=position_ids(mask_UP),
        past_key_values=cache,
        use_cache=True,
    )


def unique_prompts(prompt_BP: Tensor, mask_BP: Tensor) -> tuple[Tensor, Tensor]:
    """The first row of each different prompt, [U], and which of these prompts each row has, [B].

    Prompts are numbered in the order of their first rows, so that the rows of neighbouring groups stay in order.
    """
    # unique() numbers rows by their content; groups must keep the order in which they were collected.
    _, code_B = torch.stack([prompt_BP, mask_BP.long()], 1).unique(dim=0, return_inverse=True)
    rows = len(code_B)
    first_of_code = code_B.new_full((rows,), rows).scatter_reduce_(
        0, code_B, torch.arange(rows, device=code_B.device), "amin"
    )
    first_B = first_of_code[code_B]  # the first row with the same prompt
    first_U, source_B = first_B.unique(return_inverse=True)
    return first_U, source_B


class Trunk:
    """The body of a causal LM or of a decoder with another head; of a causal LM the head too.

    Args:
        model: of transformers. Its linear layers may change their class (models.onednn), its own numbers never change.
        dtype: of the passes: torch.bfloat16 is autocast over the model's weights.
        static: decode at fixed shapes, on a GPU as a CUDA graph.
        adapter: False runs a model of peft with its adapter switched off.
    """

    def __init__(
        self, model: nn.Module, dtype: torch.dtype = torch.float32, static: bool = False, adapter: bool = True
    ) -> None:
        self.model, self.dtype, self.static = lora.bare(model), dtype, static
        self.body: Any = self.model.base_model
        self._without: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext
        if not adapter:
            self._without = cast("PeftModel", model).disable_adapter
        self.configs = configs(self.model)
        onednn.prepare_(self.model)

    def _some_tokens(self) -> Tensor:
        """Four tokens to try the model on: the smallest models here have positions and tokens for no more."""
        return torch.arange(4, device=self.device) % self.model.config.get_text_config().vocab_size

    @cached_property
    def shares_prompts(self) -> bool:
        """Whether the model's attention goes on from shared prompts; if not, it is said once, with the reason."""
        obstacle = self._obstacle()
        if obstacle:
            warnings.warn(
                f"{type(self.model).__name__} cannot share a prompt among its completions ({obstacle}): prompts are "
                "computed for each completion, which is slower and gives the same results",
                stacklevel=2,
            )
        return not obstacle

    def _obstacle(self) -> str:
        """Why prompts cannot be shared; "" if they can. The last word has a comparison on made-up tokens."""
        if not getattr(self.model, "_supports_attention_backend", False):
            return "its attention cannot be replaced"
        kinds = {kind for config in self.configs for kind in getattr(config, "layer_types", None) or ()}
        if kinds - LAYERS:
            return f"it has layers of the kind {', '.join(sorted(kinds - LAYERS))}"
        a, b, c, d = self._some_tokens()
        prompt_BP = torch.stack([torch.stack([a, b]), torch.stack([a, c]), torch.stack([a, c])])
        # A padded prompt, and two rows of one prompt: what a family may do otherwise shows with these.
        mask_BP = torch.tensor([[False, True], [True, True], [True, True]], device=self.device)
        action_BT = torch.stack([torch.stack([c, d]), torch.stack([c, d]), torch.stack([d, b])])
        action_mask_BT = torch.ones_like(action_BT, dtype=torch.bool)
        with torch.no_grad(), self.running():
            plain = self._whole(prompt_BP, mask_BP, action_BT, action_mask_BT)
            try:
                shared = self._shared(prompt_BP[:2], mask_BP[:2], torch.tensor([0, 1, 1], device=a.device), action_BT)
            except NotImplementedError as reason:
                return str(reason)
        # Two orders of the same sums: float32 keeps 7 digits and bfloat16 2 to 3; a fault of ours changes the first.
        digits = 1e-3 if {self.dtype, plain.dtype} <= {torch.float32, torch.float64} else 5e-2
        # Written as "not <=", so that a NaN is an obstacle too.
        if not (plain - shared).abs().max() <= digits * plain.abs().max():
            return "its numbers would change"
        return ""

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Around every pass: the precision, and the fastest linear layers that this processor has."""
        with self._precision(), onednn.fast(), self._without(), capped(self.configs):
            yield

    def run(self, **inputs: object) -> ModelOutput:
        """The body's output on the inputs that transformers names."""
        with self.running():
            return self.body(**inputs)

    def _precision(self) -> torch.autocast:
        # What autocast caches while a CUDA graph is captured would be gone when it is replayed.
        enabled, cache = self.dtype != torch.float32, not self.static
        return torch.autocast(self.device.type, self.dtype, enabled=enabled, cache_enabled=cache)

    # -- teacher-forced passes ----------------------------------------------------------------------------------------

    def hidden(self, prompt_BP: Tensor, mask_BP: Tensor, action_BT: Tensor, action_mask_BT: Tensor) -> Tensor:
        """The last hidden states below the logits of each action and of one action more, [B, T + 1, D].

        Each different prompt is computed once; gradients flow through prompts and actions alike.

        Args:
            prompt_BP, mask_BP: int64 and bool, left-padded.
            action_BT, action_mask_BT: the tokens that follow, right-padded.
        """
        first_U, source_B = unique_prompts(prompt_BP, mask_BP)
        # Where no prompt stands twice there is nothing to share, and one pass is faster than two.
        if len(first_U) < len(prompt_BP) and self.shares_prompts:
            with self.running():
                return self._shared(prompt_BP[first_U], mask_BP[first_U], source_B, action_BT)
        with self.running():
            return self._whole(prompt_BP, mask_BP, action_BT, action_mask_BT)

    def _whole(self, prompt_BP: Tensor, mask_BP: Tensor, action_BT: Tensor, action_mask_BT: Tensor) -> Tensor:
        mask_BL = torch.cat([mask_BP, action_mask_BT], 1)
        out = self.body(
            input_ids=torch.cat([prompt_BP, action_BT], 1),
            attention_mask=mask_BL.long(),
            position_ids=position_ids(mask_BL),
            use_cache=False,
        )
        return out[0][:, prompt_BP.shape[1] - 1 :]

    def _shared(self, prompt_UP: Tensor, mask_UP: Tensor, source_B: Tensor, action_BT: Tensor) -> Tensor:
        prefix = self.prefix(prompt_UP, mask_UP, source_B)
        own_BS = torch.cat([prompt_UP[source_B, -1:], action_BT], 1)
        with attached(self.configs, prefix):
            return self.body(
                input_ids=own_BS,
                attention_mask=no_mask(own_BS),
                position_ids=prefix.positions + torch.arange(own_BS.shape[1], device=own_BS.device),
                use_cache=False,
            )[0]

    def prefix(self, prompt_UP: Tensor, mask_UP: Tensor, source_B: Tensor) -> Prefix:
        """What rows go on from: keys and values of all but the last token of each prompt.

        That token is the first of every row's own. So nothing is wanted of the last layer here but its keys and values,
        and the pass ends with them.
        """
        if prompt_UP.shape[1] == 1:  # of no tokens but the last: one position that nothing attends to
            prompt_UP, mask_UP = (nn.functional.pad(x, (1, 0)) for x in (prompt_UP, mask_UP))
        ids_UP, mask_UP = prompt_UP[:, :-1], mask_UP[:, :-1]
        cache = prompt_cache(self.depth)
        with contextlib.suppress(StopAtLastLayer):
            fill(self.body, ids_UP, mask_UP, cache)
        return Prefix.of(cache, mask_UP, source_B)

    @cached_property
    def depth(self) -> int:
        """How many layers keep keys and values."""
        # Not num_hidden_layers: some layers of some families keep none, or share another layer's.
        cache = DynamicCache()
        with torch.no_grad(), self._precision(), capped(self.configs):
            fill(self.body, self._some_tokens()[None], torch.ones_like(self._some_tokens())[None], cache)
        return len(cache.layers)

    # -- the head -----------------------------------------------------------------------------------------------------

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """The language-model head on last hidden states, [N, V], with all that the model does to its logits after."""
        head = self._head
        with self.running():
            return head(hidden_ND)

    @cached_property
    def _head(self) -> Callable[[Tensor], Tensor]:
        """The first of two ways that gives the model's logits on made-up tokens.

        Raises:
            ValueError: neither does: the logits are no function of the last hidden state.
        """
        ids_1L = self._some_tokens()[None]
        output_embeddings = self.model.get_output_embeddings()
        with torch.no_grad(), self._without(), capped(self.configs):
            hidden_LD = self.body(input_ids=ids_1L, use_cache=False)[0][0]
            logits_LV = self.model(input_ids=ids_1L, use_cache=False).logits[0]
            # The model's own forward first: it knows of capped or scaled logits. The output embeddings alone are for
            # models that reach past their body (OPT calls model.decoder), for which the stand-in is not asked.
            for head in (_Head(self.model), output_embeddings):
                # In reversed order: a head that adds something of the position is no function of the hidden state.
                if torch.allclose(head(hidden_LD.flip(0)).flip(0), logits_LV, rtol=1e-4, atol=1e-4):
                    return head
        raise ValueError(f"the logits of {type(self.model).__name__} are no function of its last hidden state")


class _Head:
    """A model's own forward after its body, [N, D] to [N, V].

    It calls a shallow copy of the model, made once, whose body gives the hidden states of the call. Every other module,
    every parameter and every setting is the model's own object, and the model itself is not touched.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        body, self._model = copy.copy(model.base_model), copy.copy(model)
        body.forward = self._give
        # A shallow copy shares its dict of children with the model: a new dict, so that only the copy's body changes.
        vars(self._model)["_modules"] = {**vars(model)["_modules"], model.base_model_prefix: body}
        self._hidden_ND: Tensor | None = None

    def _give(self, *_: object, **__: object) -> _Given:
        assert self._hidden_ND is not None
        return _Given(self._hidden_ND[None])

    def __call__(self, hidden_ND: Tensor) -> Tensor:
        # Not as inputs_embeds, which would need no state here: some forwards read input_ids, all take them.
        ids_1N = torch.zeros((1, len(hidden_ND)), dtype=torch.long, device=hidden_ND.device)
        self._hidden_ND = hidden_ND
        try:
            return self._model(input_ids=ids_1N, use_cache=False).logits[0]
        finally:
            self._hidden_ND = None  # nothing holds the graph of a pass that is over


class _Given:
    """A body's output with nothing in it but the last hidden state, of any model family."""

    def __init__(self, last_hidden_state: Tensor) -> None:
        self.last_hidden_state = last_hidden_state

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None
