"""Win rates and ratings: by hand, against scipy, against published numbers, and by the coverage of their intervals."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import optimize, special, stats

from textrl_gym.stats import pairwise
from textrl_gym.stats.pairwise import ELO_PER_NAT

Z = float(stats.norm.ppf(0.975))


def wins_ties_losses(wins: int, ties: int, losses: int) -> np.ndarray:
    return np.repeat([1.0, 0.5, 0.0], [wins, ties, losses])


@pytest.mark.parametrize(("wins", "n"), [(48, 64), (1, 10), (64, 64), (0, 7), (1, 1)])
def test_win_rate_without_ties_is_wilsons(wins: int, n: int) -> None:
    found = pairwise.win_rate(wins_ties_losses(wins, 0, n - wins))
    ends = stats.binomtest(wins, n).proportion_ci(method="wilson")
    assert (found.value, found.low, found.high) == pytest.approx((wins / n, ends.low, ends.high), abs=1e-9, rel=0)


def test_win_rate_of_alpaca_7b() -> None:
    # AlpacaEval's leaderboard (alpaca_eval_gpt4): 205 wins, 16 draws, 584 losses of 805 against text-davinci-003 are
    # a win rate of 26.45962733 with a standard error of 1.53571147. Wilson's interval is nearly as long.
    found = pairwise.win_rate(wins_ties_losses(205, 16, 584))
    assert found.value == pytest.approx(0.2645962733, abs=1e-9, rel=0)
    assert (found.high - found.low) / 2 == pytest.approx(Z * 0.0153571147, abs=2e-4, rel=0)


def test_win_rate_of_nothing_but_ties() -> None:
    # As many games as n^2 / z^2, so with shift = z^4 / n^2 the interval is 1/2 -+ sqrt(shift) / 2 / sqrt(1 + shift).
    shift = Z**4 / 64**2
    half = math.sqrt(shift / (1 + shift)) / 2
    found = pairwise.win_rate(np.full(64, 0.5))
    assert (found.low, found.high) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-9, rel=0)
    assert half == pytest.approx(0.03, abs=1e-3, rel=0)  # two real wins more or fewer could have gone unseen


def test_win_rate_seen_from_the_other_side() -> None:
    one, other = (pairwise.win_rate(wins_ties_losses(*counts)) for counts in ((30, 20, 14), (14, 20, 30)))
    assert (one.low, one.high) == pytest.approx((1 - other.high, 1 - other.low), abs=1e-12, rel=0)


def exact_coverage(interval: Callable[[int, int, int], tuple[float, float]], n: int, rate: float, ties: float) -> float:
    """The probability that the interval holds the rate, over all numbers of wins and ties that can be met."""
    wins, tied = np.indices((n + 1, n + 1)).reshape(2, -1)
    wins, tied = wins[wins + tied <= n], tied[wins + tied <= n]
    win = rate - ties / 2
    chance = stats.multinomial.pmf(np.stack([wins, tied, n - wins - tied], 1), n, [win, ties, 1 - win - ties])
    covered = 0.0
    for number in np.flatnonzero(chance > 1e-7):
        low, high = interval(int(wins[number]), int(tied[number]), n)
        covered += chance[number] * (low <= rate <= high)
    return covered


def ours(wins: int, ties: int, n: int) -> tuple[float, float]:
    found = pairwise.win_rate(wins_ties_losses(wins, ties, n - wins - ties))
    return found.low, found.high


def plain_wilson(wins: int, ties: int, n: int) -> tuple[float, float]:
    p, shift = (wins + ties / 2) / n, Z * Z / n
    half = math.sqrt(shift * p * (1 - p) + shift**2 / 4)
    return (p + shift / 2 - half) / (1 + shift), (p + shift / 2 + half) / (1 + shift)


@pytest.mark.parametrize("n", [64, 128])
@pytest.mark.parametrize(
    ("rate", "ties"),
    [(0.5, 0.0), (0.7, 0.0), (0.9, 0.0), (0.5, 0.3), (0.8, 0.3), (0.95, 0.09), (0.7, 0.59), (0.5, 0.9)],
)
def test_win_rate_covers(n: int, rate: float, ties: float) -> None:
    assert 0.93 <= exact_coverage(ours, n, rate, ties) <= 0.97


def test_plain_wilson_does_not_suit_ties() -> None:
    assert exact_coverage(plain_wilson, 64, 0.5, 0.3) > 0.975
    assert exact_coverage(plain_wilson, 64, 0.5, 0.9) > 0.999


def simulated_judge(
    rng: np.random.Generator, n: int, rate: float, ties: float, taste: float
) -> tuple[np.ndarray, np.ndarray]:
    """Outcomes of a judge that likes long texts, of an agent that writes them: the length differences' mean is 40."""
    difference_N = rng.normal(40, 50, n)
    p_N = special.expit(special.logit(rate) + taste * np.tanh(difference_N / difference_N.std(ddof=1)))
    tie_N = np.minimum(ties, 2 * np.minimum(p_N, 1 - p_N))  # half of them taken from the wins, half from the losses
    uniform_N = rng.random(n)
    return np.where(uniform_N < tie_N, 0.5, uniform_N < p_N + tie_N / 2), difference_N


