"""Trunk: a decoder's body run on prompts and completions, each prompt computed once for all its rows.

Everything that reads a language model here goes through a Trunk: teacher-forced passes for training, for the reference,
for values and for rewards, and the sampler's decoding. Where the model's attention can go on from shared prompts
(policy.prefix_attention) it does; where it cannot, each row computes its own prompt; where padding on the left or going
on from a cache changes the model's numbers, neither is done: slower, and the same numbers (policy.trial).

Shape legend: U unique prompts, P prompt positions, B rows, T response positions, N positions in any order, D hidden
width, V vocabulary.
"""

from __future__ import annotations

import abc
import contextlib
import copy
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.utils.generic import ModelOutput

from textrl_gym.models import lora, onednn, positions
from textrl_gym.policy import trial
from textrl_gym.policy.compiling import Compile, compiled, of_decode, of_update
from textrl_gym.policy.prefix_attention import (
    LAYERS,
    Prefix,
    StopAtLastLayer,
    attached,
    capped,
    configs,
    contents,
    prompt_cache,
)
from textrl_gym.policy.trial import Ways

if TYPE_CHECKING:
    from peft import PeftModel

PromptPass = Callable[[Tensor, Tensor], tuple[list[Tensor], list[Tensor]]]
"""From ids and mask of prompts to the keys and values of each layer."""


def position_ids(mask_BL: Tensor) -> Tensor:
    """0, 1, 2, ... over the real tokens of each row; 0 on left padding. int64 [B, L]."""
    return (mask_BL.long().cumsum(-1) - 1).clamp(min=0)


def no_mask(like: Tensor) -> Tensor:
    """A mask of four dimensions, which models pass on as it is: group-prefix attention makes its own."""
    return torch.zeros(1, 1, 1, 1, device=like.device)


def cache_name(body: nn.Module) -> str:
    """The argument that hands a body its cache: `past_key_values`, which transformers calls `cache` from 5.24 on."""
    return "cache" if "cache" in inspect.signature(body.forward).parameters else "past_key_values"


def cache_of(out: ModelOutput) -> Cache | None:
    """The cache that a body's output holds; None where it keeps none."""
    # By what is there: to ask for the old name is warned of where it is one.
    cache: Cache | None = getattr(out, "cache" if hasattr(out, "cache") else "past_key_values", None)
    return cache


