"""Several completions of one prompt in one sequence: the prompt is computed once, and no completion sees another.


Shape legend: B prompts, P prompt positions, K completions a prompt, T positions a completion, L = P + K T.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from textrl_gym.functional import pad


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


def split(items: Sequence[Item], places: int) -> list[list[int]]:
    """Numbers of items in parts of which each has at most so many positions when it is packed, or one item."""
    parts: list[list[int]] = []
    prompt = most = width = 0
    for number, (prompt_ids, completions) in enumerate(items):
        prompt, most = max(prompt, len(prompt_ids)), max(most, len(completions))
        width = max(width, *map(len, completions), 0)
        if not parts or (len(parts[-1]) + 1) * (prompt + most * width) > places:
            parts.append([])
            prompt, most, width = len(prompt_ids), len(completions), max(map(len, completions), default=0)
        parts[-1].append(number)
    return parts


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
