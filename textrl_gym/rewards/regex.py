"""regex: 1 where a pattern is found in a completion, else 0. "regex:PATTERN", as "regex:^ [A-Z].*\\.$"."""

import re
from collections.abc import Callable
from typing import Any


def make(argument: str | None) -> Callable[..., list[float]]:
    """The reward of a pattern, which is searched for (`re.search`): anchor it with ^ and $ to match the whole text.

    Raises:
        ValueError: no pattern, or an invalid one.
    """
    if not argument:
        raise ValueError("reward 'regex' needs a pattern: regex:PATTERN")
    try:
        pattern = re.compile(argument)
    except re.error as error:
        raise ValueError(f"reward 'regex': {argument!r} is no regular expression: {error}") from error

    def reward(prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float]:
        """1.0 where the pattern is found, else 0.0."""
        return [float(pattern.search(completion) is not None) for completion in completions]

    return reward
