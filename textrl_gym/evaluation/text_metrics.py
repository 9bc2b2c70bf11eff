"""Metrics of completions as texts. Words are separated by white space. Each is NaN where nothing can be said."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from textrl_gym.stats.overoptimization import distinct_n, repetition

REPEATED = 4  # words in a run that counts as repeated: single words and pairs come back in any text

Samples = Sequence[Mapping[str, Any]]
"""Completions of an evaluation: prompt, completion, reference, tokens, score and others, one for each prompt."""


def _texts(samples: Samples) -> list[str]:
    return [sample["completion"] for sample in samples]


def distinct(samples: Samples, n: int) -> float:
    """Distinct-n: different n-grams over all n-grams of all completions (Li et al. 2016, arXiv:1510.03055)."""
    return distinct_n(_texts(samples), n)


def repeated(samples: Samples) -> float:
    """Share of a completion's 4-grams that it contained before, mean over completions (Welleck et al. 2020)."""
    return repetition(_texts(samples), REPEATED)


def rouge_l(samples: Samples) -> float:
    """ROUGE-L: F1 of the longest common subsequence with the reference text, mean over the rows that have one.

    Lin 2004; as the reward "rouge", so with stemming.
    """
    from textrl_gym.rewards import rouge  # loads torch, which the names of metrics do not need

    pairs = [(sample["completion"], sample["reference"]) for sample in samples if sample.get("reference")]
    if not pairs:
        return math.nan
    values = rouge.make(None)([""] * len(pairs), [text for text, _ in pairs], [reference for _, reference in pairs])
    return sum(values) / len(values)
