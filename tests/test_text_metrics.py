"""The text metrics of an evaluation, by hand, from the registry."""

from collections.abc import Sequence

import pytest

from textrl_gym.evaluation.metrics import METRICS
from textrl_gym.evaluation.text_metrics import Samples


def text_metrics(completions: Sequence[str], references: Sequence[str | None]) -> dict[str, float]:
    samples: Samples = [{"completion": c, "reference": r} for c, r in zip(completions, references, strict=True)]
    found = {}
    for key in ("distinct_1", "distinct_2", "repetition", "rouge_l"):
        of = METRICS[key].of
        assert of is not None
        found[key] = of([], samples)
    return {key: value for key, value in found.items() if value == value}


def test_by_hand() -> None:
    texts = ["a b a b a b a", "c d"]
    found = text_metrics(texts, ["a b a b", None])
    # Words: 7 + 2, of which a, b, c, d differ. Pairs: ab ba ab ba ab ba, cd: 7, of which ab, ba, cd differ.
    assert found["distinct_1"] == pytest.approx(4 / 9, abs=1e-12, rel=0)
    assert found["distinct_2"] == pytest.approx(3 / 7, abs=1e-12, rel=0)
    # Runs of 4 in the first: abab, baba, abab, baba: half were there before. The second has none and is left out.
    assert found["repetition"] == pytest.approx(0.5, abs=1e-12, rel=0)
    # The longest common subsequence with "a b a b" has 4 words: precision 4/7, recall 1, F1 = 8/11.
    assert found["rouge_l"] == pytest.approx(8 / 11, abs=1e-12, rel=0)


def test_rouge_is_the_mean_over_texts_with_a_reference() -> None:
    # Equal: 1. One of two words: precision 1/2, recall 1, F1 2/3. Without reference, or with an empty one: not counted.
    found = text_metrics(["the cat", "the cat", "x", "y"], ["the cat", "the", None, ""])
    assert found["rouge_l"] == pytest.approx((1 + 2 / 3) / 2, abs=1e-12, rel=0)


def test_what_nothing_can_be_said_of_is_left_out() -> None:
    assert text_metrics(["one", "one"], [None, None]) == {"distinct_1": 0.5}
    assert text_metrics(["", " "], ["x", None]) == {"rouge_l": 0.0}
