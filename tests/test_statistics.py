"""Statistics of runs and prompts: by hand, against scipy's own tests, and by the coverage of their intervals."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from textrl_gym.stats import estimates
from textrl_gym.stats.estimates import Estimate

CASES = 1000


def coverage(draw: Callable[[np.random.Generator], Estimate], truth: float, cases: int = CASES) -> float:
    """Share of simulated cases whose interval holds the truth; 1,000 of them have a standard error of 0.007 at 0.95."""
    rng = np.random.default_rng(0)
    found = [draw(rng) for _ in range(cases)]
    return sum(e.low <= truth <= e.high for e in found) / cases


def test_iqm_is_the_mean_of_the_middle_half() -> None:
    # 1 2 | 3 4 10 20 | 30 40: the middle four of eight have the mean 37 / 4.
    assert estimates.iqm([[1, 2, 3, 4], [10, 20, 30, 40]]).value == pytest.approx(9.25, abs=1e-12, rel=0)
    # A quarter of outliers changes nothing, and strata may differ in the number of runs.
    assert estimates.iqm([[-1e9, 2, 3], [4, 10, 20, 30, 1e9]]).value == pytest.approx(9.25, abs=1e-12, rel=0)
    # Of three runs none can be cut: (1 + 2 + 6) / 3.
    assert estimates.iqm([[1, 2, 6]]).value == pytest.approx(3, abs=1e-12, rel=0)


def test_iqm_bootstrap() -> None:
    # Of the 27 resamples of three runs one is (0, 0, 0), and 1/27 > 0.025: the interval is the range.
    assert estimates.iqm([[0, 1, 2]]) == Estimate(1, 0, 2)
    # At 90% the ends are the means of (0, 0, 1) and (1, 2, 2): 1/27 < 0.05 < 1/27 + 3/27.
    wanted = Estimate(1, 1 / 3, 5 / 3)
    found = estimates.iqm([[0, 1, 2]], confidence=0.9)
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), abs=1e-12, rel=0)
    # Stratified: each resample has two runs of 0 and two of 1. A pooled bootstrap would run from 0 to 1.
    assert estimates.iqm([[0, 0], [1, 1]]) == Estimate(0.5, 0.5, 0.5)


def test_the_same_seed_gives_the_same_interval() -> None:
    scores = np.random.default_rng(0).normal(size=(3, 10))
    one, again, other = (estimates.iqm(scores, resamples=200, seed=seed) for seed in (1, 1, 2))
    assert one == again != other


def test_iqm_interval_is_too_short_for_three_runs() -> None:
    """The docstring's warning: this is why no other function here bootstraps seeds."""

    def draw(runs: int) -> Callable[[np.random.Generator], Estimate]:
        return lambda rng: estimates.iqm([rng.normal(size=runs)], resamples=300)

    assert coverage(draw(3), 0.0, 300) < 0.85
    assert coverage(draw(10), 0.0, 300) > 0.9


def test_performance_profile() -> None:
    # Above 0.2: one of two, and both. Above 0.5: none (it is not above itself), and one of two.
    found = estimates.performance_profile([[0.1, 0.5], [0.3, 0.9]], [0.2, 0.5])
    assert [e.value for e in found] == [0.75, 0.25]
    # Above 0.2 the second stratum always has both, and the first none, one or two: 0.5 to 1.
    assert found[0] == Estimate(0.75, 0.5, 1)
    # Each stratum weighs the same, whatever its number of runs: (1/4 + 1) / 2.
    assert estimates.performance_profile([[0, 0, 0, 1], [1, 1]], [0.5])[0].value == 0.625


def test_performance_profile_of_one_stratum_is_a_survival_function() -> None:
    scores = np.random.default_rng(0).normal(size=20)
    thresholds = np.linspace(-2, 2, 9)
    found = estimates.performance_profile([scores], thresholds)
    np.testing.assert_allclose([e.value for e in found], stats.ecdf(scores).sf.evaluate(thresholds), atol=1e-12, rtol=0)
    assert all(e.low <= e.value <= e.high for e in found)


