"""AI feedback: a judge answers the questions that people would be asked, into labels of the same form (RLAIF).

The judge is whatever compares two texts: a language model behind an endpoint (judges.llm_judge), which is asked in both
orders, or a reward (Lee et al. 2023, arXiv:2309.00267).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from textrl_gym.data.labels import Item, ranks_of_scores
from textrl_gym.feedback.answers import LabelFile
from textrl_gym.judges.judge import Answer, Judge

AT_ONCE = 32
"""Questions that the judge is given together: those that were answered before a stop are not asked again."""


def answer_by_judge(items: Sequence[Item], file: LabelFile, judge: Judge) -> None:
    """Answer the questions that have no answer yet, by a judge; a pair without a verdict is passed over.

    Raises:
        ValueError: a question whose prompt is a conversation.
    """
    asked = file.unanswered(items)
    for item in asked:
        if not isinstance(item.prompt, str):
            raise ValueError(f"a judge reads prompts as texts, and question {item.id!r} has a conversation")
    for first in range(0, len(asked), AT_ONCE):
        some = asked[first : first + AT_ONCE]
        for item, ranks in zip(some, _ranks(some, judge), strict=True):
            file.add(item, judge.name, ranks)


def _ranks(items: Sequence[Item], judge: Judge) -> list[list[int] | None]:
    """The ranks of each question's completions: by how often each is preferred to the others."""
    rows, a, b, places = [], [], [], []
    for number, item in enumerate(items):
        for first, second in zip(*np.triu_indices(len(item.completions), 1), strict=True):
            rows.append({"prompt": item.prompt})
            a.append(Answer(item.completions[first]))
            b.append(Answer(item.completions[second]))
            places.append((number, first, second))
    outcome_N = judge.prefer(rows, a, b)
    won = [np.zeros(len(item.completions)) for item in items]
    for (number, first, second), outcome in zip(places, outcome_N, strict=True):
        won[number][first] += outcome
        won[number][second] += 1 - outcome
    return [None if np.isnan(scores).any() else ranks_of_scores(scores.tolist()) for scores in won]
