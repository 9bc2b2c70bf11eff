"""Several completions of one prompt in one pass: the prompt is computed once, and no completion sees another.

A decoder alone reads them as one sequence (Packed), an encoder-decoder as rows behind one encoded prompt (Paired).

Shape legend: B prompts, P prompt positions, K completions a prompt, T positions a completion, L = P + K T, S = K T + 1,
R completions of all prompts, N their tokens, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from textrl_gym.functional import halved, pad


@dataclass(frozen=True)
class Packed:
    """Prompts, left-padded, each followed by K blocks with a right-padded completion; 0 outside the masks."""

    input_BL: Tensor
    """int64."""
    sees_BLL: Tensor
    """bool: which positions (last dimension) a position attends to."""
    position_BL: Tensor
    """int64, counting real tokens of the prompt and of the own completion only."""
    token_BKT: Tensor
    """int64, the completions again."""
    mask_BKT: Tensor
    """bool, made from lengths; of dialogues the agent's tokens only."""

    @property
    def prompt_places(self) -> int:
        """P."""
        return self.input_BL.shape[1] - self.token_BKT[0].numel()

    @property
    def count(self) -> Tensor:
        """How many tokens are learnt, int64 []."""
        return self.mask_BKT.sum()

    def learnt(self, model: PreTrainedModel) -> tuple[Tensor, Tensor]:
        """The model's logits of each token that is learnt, [N, V], and these tokens, [N]."""
        rows, most, width = self.token_BKT.shape
        # The prompt's last place predicts every first token; place t of a completion predicts its token t + 1.
        # The head is applied to completions only: prompts are most of the places and are not learnt.
        logits_BSV = model(**self.inputs(model), logits_to_keep=most * width + 1).logits[:, -(most * width + 1) :]
        place_KT = torch.arange(most * width).view(most, width)
        place_KT[:, 0] = 0
        mask_BKT = self.mask_BKT
        row_N = torch.arange(rows)[:, None, None].expand(mask_BKT.shape)[mask_BKT]
        logits_NV = logits_BSV[row_N, place_KT.expand(mask_BKT.shape)[mask_BKT]]
        return logits_NV, self.token_BKT[mask_BKT].to(model.device)

    def inputs(self, model: PreTrainedModel) -> dict[str, Any]:
        """Keyword arguments of a transformers decoder, on its device."""
        # An additive mask of four dimensions: models pass it on as it is, and a flat one could not part completions.
        dtype = model.dtype
        # Of bfloat16 also where weights are float32: autocast would make infinity of float32's least number, and NaN of
        # a padded position, which sees nothing.
        least = torch.finfo(torch.bfloat16 if dtype == torch.float32 else dtype).min
        mask_B1LL = torch.zeros(self.sees_BLL.shape, dtype=dtype).masked_fill_(~self.sees_BLL, least)
        return {
            "input_ids": self.input_BL.to(model.device),
            "attention_mask": mask_B1LL.unsqueeze(1).to(model.device),
            "position_ids": self.position_BL.to(model.device),
            "use_cache": False,
        }


@dataclass(frozen=True)
class Paired:
    """Prompts and their completions, apart; both padded behind their ends, 0 outside the masks."""

    prompt_BP: Tensor
    """int64, each prompt once."""
    prompt_mask_BP: Tensor
    source_R: Tensor
    """int64, which prompt a completion answers."""
    token_RT: Tensor
    """int64."""
    mask_RT: Tensor
    """bool."""

    @property
    def count(self) -> Tensor:
        """How many tokens are learnt, int64 []."""
        return self.mask_RT.sum()

    def learnt(self, model: PreTrainedModel) -> tuple[Tensor, Tensor]:
        """The model's logits of each token that is learnt, [N, V], and these tokens, [N]."""
        whole: Any = model
        mask_BP, token_RT = self.prompt_mask_BP.long().to(model.device), self.token_RT.to(model.device)
        # Each prompt once: its states serve all its completions, and gradients of all of them come back to it.
        state_BPD = whole.get_encoder()(input_ids=self.prompt_BP.to(model.device), attention_mask=mask_BP)[0]
        logits_RTV = whole(
            encoder_outputs=BaseModelOutput(last_hidden_state=state_BPD[self.source_R]),
            attention_mask=mask_BP[self.source_R],
            decoder_input_ids=behind_start(model, token_RT[:, :-1]),
            use_cache=False,
        ).logits
        return logits_RTV[self.mask_RT], token_RT[self.mask_RT]