def fill(body: nn.Module, prompt_UP: Tensor, mask_UP: Tensor, **cache: Cache) -> ModelOutput:
    """The body's output on prompts, whose keys and values go to the cache, by `cache_name` (none: one of its own)."""
    return body(
        input_ids=prompt_UP,
        attention_mask=mask_UP.long(),
        position_ids=position_ids(mask_UP),
        **cache,
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


def body_of(model: PreTrainedModel) -> nn.Module:
    """A causal LM without its head, or a decoder without another one."""
    # Some families name a body that they do not have under that name (Llama 4), and are their own base then.
    return model.base_model if model.base_model is not model else cast("nn.Module", model.model)


class ModelRunner(abc.ABC):
    """A model of transformers and the surroundings in which its passes run.

    Args:
        model: its linear layers may change their class (models.onednn), its own numbers never change.
        dtype: of the passes: torch.bfloat16 is autocast over the model's weights.
        static: the passes of decoding are captured as CUDA graphs.
        adapter: False runs a model of peft with its adapter switched off.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, static: bool, adapter: bool) -> None:
        self.model, self.dtype, self.static = lora.bare(model), dtype, static
        self._without: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext
        if not adapter:
            self._without = cast("PeftModel", model).disable_adapter
        self.configs = configs(self.model)
        self.borders = positions.borders(self.model.config)
        """Lengths beyond which the model may compute otherwise than below."""
        self.limit = positions.limit(self.model)
        """The longest text that the model has positions for; None: no table of positions ends."""
        self._ways: Ways | None = None
        self._tried = 0
        self._told: set[str] = set()
        onednn.prepare_(self.model)

    @contextlib.contextmanager
    def exact(self) -> Iterator[None]:
        """As `running`, in the precision of the weights."""
        with onednn.fast(), self._without(), capped(self.configs):
            yield

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Around every pass: the precision, and the fastest linear layers that this processor has."""
        with self._precision(), self.exact():
            yield

    def _precision(self) -> torch.autocast:
        # What autocast caches while a CUDA graph is captured would be gone when it is replayed.
        enabled, cache = self.dtype != torch.float32, not self.static
        return torch.autocast(self.device.type, self.dtype, enabled=enabled, cache_enabled=cache)

    # -- which ways are right -----------------------------------------------------------------------------------------

    @abc.abstractmethod
    def examine(self, length: int) -> Ways:
        """How the model may be run on texts of so many tokens, by comparison with its plain forward."""

    def try_out(self, reach: int) -> Ways:
        """How the model may be run on texts of up to so many tokens; compared with its plain forward when first asked.

        What is slower than it could be is said once, with the reason.

        Raises:
            ValueError: no way gives the numbers of the model's own forward.
        """
        length = trial.length(self.borders, min(reach, self.limit or reach))
        if self._ways is None or (length > self._tried and self._is_new(length)):
            self._ways, self._tried = self.examine(length), length
            for reason in self._ways.reasons:
                if reason not in self._told:
                    warnings.warn(f"{type(self.model).__name__} {reason}", stacklevel=2)
            self._told |= set(self._ways.reasons)
        return self._ways

    def take_over(self, other: object) -> None:
        """Believe what another runner has tried, where it is one of a model of the same kind."""
        if isinstance(other, ModelRunner) and self._is_like(other):
            self._ways, self._tried, self._told = other._ways, other._tried, set(other._told)

    def _is_new(self, length: int) -> bool:
        """Whether texts of a length may show what those tried before did not."""
        # By doubling where no border lies between: texts that are stepped through grow a token at a time.
        return length >= 2 * self._tried or any(self._tried <= border < length for border in self.borders)

    def _is_like(self, other: ModelRunner) -> bool:
        """Whether the other model differs from this one in its weights only."""
        one, two = self.model, other.model
        return type(one) is type(two) and one.dtype == two.dtype and one.config.to_dict() == two.config.to_dict()


class Trunk(ModelRunner):
    """The body of a causal LM or of a decoder with another head; of a causal LM the head too.

    Args:
        model, dtype, adapter: as of ModelRunner.
        static: decode at fixed shapes, on a GPU as a CUDA graph.
        compile: which passes are compiled by torch.compile: those of `hidden` (update), a decode step, or both.
    """

    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype = torch.float32,
        static: bool = False,
        adapter: bool = True,
        compile: Compile = "none",
    ) -> None:
        super().__init__(model, dtype, static, adapter)
        self.body: Any = body_of(self.model)
        self.cache_name = cache_name(self.body)  # once: compiled passes cannot look into signatures
        self.step_body: Any = compiled(self.body) if of_decode(compile) else self.body
        """What a decoder at fixed shapes runs."""
        self.in_one_pass = False
        """Never share prompts: processes whose layers gather their weights together must make as many passes."""
        self._compiled: tuple[Any, PromptPass] | None = None
        if of_update(compile):
            self._compiled = compiled(self.body), compiled(self._all_of_prompts)

    # -- which ways are right -----------------------------------------------------------------------------------------

    def examine(self, length: int) -> Ways:
        return trial.examine(self, max(length, 2), self.borders)

    def ways_for(self, mask_BP: Tensor, more: int) -> Ways:
        """`try_out` for prompts and at most so many tokens after them."""
        reach = mask_BP.shape[1] + more
        if self._ways is not None and trial.length(self.borders, reach) <= self._tried:
            return self._ways
        return self.try_out(int(mask_BP.sum(1).max()) + more)  # padding may reach further than texts do

    @property
    def shares_prompts(self) -> bool:
        """Whether the model's attention goes on from shared prompts."""
        return (self._ways or self.try_out(4)).shares  # the smallest models here have positions for no more

    @property
    def pads(self) -> bool:
        """Whether texts of unequal length may stand side by side, padded on the left."""
        return (self._ways or self.try_out(4)).pads

    @property
    def caches(self) -> bool:
        """Whether such texts may go on from the cache of the model's own making."""
        return (self._ways or self.try_out(4)).caches

    def obstacle(self) -> str:
        """Why prompts cannot be shared, as far as the model's configuration says; "" if it says nothing."""
        if not getattr(self.model, "_supports_attention_backend", False):
            return "its attention cannot be replaced"
        kinds = {kind for config in self.configs for kind in getattr(config, "layer_types", None) or ()}
        if kinds - LAYERS:
            return f"it has layers of the kind {', '.join(sorted(kinds - LAYERS))}"
        return ""

    def run(self, **inputs: object) -> ModelOutput:
        """The body's output on the inputs that transformers names."""
        with self.running():
            return self.body(**inputs)

    # -- teacher-forced passes ----------------------------------------------------------------------------------------

    def hidden(self, prompt_BP: Tensor, mask_BP: Tensor, action_BT: Tensor, action_mask_BT: Tensor) -> Tensor:
        """The last hidden states below the logits of each action and of one action more, [B, T + 1, D].

        Each different prompt is computed once; gradients flow through prompts and actions alike.

        Args:
            prompt_BP, mask_BP: int64 and bool, left-padded.
            action_BT, action_mask_BT: the tokens that follow, right-padded.
        """
        first_U, source_B = unique_prompts(prompt_BP, mask_BP)
        self.ways_for(mask_BP, action_BT.shape[1])
        with self.running():
            # Where no prompt stands twice there is nothing to share, and one pass is faster than two.
            if len(first_U) < len(prompt_BP) and self.shares_prompts and not self.in_one_pass:
                return self.shared(prompt_BP[first_U], mask_BP[first_U], source_B, action_BT, self._compiled)
            if not self.pads:
                return self.apart(prompt_BP, mask_BP, action_BT, action_mask_BT)
            body = self._compiled[0] if self._compiled else self.body
            return self.whole(prompt_BP, mask_BP, action_BT, action_mask_BT, body)

    def plain(self, ids_BL: Tensor) -> Tensor:
        """The last hidden states of texts of one length, by the model's plain forward, [B, L, D]."""
        return self.body(input_ids=ids_BL, use_cache=False)[0]

    def whole(
        self, prompt_BP: Tensor, mask_BP: Tensor, action_BT: Tensor, action_mask_BT: Tensor, body: Any = None
    ) -> Tensor:
        """`hidden` of all rows side by side, padded on the left; body: the compiled one."""
        mask_BL = torch.cat([mask_BP, action_mask_BT], 1)
        out = (body or self.body)(
            input_ids=torch.cat([prompt_BP, action_BT], 1),
            attention_mask=mask_BL.long(),
            position_ids=position_ids(mask_BL),
            use_cache=False,
        )
        return out[0][:, prompt_BP.shape[1] - 1 :]

    def apart(self, prompt_BP: Tensor, mask_BP: Tensor, action_BT: Tensor, action_mask_BT: Tensor) -> Tensor:
        """`hidden` of rows without padding on the left: those whose prompts have one length together."""
        parts, rows = [], []
        for length in mask_BP.sum(1).unique().tolist():
            row_b = (mask_BP.sum(1) == length).nonzero().squeeze(1)
            # Padding on the right is seen by nothing that is read.
            own_bL = torch.cat([prompt_BP[row_b, prompt_BP.shape[1] - length :], action_BT[row_b]], 1)
            own_bL = own_bL[:, : length + int(action_mask_BT[row_b].sum(1).max())]
            hidden_bXD = self.plain(own_bL)[:, length - 1 :]
            missing = action_BT.shape[1] + 1 - hidden_bXD.shape[1]
            parts.append(nn.functional.pad(hidden_bXD, (0, 0, 0, missing)))
            rows.append(row_b)
        return torch.cat(parts)[torch.cat(rows).argsort()]

    def shared(
        self,
        prompt_UP: Tensor,
        mask_UP: Tensor,
        source_B: Tensor,
        action_BT: Tensor,
        compiled: tuple[Any, PromptPass] | None = None,
    ) -> Tensor:
        """`hidden` of rows that go on from prompts, each of which is computed once; compiled: body and prompt pass."""
        body, prompts = compiled or (self.body, self._prompts)
        prefix = self.prefix(prompt_UP, mask_UP, source_B, prompts)
        own_BS = torch.cat([prompt_UP[source_B, -1:], action_BT], 1)
        with attached(self.configs, prefix):
            return body(
                input_ids=own_BS,
                attention_mask=no_mask(own_BS),
                position_ids=prefix.positions + torch.arange(own_BS.shape[1], device=own_BS.device),
                use_cache=False,
            )[0]

    def stepped(self, prompt_BP: Tensor, mask_BP: Tensor, action_BT: Tensor) -> Tensor:
        """`hidden` by going on from the model's own cache, a token at a time, as decoding does.

        Raises:
            ValueError: the model keeps no cache.
        """
        out = fill(self.body, prompt_BP, mask_BP)
        cache = cache_of(out)
        if cache is None:
            raise ValueError("it keeps no cache")
        hidden, mask_BL = [out[0][:, -1]], mask_BP
        for token_B in action_BT.unbind(1):
            out, mask_BL = self.go_on(token_B[:, None], mask_BL, cache)
            hidden.append(out[0][:, -1])
        return torch.stack(hidden, 1)

    def go_on(self, token_BK: Tensor, mask_BL: Tensor, cache: Cache) -> tuple[ModelOutput, Tensor]:
        """The body's output on more tokens of each row, and the mask with them; the cache grows."""
        mask_BL = torch.cat([mask_BL, mask_BL.new_ones(token_BK.shape)], 1)
        out = self.body(
            input_ids=token_BK,
            attention_mask=mask_BL.long(),
            position_ids=position_ids(mask_BL)[:, -token_BK.shape[1] :],
            **{self.cache_name: cache},
            use_cache=True,
        )
        return out, mask_BL

    def prefix(self, prompt_UP: Tensor, mask_UP: Tensor, source_B: Tensor, prompts: PromptPass | None = None) -> Prefix:
        """What rows go on from: keys and values of all but the last token of each prompt.

        That token is the first of every row's own. So nothing is wanted of the last layer here but its keys and values,
        and the pass ends with them.
        """
        if prompt_UP.shape[1] == 1:  # of no tokens but the last: one position that nothing attends to
            prompt_UP, mask_UP = (nn.functional.pad(x, (1, 0)) for x in (prompt_UP, mask_UP))
        ids_UP, mask_UP = prompt_UP[:, :-1], mask_UP[:, :-1]
        return Prefix.of(*(prompts or self._prompts)(ids_UP, mask_UP), mask_UP, source_B)

    def _prompts(self, ids_UP: Tensor, mask_UP: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        cache = prompt_cache(self.depth)
        with contextlib.suppress(StopAtLastLayer):
            fill(self.body, ids_UP, mask_UP, **{self.cache_name: cache})
        return contents(cache)

    def _all_of_prompts(self, ids_UP: Tensor, mask_UP: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The same without the exception: what nobody reads of the last layer a compiler leaves out by itself."""
        cache = prompt_cache(self.depth, stops=False)
        fill(self.body, ids_UP, mask_UP, **{self.cache_name: cache})
        return contents(cache)

    @property
    def _some_tokens(self) -> Tensor:
        """A text of four tokens, [1, 4]: the smallest models here have positions and tokens for no more."""
        # Made anew, since the model may be moved to another device.
        return torch.tensor([(trial.plain_tokens(self.model.config) * 4)[:4]], device=self.device)

    @cached_property
    def depth(self) -> int:
        """How many layers keep keys and values."""
        # Not num_hidden_layers: some layers of some families keep none, or share another layer's.
        cache = DynamicCache()
        with torch.no_grad(), self._precision(), capped(self.configs):
            fill(self.body, self._some_tokens, torch.ones_like(self._some_tokens), **{self.cache_name: cache})
        return len(cache.layers)

    # -- the head -----------------------------------------------------------------------------------------------------

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """The language-model head on last hidden states, [N, V], with all that the model does to its logits after."""
        head = self._head
        with self.running():
            return head(hidden_ND)

    def check_head(self) -> None:
        """Hold that the logits are a function of the last hidden state.

        Raises:
            ValueError: they are not.
        """
        assert self._head is not None

    @cached_property
    def _head(self) -> Callable[[Tensor], Tensor]:
        """The first of two ways that gives the model's logits on made-up tokens.

        Raises:
            ValueError: neither does: the logits are no function of the last hidden state.
        """
        ids_1L, name = self._some_tokens, type(self.model).__name__
        output_embeddings = self.model.get_output_embeddings()
        try:
            with torch.no_grad(), self._without(), capped(self.configs):
                hidden_LD = self.plain(ids_1L)[0]
                logits_LV = self.model(input_ids=ids_1L, use_cache=False).logits[0]
                # The model's own forward first: it knows of capped or scaled logits. The output embeddings alone are
                # for models that reach past their body (OPT calls model.decoder), for which the stand-in is not asked.
                for head in (Head(self.model, self.body, _as_text), output_embeddings):
                    # In reversed order: a head that adds something of the position is no function of the hidden state.
                    if gives(head, hidden_LD, logits_LV):
                        return head
        except Exception as error:  # whatever a family of models raises
            raise ValueError(f"{name} cannot be run on text alone: {type(error).__name__}: {error}") from error
        raise ValueError(f"the logits of {name} are no function of its last hidden state")


def _as_text(ids_1N: Tensor) -> dict[str, object]:
    return {"input_ids": ids_1N}


def gives(head: Callable[[Tensor], Tensor], hidden_LD: Tensor, logits_LV: Tensor) -> bool:
    """Whether a head gives the model's logits."""
    try:
        found_LV = head(hidden_LD.flip(0)).flip(0)
    except Exception:  # noqa: BLE001 - a stand-in that does not fit the family; if no head does, that is told
        return False
    return found_LV.shape == logits_LV.shape and torch.allclose(found_LV, logits_LV, rtol=1e-4, atol=1e-4)


class Head:
    """A model's own forward after its body, [N, D] to [N, V].

    It calls a shallow copy of the model, made once, whose body gives the hidden states of the call. Every other module,
    every parameter and every setting is the model's own object, and the model itself is not touched.

    Args:
        body: the part of the model whose last hidden states the logits are made of.
        inputs: from token ids [1, N] the arguments of the model's forward; what they are plays no part.
    """

    def __init__(
        self, model: PreTrainedModel, body: nn.Module, inputs: Callable[[Tensor], Mapping[str, object]]
    ) -> None:
        stand_in = copy.copy(body)
        stand_in.forward = self._give
        self._model, self._inputs = _with_stand_in(model, body, stand_in), inputs
        self._hidden_ND: Tensor | None = None

    def _give(self, *_: object, **__: object) -> _Given:
        assert self._hidden_ND is not None
        return _Given(self._hidden_ND[None])

    def __call__(self, hidden_ND: Tensor) -> Tensor:
        # Not as inputs_embeds, which would need no state here: some forwards read input_ids, all take them.
        ids_1N = torch.zeros((1, len(hidden_ND)), dtype=torch.long, device=hidden_ND.device)
        self._hidden_ND = hidden_ND
        try:
            return self._model(**self._inputs(ids_1N), use_cache=False).logits[0]
        finally:
            self._hidden_ND = None  # nothing holds the graph of a pass that is over


def _with_stand_in(module: nn.Module, original: nn.Module, stand_in: nn.Module) -> Any:
    """A shallow copy of a module that has another module in place of one of its parts, at whatever depth."""
    changed = copy.copy(module)
    # A shallow copy shares its dict of children with the module: a new dict, so that only the copy's child changes.
    children = vars(module)["_modules"]
    vars(changed)["_modules"] = {
        name: stand_in
        if child is original
        else _with_stand_in(child, original, stand_in)
        if child is not None and any(part is original for part in child.modules())
        else child
        for name, child in children.items()
    }
    return changed


class _Given:
    """A body's output with nothing in it but the last hidden state, of any model family."""

    def __init__(self, last_hidden_state: Tensor) -> None:
        self.last_hidden_state = last_hidden_state

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None
