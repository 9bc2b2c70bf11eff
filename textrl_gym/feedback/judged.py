"""AI feedback: a judge answers the questions that people would be asked, into labels of the same form (RLAIF).

The judge is whatever compares two texts: a language model (judges.llm_judge), which is asked in both orders and may say
how sure it is, or a reward (Lee et al. 2023, arXiv:2309.00267).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from textrl_gym.data.labels import Item, Label, ranks_of_scores
from textrl_gym.feedback.answers import LabelFile
from textrl_gym.judges.judge import Answer, Judge, compare
from textrl_gym.stats.estimates import Array

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
        for item, verdict in zip(some, _verdicts(some, judge), strict=True):
            file.add(item, judge.name, verdict.ranks, probabilities=verdict.probabilities, flips=verdict.flips)


class _Verdict(NamedTuple):
    """What a judge says of a question's completions; fields as of `data.labels.Label`."""

    ranks: list[int] | None
    probabilities: list[float] | None
    flips: int | None


def _verdicts(items: Sequence[Item], judge: Judge) -> list[_Verdict]:
    """Of each question, from what is said of every two of its completions."""
    rows, a, b, number_N = [], [], [], []
    for number, item in enumerate(items):
        for first, second in itertools.combinations(item.completions, 2):
            rows.append({"prompt": item.prompt})
            a.append(Answer(first))
            b.append(Answer(second))
            number_N.append(number)
    comparisons_3N = np.stack(compare(judge, rows, a, b))
    return [_verdict(item, comparisons_3N[:, np.array(number_N) == number]) for number, item in enumerate(items)]


def _verdict(item: Item, comparisons_3P: Array) -> _Verdict:
    """What is made of the outcomes, probabilities and flips of an item's P pairs."""
    outcome_P, probability_P, flipped_P = comparisons_3P
    if np.isnan(outcome_P).any():
        return _Verdict(None, None, None)
    soft = not np.isnan(probability_P).any()
    won = [0.0] * len(item.completions)
    # The probability and not the outcome: two orders that disagree are a tie, of which it still says which is likelier.
    first_P = probability_P if soft else outcome_P
    for (first, second), chance in zip(itertools.combinations(range(len(won)), 2), first_P.tolist(), strict=True):
        won[first] += chance
        won[second] += 1 - chance
    flips = None if np.isnan(flipped_P).all() else int(np.nansum(flipped_P))
    return _Verdict(ranks_of_scores(won), probability_P.tolist() if soft else None, flips)


def verdict_report(labels: Sequence[Label]) -> str:
    """How often a judge gave no verdict, and how often its verdict turned round with the order, in words."""
    decided = [label for label in labels if label.flips is not None]
    pairs = sum(math.comb(len(label.completions), 2) for label in decided)
    flips = sum(label.flips or 0 for label in decided)
    none = sum(label.ranks is None for label in labels)
    return f"no verdict: {none} of {len(labels)}; turned round with the order: {flips} of {pairs} pairs"
