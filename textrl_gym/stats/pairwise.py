"""Comparisons of two texts or of many agents: win rates, with length taken out, and Bradley-Terry ratings. Pure numpy.

Shape legend: N comparisons or prompts, A agents, K coefficients, R resamples. An outcome is 1 for a win, 0.5 for a tie
and 0 for a loss. Coverages are of 95% intervals, exact or simulated.

References: Wilson 1927 (JASA 22:209), Dubois et al. 2024 (arXiv:2404.04475), Bradley and Terry 1952 (Biometrika
39:324), White 1980 (Econometrica 48:817) for the sandwich.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from textrl_gym.stats.estimates import Array, Estimate, outcomes, vector, z_quantile

ELO_PER_NAT = 400 / math.log(10)
"""A rating in nats (the log odds of a win) times this is in Elo points: 400 points are odds of 10 to 1."""


def win_rate(outcome_N: ArrayLike, *, confidence: float = 0.95) -> Estimate:
    """Mean outcome of independent comparisons: 1 a win, 0.5 a tie, 0 a loss, or a judge's probability of a win.

    Wilson's score interval with as many games as would give wins and losses alone the variance that the outcomes
    have: n p (1 - p) / variance. That is n without ties, and then it is Wilson's own. No more than n^2 / z^2, so that
    nothing but ties is not taken for certainty. Exact coverage for n of 64 to 256, rates of 0.5 to 0.95 and up to 90%
    of ties: 0.940 to 0.968. Wilson's own covers 0.959 to 1.000 with ties; the normal interval, which the bootstrap
    tends to, 0.83 to 0.95.
    """
    outcome_N = _outcomes(outcome_N)
    z, n, p = z_quantile(confidence), len(outcome_N), float(outcome_N.mean())
    variance = p * (1 - p)
    worth = variance / max(float(outcome_N.var()), variance * min(z * z / n, 1)) if variance > 0 else 1.0
    shift = z * z / (n * worth)
    centre, half = p + shift / 2, math.sqrt(shift * variance + shift * shift / 4)
    return Estimate(p, max((centre - half) / (1 + shift), 0.0), min((centre + half) / (1 + shift), 1.0))


def agreement(difference_N: ArrayLike) -> float:
    """Share of pairs that scores put in the right order, a tie of the scores counting half.

    Args:
        difference_N: score of the text that should have the higher one, minus that of the other.
    """
    return float(outcomes(vector(difference_N, "score differences", 1), 0.0).mean())


@dataclass(frozen=True)
class LengthControlled:
    """A win rate with the judge's taste for length taken out."""

    win_rate: Estimate
    """What it would be between texts of equal length."""
    length_effect: Estimate
    """Log odds of a win (nats) for a text that is far longer, against one of equal length; 0 for a just judge."""


def length_controlled_win_rate(
    outcome_N: ArrayLike, length_difference_N: ArrayLike, *, confidence: float = 0.95
) -> LengthControlled:
    """Win rate at equal lengths, by logistic regression (Dubois et al. 2024).

        P(win) = sigmoid(theta + phi tanh(difference / std(difference))),   win rate = sigmoid(theta)

    Departures: no term for how difficult a prompt is, which takes other models' answers to estimate; and in place of
    their regularisation, a prior of two comparisons of weight 1/2 that were ties, one of a far longer and one of a
    far shorter text, which keeps an agent that won everything finite. The interval is the sandwich (HC1), which ties
    do not widen; where all outcomes are equal it would be a point, and the likelihood's own is taken. Coverage for n
    of 64 to 256, rates of 0.5 to 0.95, with and without ties: 0.944 to 0.968.

    Args:
        outcome_N: 1 a win, 0.5 a tie, 0 a loss.
        length_difference_N: length of the agent's text minus that of the other's, in any unit.
        confidence: of the intervals.
    """
    outcome_N = _outcomes(outcome_N, 3)
    difference_N = vector(length_difference_N, "length differences", 3)
    n = len(outcome_N)
    if len(difference_N) != n:
        raise ValueError(f"there must be one length difference for each outcome, got {len(difference_N)} and {n}")
    if np.ptp(difference_N) == 0 and difference_N[0] != 0:
        raise ValueError(f"all length differences are {difference_N[0]:g}: what length does cannot be told from them")
    # tanh, as the paper: a text ten times as long is not preferred ten times as much.
    squashed_N = np.tanh(difference_N / difference_N.std(ddof=1)) if difference_N.any() else difference_N
    design = np.stack([np.ones(n + 2), np.append(squashed_N, [1.0, -1.0])], 1)
    outcome, weight = np.append(outcome_N, [0.5, 0.5]), np.append(np.ones(n), [0.5, 0.5])
    coefficient, hessian = _logistic(design, outcome, weight)
    covariance = np.linalg.inv(hessian)
    # Where all outcomes are equal, every residual is, and the sandwich would be of no width.
    if np.ptp(outcome_N) > 0:
        residual = outcome - _sigmoid(design @ coefficient)
        middle = (design * (weight * residual**2)[:, None]).T @ design
        covariance = covariance @ middle @ covariance * n / (n - 2)
    half = z_quantile(confidence) * np.sqrt(np.diag(covariance))
    theta, phi = (
        Estimate(*map(float, ends)) for ends in zip(coefficient, coefficient - half, coefficient + half, strict=True)
    )
    return LengthControlled(Estimate(*(float(_sigmoid(x)) for x in (theta.value, theta.low, theta.high))), phi)


