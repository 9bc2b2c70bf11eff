"""exact_match: 1 where a completion is the reference text, but for white space around it; else 0."""

from typing import Any

from textrl_gym.rewards import missing_reference


def reward(
    prompts: list[str], completions: list[str], completion: list[str] | None = None, **columns: list[Any]
) -> list[float]:
    """1.0 or 0.0 for each row; the reference is the rows' column `completion`."""
    if completion is None:
        raise missing_reference("exact_match", columns)
    return [float(text.strip() == reference.strip()) for text, reference in zip(completions, completion, strict=True)]
