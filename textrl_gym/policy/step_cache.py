"""StepCache: what a model computed for observations, kept until they have grown by a token.

Stepping an environment shows a policy the whole text again at each token. Rows whose observation is the last one and a
token more go on from their keys and values; rows that began anew are computed whole. The numbers are those of the full
forward (a test), and where rows do not line up, or the model keeps more than plain keys and values, it is the full
forward.

Shape legend: B rows, R some of the rows, L positions, W the width of a pass, H key heads, D hidden width, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from textrl_gym.policy.backbone import Trunk, cache_of, position_ids

SLACK = 32
"""Columns that are filled before what is kept moves back to the front of its room."""


def aligned(input_BL: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Observations whose prefixes may differ in length, as rows that end at the same place, [B, W], and their mask.

    Each row's real tokens are one unbroken run, and mean the same wherever they stand.
    """
    mask_BL = mask_BL.bool()
    length_B, end_B = mask_BL.long().sum(1), ends(mask_BL)
    place_W = torch.arange(width := int(length_B.max()), device=input_BL.device)
    moved_mask_BW = place_W >= (width - length_B)[:, None]
    moved_BW = input_BL.gather(1, (end_B[:, None] - width + place_W).clamp(min=0)) * moved_mask_BW
    return moved_BW, moved_mask_BW


def ends(mask_BL: Tensor) -> Tensor:
    """One past the last real token of each row. int64 [B]."""
    return mask_BL.shape[1] - mask_BL.long().flip(1).argmax(1)


@dataclass
class _Seen:
    """The observations of the last call and what came out."""

    input_BL: Tensor
    mask_BL: Tensor
    length_B: Tensor
    end_B: Tensor
    hidden_BD: Tensor
    weights: int
    """Changes when an optimizer changes the weights in place."""


class _Room(DynamicLayer):
    """Keys and values of a layer, [B, H, columns, d]. Every row's last token stands in the same column."""

    def __init__(self, first: DynamicLayer, rows: int, columns: int) -> None:
        super().__init__()
        assert first.keys is not None and first.values is not None
        _, heads, _, width = first.keys.shape
        self.key_room = first.keys.new_zeros(rows, heads, columns, width)
        self.value_room = first.values.new_zeros(rows, heads, columns, first.values.shape[-1])
        self.is_initialized, self.begin, self.end = True, 0, 0

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        self.key_room[:, :, self.end] = key_states[:, :, 0]
        self.value_room[:, :, self.end] = value_states[:, :, 0]
        columns = slice(self.begin, self.end + 1)
        return self.key_room[:, :, columns], self.value_room[:, :, columns]

    def put(self, row_R: Tensor, whole: DynamicLayer, end: int) -> None:
        """The given rows' keys and values from a pass over the whole of them."""
        assert whole.keys is not None and whole.values is not None
        width = whole.keys.shape[2]
        self.key_room[row_R, :, end - width : end] = whole.keys
        self.value_room[row_R, :, end - width : end] = whole.values

    def move(self, begin: int, end: int) -> None:
        """The columns [begin, end) to the front."""
        for room in (self.key_room, self.value_room):
            # A clone, because source and target may overlap.
            room[:, :, : end - begin] = room[:, :, begin:end].clone()

    def get_seq_length(self) -> int:
        return self.end - self.begin