def bradley_terry(wins_AA: ArrayLike) -> Array:
    """Ratings in nats of agents that played each other: P(i beats j) = sigmoid(rating_i - rating_j). [A]

    Maximum likelihood; only differences mean anything, so the ratings' mean is set to 0. Each pair is given one more
    game, a tie: this prior keeps an agent that won or lost everything finite, and joins agents that never met.

    Args:
        wins_AA: how many games row won against column, a tie half a win to each: counts, not rates, since the prior
            is one game. The diagonal is not read. [..., A, A] gives [..., A].
    """
    wins_AA = np.asarray(wins_AA, float)
    agents = wins_AA.shape[-1] if wins_AA.ndim >= 2 else 0
    if agents < 2 or wins_AA.shape[-2] != agents:
        raise ValueError(f"wins must be square, for at least 2 agents, got shape {wins_AA.shape}")
    first, second = np.triu_indices(agents, 1)
    won, lost = wins_AA[..., first, second], wins_AA[..., second, first]
    if not (np.isfinite(won + lost).all() and min(won.min(), lost.min()) >= 0):
        raise ValueError(f"wins must be finite and at least 0, got {wins_AA.min()} to {wins_AA.max()}")
    games = won + lost + 1
    design = np.eye(agents)[first] - np.eye(agents)[second]
    rest, _ = _logistic(design[:, 1:], (won + 0.5) / games, games)  # the first agent at 0, for now
    rating = np.concatenate([np.zeros_like(rest[..., :1]), rest], -1)
    return rating - rating.mean(-1, keepdims=True)


def bradley_terry_on_prompts(
    score_AN: ArrayLike, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> list[Estimate]:
    """Ratings in nats of agents that were scored on the same prompts: the higher score wins the prompt.

    The percentile bootstrap resamples prompts, for all pairs at once, since a prompt enters all of them.
    """
    score_AN = np.asarray(score_AN, float)
    if score_AN.ndim != 2 or score_AN.shape[1] < 2:
        raise ValueError(f"scores must be [A, N] with at least 2 prompts, got shape {score_AN.shape}")
    agents, n = score_AN.shape
    outcome_AAN = outcomes(score_AN[:, None], score_AN[None])
    weight_RN = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), resamples)
    wins_RAA = (weight_RN @ outcome_AAN.reshape(-1, n).T).reshape(-1, agents, agents)
    tail = (1 - confidence) / 2
    low_A, high_A = np.quantile(bradley_terry(wins_RAA), [tail, 1 - tail], axis=0)
    ratings = zip(bradley_terry(outcome_AAN.sum(-1)), low_A, high_A, strict=True)
    return [Estimate(*map(float, numbers)) for numbers in ratings]


def _logistic(design_NK: Array, outcome: Array, weight: Array) -> tuple[Array, Array]:
    """Logistic regression of outcomes in [0, 1], [..., N], by Newton's method.

    scipy has none, and this one does all resamples at once. A step is at most 1 nat, without which it may diverge.

    Returns:
        coefficients [..., K], and the Hessian of the negative log-likelihood there, [..., K, K].
    """
    n, k = design_NK.shape
    squares = (design_NK[:, :, None] * design_NK[:, None, :]).reshape(n, k * k)
    coefficient = np.zeros((*outcome.shape[:-1], k))
    for _ in range(200):
        p = _sigmoid(coefficient @ design_NK.T)
        hessian = ((weight * p * (1 - p)) @ squares).reshape(*coefficient.shape, k)
        gradient = (weight * (outcome - p)) @ design_NK
        # All resamples take one step together; those that are done take steps of about 0.
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        size = np.abs(step).max(-1, keepdims=True)
        coefficient = coefficient + step / np.maximum(size, 1)
        if size.max() < 1e-10:
            return coefficient, hessian
    raise AssertionError(f"no optimum in 200 steps: the last was {size.max():g} nats")


def _sigmoid(x: ArrayLike) -> Array:
    from scipy import special

    return special.expit(x)


def _outcomes(outcome_N: ArrayLike, at_least: int = 1) -> Array:
    array = vector(outcome_N, "outcomes", at_least)
    if array.min() < 0 or array.max() > 1:
        raise ValueError(f"outcomes must lie in [0, 1], got {array.min():g} to {array.max():g}")
    return array
