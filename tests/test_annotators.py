"""Simulated annotators: Bradley-Terry in gold, a quarter of the labels wrong, a taste for length on demand."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from textrl_gym.judges.annotators import Annotators
from textrl_gym.rewards.tldr_gold import score_parts
from textrl_gym.worlds.tldr import TLDRCorpus, mediocre_summary

golds = st.floats(0, 1)
lengths = st.integers(0, 100)
pools = st.builds(Annotators, st.floats(0, 100), st.floats(0, 1), st.floats(-1, 1))
quick = settings(max_examples=200, derandomize=True, deadline=None)


def test_formula() -> None:
    # sigmoid(2 * (0.75 - 0.25) + 0.1 * (10 - 20)) = sigmoid(0) = 0.5
    pool = Annotators(beta=2, noise=0.2, length_preference=0.1)
    assert pool.probability(0.75, 0.25, 10, 20) == pytest.approx(0.5, abs=1e-12, rel=0)
    # sigmoid(1) = 0.731059; 0.8 * 0.731059 + 0.1 = 0.684847
    assert pool.probability(0.75, 0.25, 10, 10) == pytest.approx(0.684847, abs=1e-6, rel=0)


@quick
@given(pools, golds, golds, lengths, lengths)
def test_probabilities_are_symmetric_and_keep_the_noise(pool: Annotators, a: float, b: float, m: int, n: int) -> None:
    one, two = pool.probability(a, b, m, n), pool.probability(b, a, n, m)
    assert one + two == pytest.approx(1, abs=1e-12, rel=0)
    assert pool.noise / 2 - 1e-12 <= one <= 1 - pool.noise / 2 + 1e-12


def test_a_quarter_of_the_labels_disagree_with_gold() -> None:
    rng, draws = random.Random(0), np.random.default_rng(0)
    gold, words = [], []
    for row in TLDRCorpus("train", seed=4, size=2000):
        pair = [mediocre_summary(row, rng) for _ in range(2)]
        gold.append([score_parts(row["facts"], text)["gold"] for text in pair])
        words.append([len(text.split()) for text in pair])
    (gold_a, gold_b), (len_a, len_b) = np.array(gold).T, np.array(words).T
    chosen = Annotators().prefer(gold_a, gold_b, len_a, len_b, draws)
    told = gold_a != gold_b
    # The standard error is sqrt(0.25 * 0.75 / 2000) = 0.01.
    assert abs((chosen != (gold_a > gold_b))[told].mean() - 0.25) < 0.03


def test_length_preference() -> None:
    draws = np.random.default_rng(0)
    equal, long, short = np.full(4000, 0.5), np.full(4000, 30), np.full(4000, 10)
    # Noise 0.12, 20 words: 0.88 * sigmoid(20 * preference) + 0.06: 0.5 for 0; 0.835 for 0.1. Standard error 0.008.
    for preference, share in ((0.0, 0.5), (0.1, 0.835), (-0.1, 0.165)):
        pool = Annotators(length_preference=preference)
        assert pool.prefer(equal, equal, long, short, draws).mean() == pytest.approx(share, abs=0.03, rel=0)


def test_seed_decides_and_numbers_work() -> None:
    pool = Annotators()
    first = pool.prefer([0.2] * 50, [0.3] * 50, 10, 12, np.random.default_rng(1))
    assert first.shape == (50,)
    assert (first == pool.prefer([0.2] * 50, [0.3] * 50, 10, 12, np.random.default_rng(1))).all()
    assert bool(Annotators(beta=1000, noise=0).prefer(0.9, 0.1, 5, 5, np.random.default_rng(0))) is True


@pytest.mark.parametrize(
    "wrong", [{"beta": -1.0}, {"beta": float("nan")}, {"noise": 1.5}, {"length_preference": float("inf")}]
)
def test_bad_settings(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Annotators(**wrong)