def test_probability_of_improvement_is_mann_whitney() -> None:
    # Six pairs: 1 beats 0 and loses to 2, 2 beats 0 and equals 2, 3 beats both: (1 + 1 + 0.5 + 2) / 6.
    x, y = [1, 2, 3], [0, 2]
    found = estimates.probability_of_improvement([x], [y])
    assert found.value == pytest.approx(4.5 / 6, abs=1e-12, rel=0)
    assert found.value == pytest.approx(stats.mannwhitneyu(x, y).statistic / 6, abs=1e-12, rel=0)
    # Two strata, the second lost throughout: the mean of 0.75 and 0.
    assert estimates.probability_of_improvement([x, [0]], [y, [1]]).value == pytest.approx(0.375, abs=1e-12, rel=0)


def test_probability_of_improvement_ends_where_the_score_test_does() -> None:
    # Hanley and McNeil's variance: [p(1-p) + (N-1)(Q1 - p^2) + (N-1)(Q2 - p^2)] / (m n), with Q1 = p / (2 - p),
    # Q2 = 2 p^2 / (1 + p), and N the mean of m = 3 and n = 2, which is Newcombe's method 5.
    found = estimates.probability_of_improvement([[1, 2, 3]], [[0, 2]])
    for p in (found.low, found.high):
        one, two = p / (2 - p), 2 * p * p / (1 + p)
        variance = (p * (1 - p) + 1.5 * (one - p * p) + 1.5 * (two - p * p)) / 6
        assert (0.75 - p) ** 2 == pytest.approx(stats.norm.ppf(0.975) ** 2 * variance, abs=1e-9, rel=0)


def test_probability_of_improvement_never_shrinks_to_a_point() -> None:
    # Three runs that beat three others: the bootstrap says 1 to 1.
    won = estimates.probability_of_improvement([[4, 5, 6]], [[1, 2, 3]])
    lost = estimates.probability_of_improvement([[1, 2, 3]], [[4, 5, 6]])
    assert (won.value, won.high) == (1, 1)
    assert 0.45 < won.low < 0.55
    assert (lost.value, lost.low) == (0, 0)
    assert lost.high == pytest.approx(1 - won.low, abs=1e-9, rel=0)


@pytest.mark.parametrize(("strata", "runs"), [(1, 5), (5, 3)])
def test_probability_of_improvement_covers(strata: int, runs: int) -> None:
    shape = strata, runs

    def draw(rng: np.random.Generator) -> Estimate:
        return estimates.probability_of_improvement(rng.normal(1, 1, shape), rng.normal(0, 1, shape))

    # X - Y is normal with mean 1 and variance 2.
    assert 0.93 <= coverage(draw, stats.norm.cdf(1 / np.sqrt(2)), 3000) <= 0.97


def test_difference_of_means_is_welchs() -> None:
    # Means 2 and 4; variances of the means 1/3 and 4/3, so (5/3)^2 / ((1/9 + 16/9) / 2) = 50/17 degrees of freedom.
    a, b = [1, 2, 3], [2, 4, 6]
    half = stats.t.ppf(0.975, 50 / 17) * np.sqrt(5 / 3)
    found = estimates.difference_of_means(a, b)
    assert (found.value, found.low, found.high) == pytest.approx((-2, -2 - half, -2 + half), abs=1e-9, rel=0)
    ends = stats.ttest_ind(a, b, equal_var=False).confidence_interval()
    assert (found.low, found.high) == pytest.approx((ends.low, ends.high), abs=1e-9, rel=0)


@pytest.mark.parametrize("spread", [1.0, 3.0])
def test_three_seeds_of_equal_agents_are_seldom_told_apart(spread: float) -> None:
    """The verdict's rule errs in about 5% of cases, as it says; Welch is careful where spreads differ."""

    def draw(rng: np.random.Generator) -> Estimate:
        return estimates.difference_of_means(rng.normal(size=3), spread * rng.normal(size=3))

    assert 0.94 <= coverage(draw, 0.0) <= 0.98


