"""What a conversation was, from the turns of one side: the other side is a function of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from textrl_gym.core import Message, Reply, Row

Other = Callable[[Row, Sequence[Message]], Reply]
"""The scripted other side of a conversation: `reply(row, turns)`, as `mdp.task.Task.reply`."""


def replay(other: Other, row: Row, text: str) -> tuple[list[Message], list[Reply]]:
    """What a conversation was, from what the agent said alone: the other side is a function of it.

    Args:
        text: the agent's turns, a line each.

    Returns:
        the turns of both sides, and the replies among them. Both end where the other side has ended it.
    """
    turns: list[Message] = []
    replies: list[Reply] = []
    for line in text.split("\n") if text else ():
        turns.append({"role": "assistant", "content": line})
        replies.append(other(row, turns))
        turns.append({"role": "user", "content": replies[-1].text})
        # What a text has behind the end of its conversation was never answered.
        if replies[-1].done:
            break
    return turns, replies