class StepCache:
    """The hidden states below the next token's logits, of observations that grow from call to call.

    Args:
        trunk: of the model.
    """

    def __init__(self, trunk: Trunk) -> None:
        self.trunk = trunk
        self._seen: _Seen | None = None
        self._rooms: list[_Room] = []
        self._end = 0

    def forget(self) -> None:
        """Compute the next observations whole, as must be done when the weights have changed."""
        self._seen, self._rooms = None, []

    def _weights(self) -> int:
        # An optimizer's step counts a parameter's version up; comparing the numbers would read the whole model.
        return sum(p._version for p in self.trunk.model.parameters())

    @torch.no_grad()
    def __call__(self, input_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """The last hidden state of each observation, [B, D]."""
        known_BD = self.find(input_BL, mask_BL)
        if known_BD is not None:
            return known_BD
        length_B, end_B = mask_BL.long().sum(1), ends(mask_BL)
        goes_on_B = self._goes_on(input_BL, mask_BL, end_B)
        if goes_on_B.any():
            hidden_BD = self._step(input_BL, mask_BL, length_B, end_B, goes_on_B)
        else:
            hidden_BD = self._start(input_BL, mask_BL)
        self._seen = _Seen(input_BL.clone(), mask_BL.clone(), length_B, end_B, hidden_BD, self._weights())
        return hidden_BD

    def find(self, input_BL: Tensor, mask_BL: Tensor) -> Tensor | None:
        """The hidden states of observations that were all among the last call's; else None."""
        seen = self._seen
        if seen is None or seen.input_BL.shape[1] != input_BL.shape[1] or seen.weights != self._weights():
            return None
        if torch.equal(seen.input_BL, input_BL) and torch.equal(seen.mask_BL, mask_BL):
            return seen.hidden_BD
        if len(input_BL) == len(seen.input_BL):
            return None  # a step on
        same_B = [
            ((seen.input_BL == row_L) & (seen.mask_BL == mask_L)).all(1)
            for row_L, mask_L in zip(input_BL, mask_BL, strict=True)
        ]
        if not all(bool(same.any()) for same in same_B):
            return None
        return seen.hidden_BD[[int(same.long().argmax()) for same in same_B]]

    def _goes_on(self, input_BL: Tensor, mask_BL: Tensor, end_B: Tensor) -> Tensor:
        """Which rows are the last call's and one token more. bool [B]."""
        seen = self._seen
        if seen is None or not self._rooms or seen.input_BL.shape != input_BL.shape:
            return torch.zeros_like(end_B, dtype=torch.bool)
        if seen.weights != self._weights():
            return torch.zeros_like(end_B, dtype=torch.bool)
        same_BL = (seen.input_BL == input_BL) & (seen.mask_BL == mask_BL)
        same_BL = same_BL.scatter(1, (end_B - 1)[:, None], True)
        return same_BL.all(1) & (end_B == seen.end_B + 1)

    def _whole(self, input_BL: Tensor, mask_BL: Tensor) -> tuple[Tensor, Cache | None]:
        """The full forward of some rows: last hidden states, and the cache that the model makes, if it makes one."""
        moved_BW, moved_mask_BW = aligned(input_BL, mask_BL)
        self.trunk.ways_for(moved_mask_BW, 0)
        if not self.trunk.caches:
            no_action_B0 = moved_BW[:, :0]
            return self.trunk.hidden(moved_BW, moved_mask_BW, no_action_B0, no_action_B0.bool())[:, 0], None
        out = self.trunk.run(
            input_ids=moved_BW,
            attention_mask=moved_mask_BW.long(),
            position_ids=position_ids(moved_mask_BW),
            use_cache=True,
        )
        return out[0][:, -1], cache_of(out)

    def _start(self, input_BL: Tensor, mask_BL: Tensor) -> Tensor:
        hidden_BD, cache = self._whole(input_BL, mask_BL)
        self._rooms = []
        # Exactly these: a sliding window, a recurrent state or a family's own cache cannot be put together by columns.
        if type(cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in cache.layers):
            rows, places = input_BL.shape
            self._rooms = [_Room(cast("DynamicLayer", layer), rows, places + SLACK) for layer in cache.layers]
            self._end = places
            self._put(torch.arange(rows, device=input_BL.device), cache)
        return hidden_BD

    def _put(self, row_R: Tensor, whole: Cache) -> None:
        for room, layer in zip(self._rooms, whole.layers, strict=True):
            room.put(row_R, cast("DynamicLayer", layer), self._end)

    def _step(self, input_BL: Tensor, mask_BL: Tensor, length_B: Tensor, end_B: Tensor, goes_on_B: Tensor) -> Tensor:
        """One more column for all rows; those that began anew are then written over."""
        places = input_BL.shape[1]
        if self._end == places + SLACK:
            for room in self._rooms:
                room.move(self._end - places, self._end)
            self._end = places
        # Rows that began anew take part as rows of one token, so that they do not widen the pass.
        length_B = torch.where(goes_on_B, length_B, 1)
        width = int(length_B.max())
        for room in self._rooms:
            room.begin, room.end = self._end - width + 1, self._end
        mask_BW = torch.arange(width, device=input_BL.device) >= (width - length_B)[:, None]
        hidden_BD = self.trunk.run(
            input_ids=input_BL.gather(1, (end_B - 1)[:, None]),
            attention_mask=mask_BW.long(),
            position_ids=(length_B - 1)[:, None],
            **{self.trunk.cache_name: Cache(layers=list(self._rooms))},
            use_cache=True,
        )[0][:, 0]
        self._end += 1
        row_R = (~goes_on_B).nonzero().squeeze(1)
        if len(row_R):
            hidden_RD, whole = self._whole(input_BL[row_R], mask_BL[row_R])
            assert whole is not None  # it was a DynamicCache at the start
            self._put(row_R, whole)
            hidden_BD = hidden_BD.index_copy(0, row_R, hidden_RD)
        return hidden_BD