# Means 0.82333 and 0.8, variances of the means 2.11e-4 and 3.33e-5: 2.62 degrees of freedom, t = 3.46, half 0.0541.
FEW = "3 seeds are too few to tell: ppo is ahead by 0.02, the 95% interval of the difference runs from -0.03 to 0.08."
# The same with 0.2 added.
BETTER = "ppo is better than grpo by 0.22: the 95% interval of the difference runs from 0.17 to 0.28 (3 seeds)."

# Variance 1/4 + 1/4, 2 degrees of freedom, t = 4.303: 4.303 * 0.7071 = 3.04.
LEVEL = "2 seeds are too few to tell: ppo and grpo are level, the 95% interval of the difference runs from -3.0 to 3.0."


@pytest.mark.parametrize(
    ("a", "b", "sentence"),
    [
        ([0.80, 0.82, 0.85], [0.79, 0.80, 0.81], FEW),
        ([0.80, 0.82, 0.85], [0.59, 0.60, 0.61], BETTER),
        ([0.5], [0.2], "1 seed is too few to tell: ppo is ahead by 0.3, and one seed has no interval."),
        (
            [0.5, 0.6, 0.7],
            [0.2],
            "1 and 3 seeds are too few to tell: ppo is ahead by 0.4, and one seed has no interval.",
        ),
        (
            [1, 1],
            [0, 0],
            "ppo is better than grpo by 1 in all of 2 seeds, which do not differ and so have no interval.",
        ),
        ([1, 1], [1, 1], "ppo equals grpo in all of 2 seeds, which do not differ and so have no interval."),
        ([1, 2], [1, 2], LEVEL),
    ],
)
def test_verdict(a: list[float], b: list[float], sentence: str) -> None:
    assert estimates.verdict("ppo", a, "grpo", b) == sentence
    if "level" not in sentence and "equals" not in sentence:  # whoever is named first
        assert estimates.verdict("grpo", b, "ppo", a) == sentence


def test_rounding_makes_no_difference() -> None:
    wanted = "ppo equals grpo in all of 2 and 3 seeds, which do not differ and so have no interval."
    assert estimates.verdict("ppo", [0.4, 0.4, 0.4], "grpo", [0.4, 0.4]) == wanted  # the sum of three is no 1.2
    found = estimates.paired_difference(np.full((3, 4), 0.4), np.full((2, 4), 0.4)).mean
    assert (found.low, found.high) == (found.value, found.value)


def test_verdict_on_agents_that_are_not_trained() -> None:
    # Mean 0.5, standard error 0.1 / sqrt 3 = 0.0577, t(0.975, 2) = 4.303: 0.5 +- 0.248, minus 0.2 or 0.3
    runs = [0.4, 0.5, 0.6]
    wanted = (
        "ppo is better than best_of_n by 0.30: the 95% interval of the difference runs from 0.05 to 0.55 (3 seeds)."
    )
    assert estimates.verdict("ppo", runs, "best_of_n", 0.2) == wanted
    assert estimates.verdict("best_of_n", 0.2, "ppo", runs) == wanted
    wanted = (
        "3 seeds are too few to tell: ppo is ahead by 0.20, the 95% interval of the difference runs from -0.05 to 0.45."
    )
    assert estimates.verdict("ppo", runs, "best_of_n", 0.3) == wanted
    wanted = "best_of_n is ahead by 0.3; neither is trained, so there are no seeds to differ."
    assert estimates.verdict("reference", 0.4, "best_of_n", 0.7) == wanted
    wanted = "1 seed is too few to tell: ppo is ahead by 0.1, and one seed has no interval."
    assert estimates.verdict("ppo", [0.5], "best_of_n", 0.4) == wanted
    with pytest.raises(ValueError, match="got two numbers"):
        estimates.difference_of_means(0.4, 0.7)


