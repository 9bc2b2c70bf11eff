"""Decoders: rows that go on from prompts, a token at a time, on a Trunk that has computed each prompt once.

Shape legend: U unique prompts, P prompt positions, B rows, K tokens that are looked at, L positions so far, D hidden
width.
"""

from __future__ import annotations

import copy
from typing import Protocol, cast

import torch
from torch import Tensor
from transformers import Cache

from textrl_gym.policy.backbone import Trunk, cache_of, fill, no_mask
from textrl_gym.policy.prefix_attention import OwnLayer, attached, own_cache


class Decoder(Protocol):
    """Rows that go on from prompts, one token at a time."""

    first_BD: Tensor
    """The hidden state below the first token's logits."""
    compaction_threshold: float
    """Rows should leave when at least this share of the batch has ended; before, it costs more than it saves."""

    def step(self, token_B: Tensor) -> Tensor:
        """Append a token to each row; the hidden state below the next one's logits, [B, D]."""
        ...

    def keep(self, keep_k: Tensor) -> None:
        """Go on with these rows only."""
        ...


class Lookahead(Decoder, Protocol):
    """A Decoder that can also look at tokens without appending them."""

    def peek(self, token_BK: Tensor) -> Tensor:
        """The hidden states after each of K more tokens of each row, [B, K, D]; then they are forgotten."""
        ...


class SharedDecoder:
    """Rows read their prompt's keys and values where they stand; their own are written into preallocated positions."""

    compaction_threshold = 0.1  # those that stay have their caches copied

    def __init__(self, trunk: Trunk, prompt_UP: Tensor, mask_UP: Tensor, source_B: Tensor, length: int) -> None:
        self.trunk = trunk
        with trunk.running():
            self.prefix = trunk.prefix(prompt_UP, mask_UP, source_B)
        self.position_B1 = self.prefix.positions
        self.no_mask = no_mask(prompt_UP)
        self._body = trunk.body
        self._allocate(length + 1)  # the last token of the prompt is a row's own
        self.first_BD = self.step(prompt_UP[source_B, -1])

    def _allocate(self, length: int) -> None:
        self.own = own_cache(self.trunk.depth, length)

    def step(self, token_B: Tensor) -> Tensor:
        hidden_BD = self._run(token_B[:, None])[:, 0]
        self.position_B1 = self.position_B1 + 1
        return hidden_BD

    def peek(self, token_BK: Tensor) -> Tensor:
        hidden_BKD = self._run(token_BK)
        for layer in self.own.layers:
            # The next tokens are written over those that were looked at.
            cast("OwnLayer", layer).length -= token_BK.shape[1]
        return hidden_BKD

    def _run(self, token_BK: Tensor) -> Tensor:
        position_K = torch.arange(token_BK.shape[1], device=token_BK.device)
        with self.trunk.running(), attached(self.trunk.configs, self.prefix):
            return self._body(
                input_ids=token_BK,
                attention_mask=self.no_mask,
                position_ids=self.position_B1 + position_K,
                **{self.trunk.cache_name: self.own},
                use_cache=True,
            )[0]

    def keep(self, keep_k: Tensor) -> None:
        self.prefix.keep(keep_k)
        self.position_B1 = self.position_B1[keep_k]
        self.own.batch_select_indices(keep_k)