def decoder_start(model: PreTrainedModel) -> int:
    """The token that the decoder of an encoder-decoder starts from (T5: its padding; BART: its EOS).

    Raises:
        ValueError: the model names none.
    """
    for config in (model.config, getattr(model, "generation_config", None)):
        start = getattr(config, "decoder_start_token_id", None)
        if isinstance(start, int):
            return start
    raise ValueError(
        f"{type(model).__name__} names no decoder_start_token_id: set model.config.decoder_start_token_id to the token "
        "that its decoder starts from"
    )


def behind_start(model: PreTrainedModel, token_RT: Tensor) -> Tensor:
    """What the decoder of an encoder-decoder reads where tokens have been written, [R, T + 1]."""
    return nn.functional.pad(token_RT, (1, 0), value=decoder_start(model))


class Dialogue(list[int]):
    """Token ids of a conversation behind its prompt, a completion of which the agent's tokens alone are learnt."""

    def __init__(self, ids: Sequence[int], actions: Sequence[bool]) -> None:
        """actions: which of the ids are the agent's."""
        super().__init__(ids)
        self.actions = list(actions)


def learnt_tokens(completion: list[int]) -> list[bool]:
    """Which tokens of a completion are learnt: all, but for what the environment says in a dialogue."""
    return completion.actions if isinstance(completion, Dialogue) else [True] * len(completion)


Item = tuple[list[int], list[list[int]]]
"""Prompt ids, and the ids of its completions, which may be Dialogues."""


def split(items: Sequence[Item], places: int, multiple_of: int = 1) -> list[list[int]]:
    """Numbers of items in parts of which each has at most so many positions when it is packed, or one item.

    Args:
        multiple_of: so many parts, or twice so many, ..., as far as there are items: as many for each process.
    """
    parts: list[list[int]] = []
    prompt = most = width = 0
    for number, (prompt_ids, completions) in enumerate(items):
        prompt, most = max(prompt, len(prompt_ids)), max(most, len(completions))
        width = max(width, *map(len, completions), 0)
        if not parts or (len(parts[-1]) + 1) * (prompt + most * width) > places:
            parts.append([])
            prompt, most, width = len(prompt_ids), len(completions), max(map(len, completions), default=0)
        parts[-1].append(number)
    return halved(parts, multiple_of)


def pack(items: Sequence[Item]) -> Packed:
    """One batch of (prompt ids, ids of its completions); where a prompt has fewer than K, the rest is masked."""
    most = max(len(completions) for _, completions in items)
    prompt_BP, prompt_mask_BP = pad([prompt for prompt, _ in items], "left")
    texts = [ids for _, completions in items for ids in [*completions, *[[]] * (most - len(completions))]]
    token_XT, mask_XT = pad(texts, "right")
    learnt_XT = pad([[int(own) for own in learnt_tokens(ids)] for ids in texts], "right")[0].bool()
    rows, prompt_places, width = len(items), prompt_BP.shape[1], token_XT.shape[1]

    place_L = torch.arange(prompt_places + most * width)
    block_L = torch.where(place_L < prompt_places, -1, (place_L - prompt_places) // width)
    related_LL = (block_L == -1) | (block_L[:, None] == block_L)
    real_BL = torch.cat([prompt_mask_BP, mask_XT.view(rows, -1)], 1)
    length_B1 = prompt_mask_BP.sum(1, keepdim=True)
    return Packed(
        input_BL=torch.cat([prompt_BP, token_XT.view(rows, -1)], 1),
        sees_BLL=(place_L[:, None] >= place_L) & related_LL & real_BL[:, None, :],
        position_BL=torch.where(
            block_L == -1,
            # Left padding counts for nothing; each completion goes on where the prompt ends, as if it were alone.
            (place_L - prompt_places + length_B1).clamp(min=0),
            length_B1 + (place_L - prompt_places) % width,
        ),
        token_BKT=token_XT.view(rows, most, width),
        mask_BKT=learnt_XT.view(rows, most, width),
    )


def pair(items: Sequence[Item]) -> Paired:
    """One batch of (prompt ids, ids of its completions) for an encoder-decoder.

    Raises:
        ValueError: a completion is a Dialogue, whose replies an encoder-decoder has no place for yet.
    """
    texts = [ids for _, completions in items for ids in completions]
    if any(isinstance(ids, Dialogue) for ids in texts):
        raise ValueError("an encoder-decoder cannot learn conversations (turns) here yet: take a decoder alone")
    source_R = torch.tensor([row for row, (_, completions) in enumerate(items) for _ in completions])
    return Paired(*pad([prompt for prompt, _ in items], "right"), source_R, *pad(texts, "right"))


def batch(items: Sequence[Item], model: PreTrainedModel) -> Packed | Paired:
    """One batch of (prompt ids, ids of its completions) as the model reads them."""
    return pair(items) if model.config.is_encoder_decoder else pack(items)