def test_verdict_never_rounds_an_end_to_zero() -> None:
    # Half of Welch's interval: t at 4 degrees times sqrt(2/3) times the standard deviation, here 0.1. It runs from
    # 0.0017 to 0.2017, whose first end would be 0.00 with two digits.
    step = 0.1 / (stats.t.ppf(0.975, 4) * np.sqrt(2 / 3))
    runs = step * np.array([-1, 0, 1])
    wanted = "ppo is better than grpo by 0.102: the 95% interval of the difference runs from 0.002 to 0.202 (3 seeds)."
    assert estimates.verdict("ppo", 0.1017 + runs, "grpo", runs) == wanted


def test_paired_difference_of_two_runs_is_the_paired_t() -> None:
    a, b = [1.0, 2.0, 5.0, 3.0], [0.0, 2.0, 6.0, 1.0]  # differences 1, 0, -1, 2: mean 0.5
    found = estimates.paired_difference(a, b)
    ends = stats.ttest_rel(a, b).confidence_interval()
    wanted = (0.5, ends.low, ends.high)
    assert (found.mean.value, found.mean.low, found.mean.high) == pytest.approx(wanted, abs=1e-9, rel=0)
    assert (found.better, found.worse) == (0.5, 0.25)


def test_paired_difference_of_one_run_is_what_the_bootstrap_says() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.1, 1, 256), rng.normal(0, 1, 256)
    found = estimates.paired_difference(a, b).mean
    ends = stats.bootstrap((a - b,), np.mean, rng=rng).confidence_interval
    assert (found.low, found.high) == pytest.approx((ends.low, ends.high), abs=0.01, rel=0)


def test_paired_difference_over_seeds_has_three_parts() -> None:
    a, b = np.array([[1.0, 3.0], [3.0, 5.0]]), np.array([[1.0, 1.0], [1.0, 1.0]])
    # Prompts: mean scores (2, 4) against (1, 1): differences 1 and 3, variance 2, over N = 2: 1, with 1 degree.
    # Seeds of a: means 2 and 4, variance 2, over S = 2: 1, with 1 degree. Seeds of b: 0. Together 2, and
    # 2^2 / (1^2 / 1 + 1^2 / 1) = 2 degrees of freedom.
    half = stats.t.ppf(0.975, 2) * np.sqrt(2)
    found = estimates.paired_difference(a, b)
    assert (found.mean.value, found.mean.low, found.mean.high) == pytest.approx(
        (2, 2 - half, 2 + half), abs=1e-9, rel=0
    )
    assert (found.better, found.worse) == (1, 0)


def test_a_pooled_spread_tells_what_two_seeds_cannot() -> None:
    # Two seeds each, 0.02 apart, of three agents: variance 0.0002 with 3 degrees; of a difference 0.0002.
    a, b, c = [0.89, 0.91], [0.84, 0.86], [0.49, 0.51]
    spread = estimates.pooled_spread([a, b, c])
    assert spread is not None and spread.freedom == 3
    assert spread.variance == pytest.approx(2e-4, rel=1e-9)
    # Prompts without noise of their own, so that the seeds' part is all: 0.05 +- t(3) sqrt(0.0002) = 0.045.
    scores = [np.repeat(np.array(one)[:, None], 64, 1) for one in (a, b)]
    gap = estimates.paired_difference(*scores, of_seeds=spread.of_difference(2, 2)).mean
    half = stats.t.ppf(0.975, 3) * np.sqrt(2e-4)
    assert (gap.value, gap.low, gap.high) == pytest.approx((0.05, 0.05 - half, 0.05 + half), abs=1e-9, rel=0)
    sentence = (
        "ppo is better than grpo by 0.050: the 95% interval of the difference runs from 0.005 to 0.095 (2 seeds)."
    )
    assert estimates.verdict("ppo", a, "grpo", b, difference=gap) == sentence
    turned = Estimate(-gap.value, -gap.high, -gap.low)
    assert estimates.verdict("grpo", b, "ppo", a, difference=turned) == sentence
    assert "too few to tell" in estimates.verdict("ppo", a, "grpo", b)  # Welch, of their own spreads
    assert estimates.pooled_spread([[0.1], [0.2]]) is None
    # One run meets several, and an untrained agent adds no spread.
    alone = estimates.paired_difference(scores[0][:1], scores[1], of_seeds=spread.of_difference(1, 2)).mean
    assert alone.high - alone.value == pytest.approx(stats.t.ppf(0.975, 3) * np.sqrt(2e-4 * 1.5), abs=1e-9, rel=0)
    fixed = estimates.paired_difference(*scores, of_seeds=spread.of_difference(2)).mean
    assert fixed.high - fixed.value == pytest.approx(stats.t.ppf(0.975, 3) * np.sqrt(1e-4), abs=1e-9, rel=0)