@pytest.mark.parametrize("taste", [1.5, -1.0])
def test_length_controlled_win_rate_takes_the_judges_taste_out(taste: float) -> None:
    outcome_N, difference_N = simulated_judge(np.random.default_rng(0), 40_000, 0.6, 0.1, taste)
    # Of 40,000 the standard error is about 0.003; the plain win rate is wrong by more than 0.1.
    assert abs(outcome_N.mean() - 0.6) > 0.1
    found = pairwise.length_controlled_win_rate(outcome_N, difference_N)
    assert found.win_rate.value == pytest.approx(0.6, abs=0.01, rel=0)
    assert found.length_effect.value == pytest.approx(taste, abs=0.06, rel=0)


@pytest.mark.parametrize(
    ("n", "rate", "ties", "taste"),
    [(64, 0.6, 0.0, 1.0), (128, 0.8, 0.2, 1.0), (256, 0.7, 0.3, -1.0), (256, 0.9, 0.0, 0)],
)
def test_length_controlled_win_rate_covers(n: int, rate: float, ties: float, taste: float) -> None:
    rng = np.random.default_rng(0)
    found = [pairwise.length_controlled_win_rate(*simulated_judge(rng, n, rate, ties, taste)) for _ in range(1000)]
    assert 0.93 <= np.mean([f.win_rate.low <= rate <= f.win_rate.high for f in found]) <= 0.97
    assert 0.93 <= np.mean([f.length_effect.low <= taste <= f.length_effect.high for f in found]) <= 0.975


def test_length_controlled_win_rate_by_a_general_optimiser() -> None:
    rng = np.random.default_rng(1)
    outcome_N, difference_N = rng.choice([0, 0.5, 1], 50), rng.normal(10, 20, 50)
    x = np.append(np.tanh(difference_N / difference_N.std(ddof=1)), [1, -1])
    y, weight = np.append(outcome_N, [0.5, 0.5]), np.append(np.ones(50), [0.5, 0.5])

    def loss(k: np.ndarray) -> float:
        odds = k[0] + k[1] * x
        return float((weight * (np.logaddexp(0, odds) - y * odds)).sum())

    best = optimize.minimize(loss, [0, 0], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12}).x
    found = pairwise.length_controlled_win_rate(outcome_N, difference_N)
    wanted = (special.expit(best[0]), best[1])
    assert (found.win_rate.value, found.length_effect.value) == pytest.approx(wanted, abs=1e-6, rel=0)


def test_length_controlled_win_rate_of_equal_lengths() -> None:
    # Nothing but the prior speaks of length, and it says 0; it adds half a win to 3 of 4: 3.5 / 5.
    found = pairwise.length_controlled_win_rate([1, 1, 1, 0], [0, 0, 0, 0])
    assert found.win_rate.value == pytest.approx(0.7, abs=1e-9, rel=0)
    assert found.length_effect.value == pytest.approx(0, abs=1e-9, rel=0)


def test_length_controlled_win_rate_of_an_agent_that_won_everything() -> None:
    # (64 + 0.5) / 65 where all lengths are equal; the interval is the likelihood's, on 65 comparisons: log odds of
    # log(64.5 / 0.5) -+ z / sqrt(65 p (1 - p)).
    p = 64.5 / 65
    half = Z / math.sqrt(65 * p * (1 - p))
    found = pairwise.length_controlled_win_rate(np.ones(64), np.zeros(64)).win_rate
    wanted = (p, special.expit(special.logit(p) - half), special.expit(special.logit(p) + half))
    assert (found.value, found.low, found.high) == pytest.approx(wanted, abs=1e-9, rel=0)
    spread = pairwise.length_controlled_win_rate(np.ones(64), np.linspace(-5, 20, 64)).win_rate
    assert 0.8 < spread.low < spread.value < spread.high < 1


def test_two_agents_have_the_log_odds_of_the_prior_s_count() -> None:
    # 9 wins, 1 loss and the prior's tie: odds of 9.5 to 1.5, shared out as plus and minus a half.
    half = math.log(9.5 / 1.5) / 2
    np.testing.assert_allclose(pairwise.bradley_terry([[0, 9], [1, 0]]), [half, -half], atol=1e-9, rtol=0)
    # 10 of 10: odds of 10.5 to 0.5, and no infinity.
    rating = pairwise.bradley_terry([[0, 10], [0, 0]])
    assert rating[0] - rating[1] == pytest.approx(math.log(21), abs=1e-9, rel=0)
    # Odds of (99.5 + 0.5) to (9.5 + 0.5) are 10 to 1, which is 400 Elo.
    rating = pairwise.bradley_terry([[0, 99.5], [9.5, 0]]) * ELO_PER_NAT
    np.testing.assert_allclose(rating, [200, -200], atol=1e-6, rtol=0)


