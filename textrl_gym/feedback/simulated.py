"""Simulated annotators that answer questions as people would on the page: labels in the same file, of the same form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from textrl_gym.data.labels import Item, ranks_of_scores
from textrl_gym.feedback.answers import LabelFile
from textrl_gym.judges.annotators import Annotators

NAME = "simulated"
"""The annotator of their labels."""


def answer_all(
    items: Iterable[Item],
    file: LabelFile,
    annotators: Annotators,
    appeals: Mapping[str, list[float]] | None = None,
    seed: int = 0,
) -> None:
    """Answer the questions that have no answer yet.

    Args:
        items: with their gold scores.
        appeals: by item, what each completion seems worth beyond its gold score (`Task.appeal`); none: nothing.
        seed: of the annotators' chances. A question is answered alike whichever others there are.

    Raises:
        ValueError: a question without gold scores.
    """
    for item in file.unanswered(items):
        if item.gold is None:
            raise ValueError(f"simulated annotators judge by gold scores, and question {item.id!r} has none")
        seen = np.array(item.gold) + annotators.bias * np.array((appeals or {}).get(item.id, [0.0] * len(item.gold)))
        words = np.array([len(text.split()) for text in item.completions])
        # Every two completions by themselves; who wins more often has the better rank.
        rng = np.random.default_rng([seed, int(item.id, 16) % 2**32])
        first, second = np.triu_indices(len(seen), 1)
        wins = annotators.prefer(seen[first], seen[second], words[first], words[second], rng)
        won = np.bincount(np.where(wins, first, second), minlength=len(seen))
        file.add(item, NAME, ranks_of_scores(won.tolist()))
