"""format: 1 where a whole completion fits a pattern, else 0: "format:<think>.*</think>.*"."""

import re
from collections.abc import Callable
from typing import Any


def make(argument: str | None) -> Callable[..., list[float]]:
    """The reward of a pattern for the whole completion, white space around it left out (`re.fullmatch`, "." is any).

    Raises:
        ValueError: no pattern, or an invalid one.
    """
    if not argument:
        raise ValueError("reward 'format' needs a pattern: format:PATTERN")
    try:
        pattern = re.compile(argument, re.DOTALL)
    except re.error as error:
        raise ValueError(f"reward 'format': {argument!r} is no regular expression: {error}") from error

    def reward(prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float]:
        """1.0 where the whole completion fits, else 0.0."""
        return [float(pattern.fullmatch(completion.strip()) is not None) for completion in completions]

    return reward
