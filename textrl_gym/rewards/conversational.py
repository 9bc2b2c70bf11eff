"""Conversational reward: a function that reads lists of messages, as TRL gives them where prompts are conversations.

`conversational:package.module:function` on the command line, `with_messages(function)` in Python. Rewards are given
texts here, whatever the prompts are; this gives such a function what it knows from TRL:

    prompts       [[{"role": "user", "content": ...}, ...], ...]     the column `chat`, or the text as a user's turn
    completions   [[{"role": "assistant", "content": ...}], ...]     in a conversation of several turns all behind it
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from textrl_gym import registry
from textrl_gym.core import Message
from textrl_gym.rewards import call_function


def make(argument: str | None) -> Callable[..., Any]:
    """The reward of a function that reads messages."""
    if argument is None:
        raise ValueError("reward 'conversational' needs a function: conversational:package.module:function")
    function = registry.load_object(argument)
    if not callable(function):
        raise ValueError(f"reward 'conversational:{argument}' is {function!r}, not a callable f(prompts, completions)")
    return with_messages(function)


def with_messages(function: Callable[..., Any]) -> Callable[..., Any]:
    """A reward that gives its texts to `function` as messages.

    Args:
        function: of TRL's signature for conversational data.
    """

    def reward(
        prompts: Sequence[str],
        completions: Sequence[str],
        chat: Sequence[list[Message] | None] | None = None,
        turns: Sequence[list[Message] | None] | None = None,
        **columns: Any,
    ) -> Any:
        texts = zip(prompts, chat or [None] * len(prompts), strict=True)
        asked = [messages or [{"role": "user", "content": text}] for text, messages in texts]
        replies = zip(completions, turns or [None] * len(completions), strict=True)
        answers = [messages or [{"role": "assistant", "content": text}] for text, messages in replies]
        return call_function(function, columns | {"prompts": asked, "completions": answers}, {})

    reward.__name__ = getattr(function, "__name__", type(function).__name__)  # what tables and errors call it
    return reward