@pytest.mark.parametrize(("seeds", "agents"), [(2, 4), (3, 3)])
def test_paired_difference_with_a_pooled_spread_covers(seeds: int, agents: int) -> None:
    """Scores of bounded outcomes with ties, as win rates have: 0, 0.5 or 1."""

    def draw(rng: np.random.Generator) -> Estimate:
        prompt_N = rng.normal(0, 0.5, 128)
        scores = [
            np.clip(
                np.round(2 * (0.5 + prompt_N + rng.normal(0, 0.1, (seeds, 1)) + rng.normal(0, 0.3, (seeds, 128)))), 0, 2
            )
            / 2
            for _ in range(agents)
        ]
        spread = estimates.pooled_spread([one.mean(1) for one in scores])
        assert spread is not None
        return estimates.paired_difference(*scores[:2], of_seeds=spread.of_difference(seeds, seeds)).mean

    assert 0.93 <= coverage(draw, 0.0) <= 0.99


@pytest.mark.parametrize("seed_spread", [0.03, 0.1])
def test_paired_difference_covers(seed_spread: float) -> None:
    """Three seeds each on 128 common prompts, with noise of seeds, of prompts by agent, and of each score."""

    def draw(rng: np.random.Generator) -> Estimate:
        prompt_N = rng.normal(0, 0.5, 128)
        scores = [
            prompt_N + rng.normal(0, 0.2, 128) + rng.normal(0, seed_spread, (3, 1)) + rng.normal(0, 0.2, (3, 128))
            for _ in range(2)
        ]
        return estimates.paired_difference(*scores).mean

    assert 0.94 <= coverage(draw, 0.0) <= 0.99


def test_imports_are_light(root: Path) -> None:
    modules = "estimates", "pairwise", "overoptimization"
    code = (
        f"import sys; from textrl_gym.stats import {', '.join(modules)}\nprint({{'torch', 'scipy'}} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "set()\n"), done.stderr


def test_outcomes() -> None:
    assert estimates.outcomes([1, 2, 3], [2, 2, 2]).tolist() == [0, 0.5, 1]


def test_scaled() -> None:
    assert Estimate(1, 0.5, 2).scaled(10) == Estimate(10, 5, 20)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: estimates.iqm([]), "at least one stratum"),
        (lambda: estimates.iqm([[1.0]]), r"stratum 0 must be a 1-D array of at least 2, got shape \(1,\)"),
        (lambda: estimates.iqm([1.0, 2.0]), r"stratum 0 must be a 1-D array of at least 2, got shape \(\)"),
        (lambda: estimates.iqm([[1, 2], [1, np.nan]]), "stratum 1 must be finite, got nan"),
        (lambda: estimates.iqm([[1, 2]], confidence=95), "confidence must lie between 0 and 1, got 95"),
        (lambda: estimates.probability_of_improvement([[1]], [[1], [2]]), "the same strata, got 1 and 2"),
        (lambda: estimates.paired_difference([1, 2], [1, 2, 3]), "with the same N"),
        (lambda: estimates.paired_difference([1, 2], [[1, 2], [3, 4]]), "at least two of each, got 1 and 2"),
        (lambda: estimates.paired_difference([1, 2], [1, np.inf]), "must be finite, got inf"),
        (lambda: estimates.verdict("a", [np.nan], "b", [1]), "must be finite, got nan"),
    ],
)
def test_bad_input(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