def test_ratings_are_found_again() -> None:
    # Counts as the ratings predict them, so many that the prior's one game does not matter.
    rating_A = np.array([1.5, 0.5, -0.4, -1.6])
    wins_AA = 1e6 * special.expit(rating_A[:, None] - rating_A)
    np.testing.assert_allclose(pairwise.bradley_terry(wins_AA), rating_A, atol=1e-5, rtol=0)


def test_ratings_by_a_general_optimiser() -> None:
    """With one agent that won everything, one that lost everything, and a pair that never met."""
    wins_AA = np.array([[0, 20, 30, 9], [0, 0, 7.5, 4], [0, 12.5, 0, 0], [0, 0, 0, 0]])
    first, second = np.triu_indices(4, 1)

    def loss(rating_A: np.ndarray) -> float:
        odds = rating_A[first] - rating_A[second]
        won, lost = wins_AA[first, second] + 0.5, wins_AA[second, first] + 0.5
        return float((won * np.logaddexp(0, -odds) + lost * np.logaddexp(0, odds)).sum() + rating_A.sum() ** 2)

    best = optimize.minimize(loss, np.zeros(4), method="BFGS", options={"gtol": 1e-8}).x
    np.testing.assert_allclose(pairwise.bradley_terry(wins_AA), best, atol=1e-5, rtol=0)


def test_ratings_converge_on_any_counts() -> None:
    """Half of the counts are 0, the others 1 to 100,000: whole Newton steps end in a singular matrix here."""
    rng = np.random.default_rng(0)
    shape = (1000, 12, 12)
    wins_RAA = 10.0 ** rng.integers(0, 6, shape) * (rng.random(shape) < 0.5) * (1 - np.eye(12))
    rating_RA = pairwise.bradley_terry(wins_RAA)
    np.testing.assert_allclose(rating_RA.mean(1), 0, atol=1e-12, rtol=0)
    np.testing.assert_allclose(rating_RA[7], pairwise.bradley_terry(wins_RAA[7]), atol=1e-9, rtol=0)
    # At the optimum each agent has won as often as the ratings predict: the gradient is 0.
    games_RAA = (wins_RAA + wins_RAA.swapaxes(1, 2) + 1) * (1 - np.eye(12))
    won_RA = (wins_RAA + 0.5 * (1 - np.eye(12))).sum(2)
    predicted_RA = (games_RAA * special.expit(rating_RA[:, :, None] - rating_RA[:, None])).sum(2)
    np.testing.assert_allclose(predicted_RA, won_RA, atol=1e-4, rtol=0)


def test_ratings_on_prompts() -> None:
    # The first wins 3 prompts of 4 and ties none: odds of 3.5 to 1.5 against the second.
    found = pairwise.bradley_terry_on_prompts([[1, 1, 1, 0], [0, 0, 0, 1]])
    assert found[0].value == pytest.approx(math.log(3.5 / 1.5) / 2, abs=1e-9, rel=0)
    # Agents that always tie are level, whatever prompts are drawn.
    assert [(e.low, e.high) for e in pairwise.bradley_terry_on_prompts(np.ones((3, 10)))] == [(0, 0)] * 3


def test_rating_intervals_agree_with_the_win_rates() -> None:
    # Two agents, 256 prompts: half of the log odds of the ends of the win rate's interval.
    score_AN = np.random.default_rng(0).normal(loc=[[0.5], [0.0]], size=(2, 256))
    rate = pairwise.win_rate(score_AN[0] > score_AN[1])
    rating = pairwise.bradley_terry_on_prompts(score_AN)[0]
    wanted = special.logit([rate.low, rate.high]) / 2
    assert (rating.low, rating.high) == pytest.approx(tuple(wanted), abs=0.02, rel=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pairwise.win_rate([]), r"at least 1, got shape \(0,\)"),
        (lambda: pairwise.win_rate([0, 2]), r"must lie in \[0, 1\], got 0 to 2"),
        (lambda: pairwise.length_controlled_win_rate([0, 1, 1], [1, 2]), "at least 3"),
        (lambda: pairwise.length_controlled_win_rate([0, 1, 1], [1, 2, 3, 4]), "for each outcome, got 4 and 3"),
        (lambda: pairwise.length_controlled_win_rate([0, 1, 1], [0.1, 0.1, 0.1]), "all length differences are 0.1"),
        (lambda: pairwise.bradley_terry([[0]]), "at least 2 agents"),
        (lambda: pairwise.bradley_terry([[0, 1, 2], [1, 0, 2]]), r"square, .* got shape \(2, 3\)"),
        (lambda: pairwise.bradley_terry([[0, -1], [1, 0]]), "at least 0, got -1"),
        (lambda: pairwise.bradley_terry_on_prompts([1, 2, 3]), r"must be \[A, N\]"),
    ],
)
def test_bad_input(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
