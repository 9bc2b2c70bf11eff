"""Numbers of an evaluation that are read off its texts alone. Words are what stands between white space.

distinct_1, distinct_2   different words and word pairs over all of them, of all completions (Li et al. 2016,
                         arXiv:1510.03055)
repetition               share of a completion's runs of 4 words that it has said before, mean over the completions
                         (Welleck et al. 2020, arXiv:1908.04319)
rouge_l                  F1 of the longest common subsequence with the reference text, mean over the rows that have one
                         (Lin 2004); as the reward "rouge", so with stemming
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from textrl_gym.rewards import rouge
from textrl_gym.stats.overoptimization import distinct_n, repetition

REPEATED = 4
"""Words in a run that counts as repeated: single words and pairs come back in any text."""


def text_metrics(completions: Sequence[str], references: Sequence[str | None]) -> dict[str, float]:
    """The numbers above; one that nothing can be said of is left out.

    Args:
        completions: the texts.
        references: what each is compared with; None where there is nothing.
    """
    found = {
        "distinct_1": distinct_n(completions, 1),
        "distinct_2": distinct_n(completions, 2),
        "repetition": repetition(completions, REPEATED),
    }
    pairs = [(text, reference) for text, reference in zip(completions, references, strict=True) if reference]
    if pairs:
        score = rouge.make(None)
        values = score([""] * len(pairs), [text for text, _ in pairs], [reference for _, reference in pairs])
        found["rouge_l"] = sum(values) / len(values)
    return {name: value for name, value in found.items() if not math.isnan(value)}
