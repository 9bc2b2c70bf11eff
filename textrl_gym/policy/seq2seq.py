"""Seq2SeqTrunk: an encoder-decoder run on prompts and completions; each prompt is encoded once for all its rows.

The token MDP is that of a decoder alone: the state is the prompt and what was written, an action is a token. The prompt
goes to the encoder, without padding or with a mask behind it, and the decoder reads its start token and what was
written: its output at place t gives action t (T5: Raffel et al. 2020, arXiv:1910.10683, section 2.1; BART: Lewis et al.
2020, arXiv:1910.13461). Nothing is forced: a token that generate() would put first or last is the policy's to write.

Shape legend: U unique prompts, P prompt positions, S positions of the encoder, B rows, T response positions, X = T + 1,
K tokens that are looked at, L = P + T, N positions in any order, D the decoder's hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutput

from textrl_gym.models import packing, positions
from textrl_gym.policy import trial
from textrl_gym.policy.backbone import Head, ModelRunner, cache_name, cache_of, unique_prompts
from textrl_gym.policy.compiling import Compile
from textrl_gym.policy.trial import Ways


class Seq2SeqTrunk(ModelRunner):
    """An encoder-decoder of transformers with a language-model head, as a policy's backbone.

    Args:
        model: AutoModelForSeq2SeqLM's.
        dtype, adapter: as of ModelRunner.
        static, compile: must be False and "none".

    Raises:
        ValueError: the model names no decoder_start_token_id; or fixed shapes or compiled passes are asked for.
    """

    one_text: ClassVar[bool] = False

    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype = torch.float32,
        static: bool = False,
        adapter: bool = True,
        compile: Compile = "none",
    ) -> None:
        super().__init__(model, dtype, static, adapter)
        if static or compile != "none":
            raise ValueError(
                f"{type(self.model).__name__} is an encoder-decoder, for which there are no CUDA graphs and no "
                'torch.compile here: leave out cuda_graphs and compile (cuda_graphs=False, compile="none")'
            )
        model_parts: Any = self.model
        self.encoder, self.decoder_body = model_parts.get_encoder(), model_parts.get_decoder()
        self.cache_name = cache_name(self.decoder_body)
        packing.decoder_start(self.model)  # its absence is said at once
        self._prompt_places: dict[int, int | None] = {}

    # -- which ways are right -----------------------------------------------------------------------------------------

    def prepare(self, max_prompt_tokens: int, max_new_tokens: int) -> None:
        """Find out how the model may be run on prompts and completions of at most these lengths.

        Raises:
            ValueError: it has fewer positions, or no way of running it gives the numbers of its own forward.
        """
        positions.check(self.model, self.limit, max_prompt_tokens, max_new_tokens)
        # An observation does not say where its prompt ends. Two budgets of one width make that unknown, not a guess.
        width = max_prompt_tokens + max_new_tokens
        same = self._prompt_places.setdefault(width, max_prompt_tokens) == max_prompt_tokens
        self._prompt_places[width] = max_prompt_tokens if same else None
        self.try_out(max_prompt_tokens)

    def examine(self, length: int) -> Ways:
        return _examine(self, length)

    def _ways_for(self, mask_UP: Tensor) -> Ways:
        if self._ways is not None and trial.length(self.borders, mask_UP.shape[1]) <= self._tried:
            return self._ways
        return self.try_out(int(mask_UP.sum(1).max()))

    # -- passes -------------------------------------------------------------------------------------------------------

    def hidden(self, prompt_BP: Tensor, mask_BP: Tensor, action_BT: Tensor, action_mask_BT: Tensor) -> Tensor:
        """The last hidden states below the logits of each action and of one action more, [B, T + 1, D].

        Each different prompt is encoded once; gradients flow through prompts and actions alike.

        Args:
            prompt_BP, mask_BP: int64 and bool, left-padded.
            action_BT, action_mask_BT: the tokens that follow, right-padded.
        """
        first_U, source_B = unique_prompts(prompt_BP, mask_BP)
        with self.running():
            return self.decode(*self.encoded(prompt_BP[first_U], mask_BP[first_U], source_B), action_BT)

    def encoded(self, prompt_UP: Tensor, mask_UP: Tensor, source_B: Tensor) -> tuple[Tensor, Tensor]:
        """The encoder's states of each row's prompt and which of them are real, [B, S, D] and [B, S]."""
        encode = self.together if self._ways_for(mask_UP).pads else self.apart
        state_USD, real_US = encode(prompt_UP, mask_UP)
        return state_USD[source_B], real_US[source_B]

    def together(self, prompt_UP: Tensor, mask_UP: Tensor) -> tuple[Tensor, Tensor]:
        """The encoder's states of prompts side by side, padded behind their ends: a table's positions begin at 0."""
        id_US, real_US = padded_behind(prompt_UP, mask_UP)
        return self.encoder(input_ids=id_US, attention_mask=real_US.long())[0], real_US

    def apart(self, prompt_UP: Tensor, mask_UP: Tensor) -> tuple[Tensor, Tensor]:
        """The same of prompts that are encoded without any padding: those of one length together."""
        id_US, real_US = padded_behind(prompt_UP, mask_UP)
        length_U = real_US.sum(1)
        parts, rows = [], []
        for length in length_U.unique().tolist():
            row_u = (length_U == length).nonzero().squeeze(1)
            state_usD = self.encoder(input_ids=id_US[row_u, :length], attention_mask=real_US[row_u, :length].long())[0]
            parts.append(nn.functional.pad(state_usD, (0, 0, 0, id_US.shape[1] - length)))
            rows.append(row_u)
        return torch.cat(parts)[torch.cat(rows).argsort()], real_US

    def decode(self, state_BSD: Tensor, real_BS: Tensor, action_BT: Tensor) -> Tensor:
        """The decoder's last hidden states on its start token and actions, [B, T + 1, D]."""
        # No mask for the actions: what stands behind a row's end is seen by nothing that is read.
        return self.decoder_body(
            input_ids=packing.behind_start(self.model, action_BT),
            encoder_hidden_states=state_BSD,
            encoder_attention_mask=real_BS.long(),
            use_cache=False,
        )[0]

    # -- the head -----------------------------------------------------------------------------------------------------

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """The model's own forward behind its decoder, [N, V]: a head, tied or not, with its scale and its bias."""
        head = self.head
        with self.running():
            return head(hidden_ND)

    @cached_property
    def head(self) -> Callable[[Tensor], Tensor]:
        """The model with the decoder's hidden states given."""

        def as_actions(ids_1N: Tensor) -> dict[str, object]:
            nothing = BaseModelOutput(last_hidden_state=torch.zeros(1, 1, 1, device=ids_1N.device))
            return {"encoder_outputs": nothing, "decoder_input_ids": ids_1N}

        return Head(self.model, self.decoder_body, as_actions)

    def check_head(self) -> None:
        """Nothing: what is tried before (`examine`) are the logits."""

    # -- decoding and stepping ----------------------------------------------------------------------------------------

    def decoder(self, prompt_UP: Tensor, mask_UP: Tensor, source_B: Tensor, length: int) -> CachedRows | WholeRows:
        """Make a decoder; arguments as of `textrl_gym.policy.decoders.decoder`."""
        with self.running():
            encoded = self.encoded(prompt_UP, mask_UP, source_B)
        return CachedRows(self, *encoded) if self._ways_for(mask_UP).caches else WholeRows(self, *encoded)

    def lookahead(self, prompt_UP: Tensor, mask_UP: Tensor, source_B: Tensor, length: int) -> CachedRows | WholeRows:
        """Make a decoder for search; arguments as `decoder`."""
        return self.decoder(prompt_UP, mask_UP, source_B, length)

    def next_hidden(self, input_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """The hidden states below the next token's logits of observations, [B, D].

        Raises:
            ValueError: it is not known where the prompt ends in observations of this width, or none ends there.
        """
        places, mask_BL = self._prompt_end(input_BL.shape[1]), mask_BL.bool()
        if not mask_BL[:, places - 1].all():
            raise ValueError(f"an observation whose prompt ends at place {places} has no token before it")
        count_B = mask_BL[:, places:].sum(1)
        prompt, written = slice(0, places), slice(places, places + int(count_B.max()))
        hidden_BXD = self.hidden(input_BL[:, prompt], mask_BL[:, prompt], input_BL[:, written], mask_BL[:, written])
        return hidden_BXD[torch.arange(len(count_B), device=count_B.device), count_B]

    def _prompt_end(self, width: int) -> int:
        places = self._prompt_places.get(width)
        if places is None:
            known = width in self._prompt_places
            reason = "environments of different budgets have it" if known else "no budgets have it"
            raise ValueError(
                f"{type(self.model).__name__} is an encoder-decoder, and nothing says where the prompt ends in an "
                f"observation of {width} places ({reason}): call policy.try_out(env.max_prompt_tokens, "
                "env.max_new_tokens) of a policy that has one environment of this width"
            )
        return places

    def steps(self) -> WholeSteps:
        """`next_hidden` where a decoder alone would go on from what it computed for the observations before."""
        return WholeSteps(self)


def padded_behind(prompt_UP: Tensor, mask_UP: Tensor) -> tuple[Tensor, Tensor]:
    """Left-padded prompts with their padding behind them, as narrow as the longest, [U, S], and their mask."""
    length_U1, begin_U1 = mask_UP.sum(1, keepdim=True), mask_UP.long().argmax(1, keepdim=True)
    place_S = torch.arange(int(length_U1.max()), device=prompt_UP.device)
    real_US = place_S < length_U1
    return prompt_UP.gather(1, (begin_U1 + place_S).clamp(max=prompt_UP.shape[1] - 1)) * real_US, real_US


class WholeSteps:
    """Hidden states of observations, computed whole at each step.

    Args:
        trunk: of the model.
    """

    def __init__(self, trunk: Seq2SeqTrunk) -> None:
        self.trunk = trunk

    def __call__(self, input_BL: Tensor, mask_BL: Tensor) -> Tensor:
        return self.trunk.next_hidden(input_BL, mask_BL)

    def find(self, input_BL: Tensor, mask_BL: Tensor) -> Tensor | None:
        """None: nothing is kept."""
        return None

    def forget(self) -> None:
        """Nothing is kept."""


class CachedRows:
    """A Lookahead that goes on from the decoder's cache: own keys and values, and those of the encoder's states."""

    compaction_threshold = 0.1  # those that stay have their caches copied

    def __init__(self, trunk: Seq2SeqTrunk, state_BSD: Tensor, real_BS: Tensor) -> None:
        self.trunk, self.state_BSD, self.real_BS = trunk, state_BSD, real_BS
        self.cache: Cache | None = None
        start_B1 = packing.behind_start(trunk.model, real_BS.new_zeros((len(real_BS), 0), dtype=torch.long))
        self.first_BD = self.step(start_B1[:, 0])

    def step(self, token_B: Tensor) -> Tensor:
        return self._run(token_B[:, None])[:, 0]

    def peek(self, token_BK: Tensor) -> Tensor:
        hidden_BKD = self._run(token_BK)
        cache: Any = self.cache
        cache.crop(-token_BK.shape[1])
        return hidden_BKD

    def _run(self, token_BK: Tensor) -> Tensor:
        with self.trunk.running():
            out = self.trunk.decoder_body(
                input_ids=token_BK,
                encoder_hidden_states=self.state_BSD,
                encoder_attention_mask=self.real_BS.long(),
                **{self.trunk.cache_name: self.cache},
                use_cache=True,
            )
        self.cache = cache_of(out)
        return out[0]

    def keep(self, keep_k: Tensor) -> None:
        cache: Any = self.cache
        cache.batch_select_indices(keep_k)
        self.state_BSD, self.real_BS = self.state_BSD[keep_k], self.real_BS[keep_k]


class WholeRows:
    """A Lookahead that computes the whole completion for every token: slower, and right without a cache."""

    compaction_threshold = 0.0

    def __init__(self, trunk: Seq2SeqTrunk, state_BSD: Tensor, real_BS: Tensor) -> None:
        self.trunk, self.state_BSD, self.real_BS = trunk, state_BSD, real_BS
        self.token_BT = real_BS.new_zeros((len(real_BS), 0), dtype=torch.long)
        self.first_BD = self._hidden(self.token_BT)[:, -1]

    def step(self, token_B: Tensor) -> Tensor:
        self.token_BT = torch.cat([self.token_BT, token_B[:, None]], 1)
        return self._hidden(self.token_BT)[:, -1]

    def peek(self, token_BK: Tensor) -> Tensor:
        return self._hidden(torch.cat([self.token_BT, token_BK], 1))[:, -token_BK.shape[1] :]

    def _hidden(self, token_BT: Tensor) -> Tensor:
        with self.trunk.running():
            return self.trunk.decode(self.state_BSD, self.real_BS, token_BT)

    def keep(self, keep_k: Tensor) -> None:
        self.state_BSD, self.real_BS, self.token_BT = (
            self.state_BSD[keep_k],
            self.real_BS[keep_k],
            self.token_BT[keep_k],
        )


# -- which ways are right ---------------------------------------------------------------------------------------------


@torch.no_grad()
def _examine(trunk: Seq2SeqTrunk, longest: int) -> Ways:
    """Compare the ways of running an encoder-decoder with its plain forward, on prompts of at most so many tokens.

    Raises:
        ValueError: its plain forward cannot be run, looks ahead, or is given by none of the ways.
    """
    prompts, source_B, action_BT = _made_up(trunk, longest)

    def logits(encoded: tuple[Tensor, Tensor], hidden: Callable[..., Tensor] = trunk.decode) -> Tensor:
        hidden_BXD = hidden(*encoded, action_BT)
        return trunk.head(hidden_BXD.flatten(0, 1)).unflatten(0, hidden_BXD.shape[:2])

    def of_rows(encode: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        state_USD, real_US = encode(*prompts)
        return state_USD[source_B], real_US[source_B]

    with trunk.exact():
        truth_BXV = _truth(trunk, prompts, source_B, action_BT)
        like_truth = partial(trial.closeness(truth_BXV), truth_BXV)
        pads = trial.tried(like_truth, lambda: logits(of_rows(trunk.together)))
        encode = trunk.apart if pads else trunk.together
        if pads:
            alone = trial.tried(like_truth, lambda: logits(of_rows(encode)))
            if alone:
                raise ValueError(
                    f"{type(trunk.model).__name__} is no policy here: neither its encoder and decoder by themselves "
                    f"({alone}) nor with padding behind the prompts ({pads}) give the logits of its own forward"
                )
        caches = trial.tried(like_truth, lambda: logits(of_rows(encode), partial(_stepped, trunk)))
    reasons = []
    if pads:
        reasons.append(f"cannot be padded ({pads}): prompts of one length are encoded together, which is slower")
    if caches:
        reasons.append(
            f"cannot go on from its cache ({caches}): each token is computed from the whole completion, which is slower"
        )
    return Ways(True, not pads, not caches, tuple(reasons))


def _made_up(trunk: Seq2SeqTrunk, longest: int) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """Left-padded prompts of unequal length with their mask, the prompt of each row, and the rows' actions."""
    tokens = torch.tensor(trial.plain_tokens(trunk.model.config))
    lengths = sorted({longest, min(longest, 2), 1} | {b - 1 for b in trunk.borders if 1 < b <= longest}, reverse=True)
    steps = min(trial.STEPS, (trunk.limit or trial.STEPS + 1) - 1)  # the start token has a position too
    source = [0, *range(len(lengths))]
    generator = torch.Generator().manual_seed(0)
    prompt_UP = tokens[torch.randint(len(tokens), (len(lengths), longest), generator=generator)]
    action_BT = tokens[torch.randint(len(tokens), (len(source), steps), generator=generator)]
    mask_UP = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
    device = trunk.device
    prompts = ((prompt_UP * mask_UP).to(device), mask_UP.to(device))
    return prompts, torch.tensor(source, device=device), action_BT.to(device)


def _truth(trunk: Seq2SeqTrunk, prompts: tuple[Tensor, Tensor], source_B: Tensor, action_BT: Tensor) -> Tensor:
    """The logits of each row alone, of its actions and of one action more, [B, X, V]."""
    model: Any = trunk.model
    name, (prompt_UP, mask_UP) = type(model).__name__, prompts

    def alone(u: int, action_T: Tensor) -> Tensor:
        decoder_ids = packing.behind_start(model, action_T[None])
        ids_1P = prompt_UP[u][mask_UP[u]][None]
        return model(input_ids=ids_1P, decoder_input_ids=decoder_ids, use_cache=False).logits[0]

    try:
        truth_BXV = torch.stack([alone(u, action_BT[b]) for b, u in enumerate(source_B.tolist())])
        before_XV = alone(int(source_B[0]), action_BT[0, :-1])
    except Exception as error:  # whatever a family of models raises
        raise ValueError(f"{name} cannot be run on text alone: {trial.words(error)}") from error
    if not torch.isfinite(truth_BXV).all():
        raise ValueError(f"{name} gives NaN or infinity on plain text")
    if not trial.closeness(truth_BXV)(truth_BXV[0, : len(before_XV)], before_XV):
        raise ValueError(f"{name} is no policy: what its decoder says of a completion's beginning changes with its end")
    return truth_BXV


def _stepped(trunk: Seq2SeqTrunk, state_BSD: Tensor, real_BS: Tensor, action_BT: Tensor) -> Tensor:
    """The hidden states by the cache, as decoding and search have them: [B, T + 1, D]."""
    rows = CachedRows(trunk, state_BSD, real_BS)
    hidden = [rows.first_BD]
    for t in range(action_BT.shape[1]):
        rows.peek(action_BT[:, t:])  # it must leave nothing behind
        hidden.append(rows.step(action_BT[:, t]))
    return torch.stack(hidden, 1)
