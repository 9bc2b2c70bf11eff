"""The environment's side of conversations: it answers turns of the agent, and says which conversations are over.

Stepping and collect() both ask `Turns.answer`, so that a conversation is the same in both.

Shape legend: N turns that have ended.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from textrl_gym.bounds import shown
from textrl_gym.core import Message, Reply, Row, StopReason
from textrl_gym.data.encoding import Chat, control_ids
from textrl_gym.data.turn_markers import TurnMarkers, TurnTemplate, markers_of_template
from textrl_gym.mdp.transition import turn_reasons

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from textrl_gym.mdp.scorer import Scorer
    from textrl_gym.mdp.task import Task


@dataclass
class Conversation:
    """What was said in an episode so far."""

    row: Row
    turns: list[Message] = field(default_factory=list)
    """Behind the prompt, the agent's first."""
    spans: list[tuple[int, int]] = field(default_factory=list)
    """Where the agent's turns begin and end among the tokens behind the prompt."""

    @property
    def number(self) -> int:
        """How many turns the agent has ended."""
        return len(self.spans)

    @property
    def action_mask(self) -> list[bool]:
        """Which tokens behind the prompt are the agent's, up to the end of its last turn."""
        mask = [False] * self.spans[-1][1]
        for start, end in self.spans:
            mask[start:end] = [True] * (end - start)
        return mask


class Answer(NamedTuple):
    """What follows a turn of the agent."""

    reward: float
    """Of the turn."""
    stop: StopReason
    """RUNNING: the agent moves again."""
    ids: list[int]
    """To be appended behind the turn; none where the conversation is over."""
    text: str
    """The reply; "" where the agent has ended the conversation itself."""


class Turns:
    """The environment's side of a task with replies.

    Args:
        task: whose `replies` are asked for.
        tokenizer: of the model.
        scorer: gives the agent's words as text.
        end_ids: the tokens that end an episode of a single turn; here they end a turn.
        chats: whether prompts are conversations that the chat template writes.
        turn_template: "exact" or "raw", see data.turn_markers.
        max_turns: the budget of the agent's turns.
        max_turn_tokens: that of a turn; None: all that are left.
        max_new_tokens: that of all turns and replies.

    Raises:
        ValueError: the chat template rewrites earlier turns; or a token that ends conversations is none.
    """

    def __init__(
        self,
        task: Task,
        tokenizer: PreTrainedTokenizerBase,
        scorer: Scorer,
        *,
        end_ids: Sequence[int],
        chats: bool,
        turn_template: TurnTemplate,
        max_turns: int,
        max_turn_tokens: int | None,
        max_new_tokens: int,
    ) -> None:
        self.task, self.scorer = task, scorer
        self.max_turns, self.max_new_tokens = max_turns, max_new_tokens
        self.max_turn_tokens = max_new_tokens if max_turn_tokens is None else max_turn_tokens
        self._raw = TurnMarkers(tokenizer, *task.turn_markers)
        self._chat = markers_of_template(tokenizer, turn_template) if chats else self._raw
        self.closing_ids = tuple(_id_of(name, tokenizer) for name in task.ends_conversation)
        """The tokens by which the agent ends the whole conversation."""
        own = [i for i in (self._chat.end_id, self._raw.end_id) if i is not None]
        self.end_ids = tuple(dict.fromkeys([*end_ids, *own, *self.closing_ids]))
        """The tokens that end a turn of the agent, the usual one first."""

    def answer(
        self, conversations: Sequence[Conversation], turn_ids: Sequence[Sequence[int]], length_N: Sequence[int]
    ) -> list[Answer]:
        """Reply to N turns of the agent, which go into the conversations, and so do the replies.

        Args:
            conversations: those that the turns belong to.
            turn_ids: the tokens of each turn.
            length_N: the tokens behind each prompt, the turn's included.

        Raises:
            ValueError: the task's reply is none, or has a word without a token.
        """
        for conversation, ids, length in zip(conversations, turn_ids, length_N, strict=True):
            conversation.turns.append({"role": "assistant", "content": self.scorer.text(ids)})
            conversation.spans.append((length - len(ids), length))
        closed_N = np.array([ids[-1] in self.closing_ids for ids in turn_ids])
        replies = self._replies([one for one, closed in zip(conversations, closed_N, strict=True) if not closed])
        reply_N = [Reply("") if closed else replies.pop(0) for closed in closed_N]
        ids_N = [
            [] if reply.done or closed else self._encode(conversation.row, reply, ids)
            for conversation, reply, ids, closed in zip(conversations, reply_N, turn_ids, closed_N, strict=True)
        ]
        stop_N = turn_reasons(
            closed_N,
            np.array([reply.done for reply in reply_N]),
            np.array([one.number for one in conversations]),
            np.array([n + len(ids) for n, ids in zip(length_N, ids_N, strict=True)]),
            self.max_turns,
            self.max_new_tokens,
        )
        for conversation, reply, closed in zip(conversations, reply_N, closed_N, strict=True):
            if not closed:
                conversation.turns.append({"role": "user", "content": reply.text})
        return [
            Answer(float(reply.reward), StopReason(stop), ids if stop == StopReason.RUNNING else [], reply.text)
            for reply, stop, ids in zip(reply_N, stop_N.tolist(), ids_N, strict=True)
        ]

    def _replies(self, conversations: Sequence[Conversation]) -> list[Reply]:
        if not conversations:
            return []
        # Copies: a task that writes into the turns would change the episode.
        turns = [[dict(turn) for turn in one.turns] for one in conversations]
        replies = list(self.task.replies([one.row for one in conversations], turns))
        name = type(self.task).__name__
        if len(replies) != len(conversations):
            raise ValueError(f"{name}.replies must give {len(conversations)} replies, got {len(replies)}")
        for reply in replies:
            _check_reply(name, reply)
        return replies

    def _encode(self, row: Row, reply: Reply, turn_ids: Sequence[int]) -> list[int]:
        markers = self._chat if isinstance(row.get("chat"), Chat) else self._raw
        written = self.scorer.decode(turn_ids) if self.scorer.stop else ""
        stop = next((text for text in self.scorer.stop if written.endswith(text)), "")
        return markers.encode(reply.text, turn_ids[-1], stop)


def _check_reply(name: str, reply: Any) -> None:
    if not isinstance(reply, Reply):
        raise ValueError(f"{name}.reply must give a textrl_gym.Reply, got {shown(reply)}")
    reward: Any = reply.reward
    number = isinstance(reward, int | float | np.number) and math.isfinite(reward)
    if not isinstance(reply.text, str) or not number or not isinstance(reply.done, bool | np.bool_):
        raise ValueError(f"{name}.reply must give Reply(text, a finite reward, done), got {shown(reply)}")


def _id_of(name: str, tokenizer: PreTrainedTokenizerBase) -> int:
    index: Any = tokenizer.convert_tokens_to_ids(name)
    if index not in control_ids(tokenizer):
        raise ValueError(f"ends_conversation names {name!r}, which is no special or added token of the tokenizer")
    return int(index)
