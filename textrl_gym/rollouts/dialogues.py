"""Conversations while they are sampled: rows whose environment speaks are fed its tokens while others sample.

All rows stand at the same position behind their prompts, whoever wrote the token there. So caches, shared prompts,
compaction and fixed shapes are those of a single turn, whatever the lengths of replies.

Shape legend: B rows, b of them that are still in the batch, T response positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from textrl_gym.core import Row, StopReason
from textrl_gym.mdp.transition import turns_over
from textrl_gym.mdp.turns import Conversation, Turns


class Dialogues:
    """The environment's side of B conversations that are being sampled.

    Args:
        turns: of the environment.
        rows: of the prompts.
        places: T.
    """

    def __init__(self, turns: Turns, rows: Sequence[Row], places: int, device: torch.device) -> None:
        self.turns, self.conversations = turns, [Conversation(row) for row in rows]
        shape = (len(rows), places)
        self.reply_BT = torch.zeros(shape, dtype=torch.bool, device=device)
        """Positions of the environment's tokens, also of those that are still to be fed."""
        self.turn_BT = torch.zeros(shape, dtype=torch.long, device=device)
        self.turn_reward_BT = torch.zeros(shape, device=device)
        self._start_B = torch.zeros(len(rows), dtype=torch.long, device=device)

    def forced(self, token_BT: Tensor, row_b: Tensor, t: int, token_b: Tensor) -> Tensor:
        """The sampled tokens, or the environment's where position t is its own. [b]"""
        return torch.where(self.reply_BT[row_b, t], token_BT[row_b, t], token_b)

    def reasons(self, token_BT: Tensor, row_b: Tensor, t: int, alive_b: Tensor, token_b: Tensor) -> Tensor:
        """Let the environment reply where the agent's turn ends with token t; its tokens are written behind.

        A wait for the device at each token: only the host knows what the environment says.

        Args:
            token_BT: the tokens of all rows up to t, changed in place.
            alive_b: bool, rows that have not ended before.
            token_b: token t of each.

        Returns:
            why conversations end here, as StopReason; RUNNING where they do not. int64 [b].
        """
        acting_b = alive_b & ~self.reply_BT[row_b, t]
        turns, start_b = self.turns, self._start_B[row_b]
        length_b = torch.full_like(row_b, t + 1)
        budgets = (turns.max_turn_tokens, turns.max_new_tokens)
        hit_b = self._stop_hits(token_BT, row_b, t, acting_b) if turns.scorer.stop else None
        over_b = turns_over(token_b, length_b - start_b, length_b, hit_b, *budgets, turns.end_ids)
        place_k = (over_b & acting_b).nonzero().squeeze(1)
        reason_b = torch.full_like(row_b, StopReason.RUNNING.value)
        if len(place_k) == 0:
            return reason_b
        rows, starts = row_b[place_k].tolist(), start_b[place_k].tolist()
        ids = [token_BT[b, start : t + 1].tolist() for b, start in zip(rows, starts, strict=True)]
        numbers = [self.conversations[b].number for b in rows]
        answers = turns.answer([self.conversations[b] for b in rows], ids, [t + 1] * len(rows))
        for b, start, number, answer in zip(rows, starts, numbers, answers, strict=True):
            end = t + 1 + len(answer.ids)
            self.turn_BT[b, start:end] = number
            self.reply_BT[b, t + 1 : end] = True
            token_BT[b, t + 1 : end] = torch.tensor(answer.ids, dtype=torch.long, device=token_BT.device)
            self.turn_reward_BT[b, t] = answer.reward
            self._start_B[b] = end
        reason_b[place_k] = torch.tensor([a.stop.value for a in answers], device=reason_b.device)
        return reason_b

    def _stop_hits(self, token_BT: Tensor, row_b: Tensor, t: int, acting_b: Tensor) -> Tensor:
        """Whether each acting row's turn completes a stop string with token t. bool [b]."""
        hit_b = torch.zeros_like(acting_b)
        place_k = acting_b.nonzero().squeeze(1)
        rows = row_b[place_k]
        spans = zip(token_BT[rows, : t + 1].tolist(), self._start_B[rows].tolist(), strict=True)
        hits = self.turns.scorer.completes_stop([ids[start:] for ids, start in spans])
        hit_b[place_k] = torch.tensor(hits, dtype=torch.bool, device=hit_b.device)
        return hit_b