class StaticDecoder(SharedDecoder):
    """The same at fixed shapes and addresses: a step on a GPU is one launch of a CUDA graph, captured at the first.

    A decoder step of a small model is hundreds of kernels of microseconds, and launching them one by one takes longer
    than running them.
    """

    compaction_threshold = 0.5  # each time a graph is captured anew

    def _allocate(self, length: int) -> None:
        self._body = self.trunk.step_body
        self.written = torch.zeros(1, dtype=torch.long, device=self.position_B1.device)
        self.prefix.written = self.written
        self.own = own_cache(self.trunk.depth, length, self.written)
        self.token_B1 = torch.zeros_like(self.position_B1)
        self.graph: torch.cuda.CUDAGraph | None = None

    def step(self, token_B: Tensor) -> Tensor:
        self.token_B1.copy_(token_B[:, None])
        if self.token_B1.device.type == "cuda":
            if self.graph is None:
                self._capture()
            assert self.graph is not None
            self.graph.replay()
        else:
            self.hidden_BD = self._run(self.token_B1)[:, 0]
        # In place: the captured graph reads these addresses.
        self.written += 1
        self.position_B1 += 1
        return self.hidden_BD

    def _capture(self) -> None:
        """As PyTorch's notes on CUDA graphs ask: warm up on another stream. What that writes is written again."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._run(self.token_B1)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.hidden_BD = self._run(self.token_B1)[:, 0]

    def keep(self, keep_k: Tensor) -> None:
        super().keep(keep_k)
        self.token_B1, self.graph = self.token_B1[keep_k], None


class RepeatedDecoder:
    """Every row computes its own prompt and stays until the end: right for most models with a cache, and slow."""

    compaction_threshold = 0.0

    def __init__(self, trunk: Trunk, prompt_UP: Tensor, mask_UP: Tensor, source_B: Tensor) -> None:
        self.trunk, self.mask_BL = trunk, mask_UP[source_B]
        self.row_k = torch.arange(len(source_B), device=source_B.device)
        with trunk.running():
            # The cache of the model's own making: attention is not all that models keep.
            out = fill(trunk.body, prompt_UP[source_B], self.mask_BL)
        cache = cache_of(out)
        assert cache is not None  # else Trunk.caches would be False
        self.first_BD, self.cache = out[0][:, -1], cache

    def step(self, token_B: Tensor) -> Tensor:
        hidden_BKD, self.mask_BL = self._run(token_B[:, None], self.cache)
        return hidden_BKD[:, 0]

    def peek(self, token_BK: Tensor) -> Tensor:
        # A copy: not every cache (a recurrent state) can be cut back to what it was.
        return self._run(token_BK, copy.deepcopy(self.cache))[0]

    def _run(self, token_kK: Tensor, cache: Cache) -> tuple[Tensor, Tensor]:
        # Rows that left are fed token 0 and not read: not every cache can drop rows.
        token_BK = token_kK.new_zeros(len(self.mask_BL), token_kK.shape[1]).index_copy_(0, self.row_k, token_kK)
        with self.trunk.running():
            out, mask_BL = self.trunk.go_on(token_BK, self.mask_BL, cache)
        return out[0][self.row_k], mask_BL

    def keep(self, keep_k: Tensor) -> None:
        self.row_k = self.row_k[keep_k]


class WholeTextDecoder:
    """Every token is computed from the whole text: right for any causal LM, and much slower."""

    compaction_threshold = 0.0

    def __init__(self, trunk: Trunk, prompt_UP: Tensor, mask_UP: Tensor, source_B: Tensor) -> None:
        self.trunk = trunk
        self.prompt_BP, self.mask_BP = prompt_UP[source_B], mask_UP[source_B]
        self.token_BT = self.prompt_BP[:, :0]
        self.first_BD = self._hidden(self.token_BT)[:, -1]

    def step(self, token_B: Tensor) -> Tensor:
        self.token_BT = torch.cat([self.token_BT, token_B[:, None]], 1)
        return self._hidden(self.token_BT)[:, -1]

    def peek(self, token_BK: Tensor) -> Tensor:
        return self._hidden(torch.cat([self.token_BT, token_BK], 1))[:, -token_BK.shape[1] :]

    def _hidden(self, token_BT: Tensor) -> Tensor:
        mask_BT = torch.ones_like(token_BT, dtype=torch.bool)
        return self.trunk.hidden(self.prompt_BP, self.mask_BP, token_BT, mask_BT)

    def keep(self, keep_k: Tensor) -> None:
        self.prompt_BP, self.mask_BP = self.prompt_BP[keep_k], self.mask_BP[keep_k]
        self.token_BT = self.token_BT[keep_k]


def decoder(trunk: Trunk, prompt_UP: Tensor, mask_UP: Tensor, source_B: Tensor, length: int) -> Decoder:
    """Make the decoder for rows that go on from prompts, each prompt computed once where the model allows it.

    Args:
        trunk: the model.
        prompt_UP, mask_UP: int64 and bool, left-padded.
        source_B: int64, which prompt a row goes on from.
        length: at most so many tokens will be appended to a row.
    """
    trunk.ways_for(mask_UP, length)
    if not trunk.shares_prompts:
        return _apart(trunk)(trunk, prompt_UP, mask_UP, source_B)
    kind = StaticDecoder if trunk.static else SharedDecoder
    return kind(trunk, prompt_UP, mask_UP, source_B, length)


def _apart(trunk: Trunk) -> type[RepeatedDecoder] | type[WholeTextDecoder]:
    return RepeatedDecoder if trunk.caches else WholeTextDecoder


def lookahead(trunk: Trunk, prompt_UP: Tensor, mask_UP: Tensor, source_B: Tensor, length: int) -> Lookahead:
    """Make a decoder for search; arguments as `decoder`, where length counts the tokens that are looked at too."""
    # Never at fixed shapes: a peek has as many tokens as the search asks for, and a CUDA graph has one shape.
    trunk.ways_for(mask_UP, length)
    if not trunk.shares_prompts:
        return _apart(trunk)(trunk, prompt_UP, mask_UP, source_B)
    return SharedDecoder(trunk, prompt_UP, mask_UP, source_B, length)
