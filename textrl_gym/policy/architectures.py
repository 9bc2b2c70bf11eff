"""Architectures: what a policy asks of a model's backbone, and which backbone a model gets.

A decoder alone reads prompt and completion as one text; an encoder-decoder reads the prompt by one part of it and
writes by the other (textrl_gym.policy.seq2seq). Agents, sampler and scoring know neither.

Shape legend: U unique prompts, P prompt positions, B rows, T response positions, L = P + T, N positions in any order,
D hidden width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor, nn

from textrl_gym.models import positions
from textrl_gym.policy import decoders
from textrl_gym.policy.backbone import Trunk
from textrl_gym.policy.compiling import Compile
from textrl_gym.policy.seq2seq import Seq2SeqTrunk
from textrl_gym.policy.step_cache import StepCache, aligned


class Steps(Protocol):
    """The hidden states of observations that grow from call to call, as StepCache has them."""

    def __call__(self, input_BL: Tensor, mask_BL: Tensor) -> Tensor: ...
    def find(self, input_BL: Tensor, mask_BL: Tensor) -> Tensor | None: ...
    def forget(self) -> None: ...


class Backbone(Protocol):
    """A language model on prompts and completions, as policies, samplers and searches use it."""

    model: Any
    one_text: ClassVar[bool]
    """Whether prompt and completion are one text to the model, which may be read from anywhere in it."""

    @property
    def device(self) -> torch.device: ...

    def prepare(self, max_prompt_tokens: int, max_new_tokens: int) -> None:
        """Find out how the model may be run on texts of these lengths, or raise ValueError."""

    def take_over(self, other: object) -> None:
        """Believe what another backbone has tried, where it is one of a model of the same kind."""

    def hidden(self, prompt_BP: Tensor, mask_BP: Tensor, action_BT: Tensor, action_mask_BT: Tensor) -> Tensor:
        """The hidden states below the logits of each action and of one action more, differentiable, [B, T + 1, D]."""
        ...

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """The language-model head, [N, V]."""
        ...

    def check_head(self) -> None:
        """Raise ValueError where the logits are no function of the last hidden state."""

    def decoder(self, prompt_UP: Tensor, mask_UP: Tensor, source_B: Tensor, length: int) -> decoders.Decoder:
        """Rows that go on from prompts, of at most so many tokens; source_B: which prompt each row has."""
        ...

    def lookahead(self, prompt_UP: Tensor, mask_UP: Tensor, source_B: Tensor, length: int) -> decoders.Lookahead:
        """The same for search."""
        ...

    def next_hidden(self, input_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """The hidden states below the next token's logits of observations of unequal lengths, [B, D]."""
        ...

    def steps(self) -> Steps:
        """`next_hidden` of observations that grow from call to call."""
        ...


class DecoderTrunk(Trunk):
    """A decoder alone as a policy's backbone; see Backbone."""

    one_text: ClassVar[bool] = True

    def prepare(self, max_prompt_tokens: int, max_new_tokens: int) -> None:
        positions.check(self.model, self.limit, max_prompt_tokens, max_new_tokens)
        self.try_out(max_prompt_tokens + max_new_tokens)

    def decoder(self, prompt_UP: Tensor, mask_UP: Tensor, source_B: Tensor, length: int) -> decoders.Decoder:
        return decoders.decoder(self, prompt_UP, mask_UP, source_B, length)

    def lookahead(self, prompt_UP: Tensor, mask_UP: Tensor, source_B: Tensor, length: int) -> decoders.Lookahead:
        return decoders.lookahead(self, prompt_UP, mask_UP, source_B, length)

    def next_hidden(self, input_BL: Tensor, mask_BL: Tensor) -> Tensor:
        # Rows must end at the same place for the last hidden states to stand in one column.
        moved_BW, moved_mask_BW = aligned(input_BL, mask_BL)
        no_action_B0 = moved_BW[:, :0]
        return self.hidden(moved_BW, moved_mask_BW, no_action_B0, no_action_B0.bool())[:, 0]

    def steps(self) -> StepCache:
        return StepCache(self)


def backbone(
    model: nn.Module,
    dtype: torch.dtype = torch.float32,
    static: bool = False,
    adapter: bool = True,
    compile: Compile = "none",
) -> DecoderTrunk | Seq2SeqTrunk:
    """The backbone of a language model; arguments as of Trunk.

    Raises:
        ValueError: the model is no language model of transformers with a head, or cannot be run in the way asked for.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_output_embeddings"):
        raise ValueError(f"a policy is a causal LM of transformers, not a {type(model).__name__}")
    is_seq2seq = getattr(config, "is_encoder_decoder", False)
    if getattr(cast("Any", model).get_output_embeddings(), "weight", None) is None:
        kind = "an encoder-decoder with one" if is_seq2seq else "a causal LM"
        raise ValueError(f"{type(model).__name__} has no language-model head: a policy is {kind}")
    return (Seq2SeqTrunk if is_seq2seq else DecoderTrunk)(model, dtype, static, adapter, compile)
