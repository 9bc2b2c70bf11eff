"""Gold curves, length trends, repetition and collapse: by hand, and against scipy's general optimiser."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import optimize, stats

from textrl_gym.stats import overoptimization
from textrl_gym.stats.overoptimization import LengthBucket


def test_best_of_n_curve() -> None:
    # d = 1, 2, 3, 4 with alpha 2 and beta 0.4: d (2 - 0.4 d) = 1.6, 2.4, 2.4, 1.6; highest at d = 2 / 0.8 = 2.5.
    curve = overoptimization.fit_gold_curve([1, 4, 9, 16], [1.6, 2.4, 2.4, 1.6], "best_of_n")
    assert (curve.alpha, curve.beta, curve.r2) == pytest.approx((2, 0.4, 1), abs=1e-9, rel=0)
    assert curve.peak_kl == pytest.approx(6.25, abs=1e-9, rel=0)
    np.testing.assert_allclose(curve.gold([0, 6.25]), [0, 2.5], atol=1e-9, rtol=0)


def test_rl_curve() -> None:
    # alpha 1, beta 0.5: d (1 - 0.5 log d) is 0 at d = 0 and highest where 1 = 0.5 (log d + 1), at d = e: KL e^2.
    d = np.array([0, 1, 2, 4, 8])
    gold = np.array([0, *(x * (1 - 0.5 * math.log(x)) for x in (1, 2, 4, 8))])
    curve = overoptimization.fit_gold_curve(d**2, gold, "rl")
    assert (curve.alpha, curve.beta, curve.r2) == pytest.approx((1, 0.5, 1), abs=1e-9, rel=0)
    assert curve.peak_kl == pytest.approx(math.e**2, abs=1e-8, rel=0)


def test_the_best_of_n_by_hand() -> None:
    # Of three in the order of their proxy 1, 2, 3 with gold 5, 9, 1: of the 3 choices of two, number 2 is the best of
    # one and number 3 of two. n = 3: number 3.
    proxy, gold = [[2.0, 3.0, 1.0], [30.0, 10.0, 20.0]], [[9.0, 1.0, 5.0], [1.0, 5.0, 9.0]]
    for n, kl, expected_proxy, expected_gold in (
        (1, 0.0, [2.0, 20.0], [5.0, 5.0]),
        (2, math.log(2) - 1 / 2, [8 / 3, 80 / 3], [11 / 3, 11 / 3]),
        (3, math.log(3) - 2 / 3, [3.0, 30.0], [1.0, 1.0]),
    ):
        found = overoptimization.best_of_n(proxy, gold, n)
        assert found.n == n
        assert found.kl == pytest.approx(kl, abs=1e-12, rel=0)
        np.testing.assert_allclose(found.proxy_P, expected_proxy, atol=1e-9, rtol=0)
        np.testing.assert_allclose(found.gold_P, expected_gold, atol=1e-9, rtol=0)


def test_the_best_of_n_over_all_choices() -> None:
    rng = np.random.default_rng(0)
    proxy_N, gold_N = rng.integers(0, 4, 8).astype(float), rng.normal(size=8)  # many ties
    for n in (1, 3, 8):
        chosen = [np.array(some) for some in itertools.combinations(range(8), n)]
        best = [some[proxy_N[some] == proxy_N[some].max()] for some in chosen]  # all that may be taken
        found = overoptimization.best_of_n(proxy_N[None], gold_N[None], n)
        assert found.gold_P[0] == pytest.approx(np.mean([gold_N[some].mean() for some in best]), abs=1e-9, rel=0)
        assert found.proxy_P[0] == pytest.approx(np.mean([proxy_N[some[0]] for some in best]), abs=1e-9, rel=0)


def test_the_best_of_a_large_pool_is_finite() -> None:
    proxy_N = np.arange(5000.0)
    # of the numbers 1 to N the largest of n is n (N + 1) / (n + 1) on average; here they begin with 0
    for n in (1, 2500, 5000):
        found = overoptimization.best_of_n(proxy_N[None], proxy_N[None], n)
        assert found.gold_P[0] == pytest.approx(n * 5001 / (n + 1) - 1, abs=1e-5, rel=0)


def test_the_best_of_wrong_numbers() -> None:
    with pytest.raises(ValueError, match="n must be between 1 and the 3 completions of a prompt, got 4"):
        overoptimization.best_of_n([[1, 2, 3]], [[1, 2, 3]], 4)
    with pytest.raises(ValueError, match=r"must be \[P, N\] of one shape, got \(1, 3\) and \(1, 2\)"):
        overoptimization.best_of_n([[1, 2, 3]], [[1, 2]], 1)


@pytest.mark.parametrize("form", ["best_of_n", "rl"])
def test_curves_by_a_general_optimiser(form: overoptimization.Form) -> None:
    rng = np.random.default_rng(0)
    kl = rng.uniform(0.5, 60, 40)

    def gold(kl: np.ndarray, alpha: float, beta: float) -> np.ndarray:
        d = np.sqrt(kl)
        return d * (alpha - beta * (d if form == "best_of_n" else np.log(d)))

    noisy = gold(kl, 0.5, 0.06 if form == "best_of_n" else 0.2) + rng.normal(0, 0.1, 40)
    (alpha, beta), _ = optimize.curve_fit(gold, kl, noisy)
    curve = overoptimization.fit_gold_curve(kl, noisy, form)
    assert (curve.alpha, curve.beta) == pytest.approx((alpha, beta), abs=1e-6, rel=0)
    error = noisy - gold(kl, alpha, beta)
    assert curve.r2 == pytest.approx(1 - error @ error / 40 / noisy.var(), abs=1e-6, rel=0)
    grid = np.linspace(0.5, 60, 100_001)
    assert curve.peak_kl == pytest.approx(grid[curve.gold(grid).argmax()], abs=1e-3, rel=0)


@pytest.mark.parametrize(
    ("kl", "gold"),
    [
        ([1, 4], [1.6, 2.4]),  # the peak of 6.25 lies above the data
        ([9, 16, 25], [2.4, 1.6, 0.0]),  # and here below
        ([1, 4, 9], [1, 2, 3]),  # gold = d: beta 0, up to rounding, which puts a peak far away
        ([1, 4, 9], [1.1, 2.4, 3.9]),  # d (1 + 0.1 d): not concave
        ([1, 4, 9], [-1.1, -2.4, -3.9]),  # concave, and falling from the start
    ],
)
def test_no_peak(kl: list[float], gold: list[float]) -> None:
    assert overoptimization.fit_gold_curve(kl, gold, "best_of_n").peak_kl is None


def test_length_trend() -> None:
    # Sxx = 5, Sxy = 4: slope 0.8. Residual sum of squares 5 - 0.8 * 4 = 1.8, over 2 degrees: 0.9. Standard error
    # sqrt(0.9 / 5), t = 4.303.
    trend = overoptimization.reward_against_length([1, 3, 2, 4], [1, 2, 3, 4], buckets=2)
    assert trend is not None
    half = stats.t.ppf(0.975, 2) * math.sqrt(0.18)
    found = (trend.slope.value, trend.slope.low, trend.slope.high, trend.correlation)
    assert found == pytest.approx((0.8, 0.8 - half, 0.8 + half, 0.8), abs=1e-9, rel=0)
    assert trend.buckets == (LengthBucket(1, 2, 2, 2), LengthBucket(3, 4, 2, 3))


def test_length_buckets() -> None:
    trend = overoptimization.reward_against_length(range(10), range(1, 11))
    assert trend is not None
    assert [(b.shortest, b.longest, b.mean_score) for b in trend.buckets] == [
        (1, 2, 0.5),
        (3, 4, 2.5),
        (5, 6, 4.5),
        (7, 8, 6.5),
        (9, 10, 8.5),
    ]
    # Six of ten at the budget of 32: their ranks 5 to 10 have the mean 7.5, in the fourth fifth of ten.
    trend = overoptimization.reward_against_length(range(10), [4, 9, 15, 20, *[32] * 6])
    assert trend is not None
    assert [(b.shortest, b.longest, b.texts) for b in trend.buckets] == [(4, 9, 2), (15, 20, 2), (32, 32, 6)]
    # Two lengths are two buckets.
    trend = overoptimization.reward_against_length(range(10), [8] * 5 + [32] * 5)
    assert trend is not None
    assert [b.texts for b in trend.buckets] == [5, 5]


def test_length_trend_where_there_is_none() -> None:
    assert overoptimization.reward_against_length([1, 2, 3], [8, 8, 8]) is None
    flat = overoptimization.reward_against_length([1, 1, 1, 1], [1, 2, 3, 4])
    assert flat is not None
    assert (flat.slope.value, flat.slope.low, flat.slope.high, flat.correlation) == (0, 0, 0, 0)


def test_ngrams() -> None:
    # Bigrams ab, ba, ab of the first and ab of the second: 2 different of 4. Repeated: 1 of 3, and 0 of 1.
    texts = ["a b a b", "a b"]
    assert overoptimization.distinct_n(texts, 2) == 0.5
    assert overoptimization.repetition(texts, 2) == pytest.approx(1 / 6, abs=1e-12, rel=0)
    ids = [[7, 8, 7, 8], [7, 8]]
    assert overoptimization.distinct_n(ids, 2) == 0.5
    # A text without trigrams is left out: aba, bab repeat nothing.
    assert overoptimization.repetition(texts, 3) == 0
    assert math.isnan(overoptimization.distinct_n(["a", ""], 2))
    assert math.isnan(overoptimization.repetition([], 1))


def test_collapse() -> None:
    final = [0.5, 0.4, 0.39, math.nan, math.inf, -math.inf]
    assert overoptimization.collapsed(0.4, final).tolist() == [False, False, True, True, True, True]
    assert overoptimization.collapsed([0.4, 0.5], [0.45, 0.45]).tolist() == [False, True]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: overoptimization.fit_gold_curve([1, 4], [1, 2], "ppo"),  # type: ignore[arg-type]
            "best_of_n, rl, got 'ppo'",
        ),
        (lambda: overoptimization.fit_gold_curve([1, 4], [1], "rl"), "at least 2"),
        (lambda: overoptimization.fit_gold_curve([1, 4, 9], [1, 2], "rl"), "for each KL, got 2 and 3"),
        (lambda: overoptimization.fit_gold_curve([-0.1, 4], [1, 2], "rl"), "at least 0, got -0.1"),
        (lambda: overoptimization.fit_gold_curve([0, 4, 4], [0, 2, 2], "rl"), "two different KLs above 0"),
        (lambda: overoptimization.reward_against_length([1, 2], [1, 2]), "at least 3"),
        (lambda: overoptimization.reward_against_length([1, 2, 3], [1, 2, 3, 4]), "got 4 and 3"),
        (lambda: overoptimization.reward_against_length([1, 2, 3], [1, 2, 3], 0), "buckets must be at least 1, got 0"),
        (lambda: overoptimization.distinct_n(["a"], 0), "n must be at least 1, got 0"),
        (lambda: overoptimization.collapsed(math.nan, [1]), "initial policy's gold must be finite"),
    ],
)
def test_bad_input(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
