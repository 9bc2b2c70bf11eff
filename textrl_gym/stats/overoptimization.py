"""Signs that a reward was over-optimised: gold against KL, reward against length, repetition, collapse. Pure numpy.

Shape legend: N points or texts, R runs, K coefficients. A KL is in nats per sequence (its root is the distance d of
Gao et al.), a length in tokens or whatever unit the caller counts in.

References: Gao et al. 2022 (arXiv:2210.10760), Li et al. 2016 (arXiv:1510.03055), Welleck et al. 2020
(arXiv:1908.04319).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from textrl_gym.stats.estimates import Array, Estimate, vector, z_quantile

Form = Literal["best_of_n", "rl"]


# Gold against KL


@dataclass(frozen=True)
class GoldCurve:
    """Gold as a function of d = sqrt(KL): d (alpha - beta d) for best-of-n, d (alpha - beta log d) for RL."""

    form: Form
    alpha: float
    """Best-of-n: gold per root nat near the initial policy. RL: gold at d = 1."""
    beta: float
    """How soon the proxy's gain stops being gold. 0 or less: no over-optimisation is seen."""
    r2: float
    """Share of the gold's variance about its mean that the curve explains; below 0 where the mean does better."""
    peak_kl: float | None
    """KL at which gold is highest; None where the curve has no peak, or has it outside of the KLs that were seen."""

    def gold(self, kl: ArrayLike) -> Array:
        """The curve at some KLs."""
        return _terms(np.asarray(kl, float), self.form) @ np.array([self.alpha, self.beta])


def fit_gold_curve(kl_N: ArrayLike, gold_N: ArrayLike, form: Form) -> GoldCurve:
    """Gao et al.'s two forms by least squares: both are linear in alpha and beta.

    Args:
        kl_N: of each policy to the initial policy, in nats per sequence, at least 0.
        gold_N: gold of each policy minus that of the initial policy, so that it is 0 where the KL is.
        form: "best_of_n", or "rl".
    """
    if form not in get_args(Form):
        raise ValueError(f"form must be one of {', '.join(get_args(Form))}, got {form!r}")
    kl_N, gold_N = vector(kl_N, "KLs", 2), vector(gold_N, "gold", 2)
    if len(kl_N) != len(gold_N):
        raise ValueError(f"there must be one gold score for each KL, got {len(gold_N)} and {len(kl_N)}")
    if kl_N.min() < 0:
        raise ValueError(f"a KL must be at least 0, got {kl_N.min():g}")
    # No constant term: the initial policy itself has neither KL nor a gain of gold.
    (alpha, beta), _, rank, _ = np.linalg.lstsq(_terms(kl_N, form), gold_N, rcond=None)
    if rank < 2:
        raise ValueError(f"two different KLs above 0 are needed, got {np.unique(kl_N).tolist()}")
    error = float(((gold_N - _terms(kl_N, form) @ [alpha, beta]) ** 2).sum())
    total = float(((gold_N - gold_N.mean()) ** 2).sum())
    r2 = 1 - error / total if total > 0 else math.nan
    return GoldCurve(form, float(alpha), float(beta), r2, _peak(float(alpha), float(beta), form, kl_N))


def _terms(kl_N: Array, form: Form) -> Array:
    """What alpha and beta are multiplied by. [N, 2]"""
    from scipy import special

    d_N = np.sqrt(kl_N)
    # xlogy: 0 log 0 is 0 here, where log alone would make the initial policy's row nan.
    return np.stack([d_N, -(d_N**2) if form == "best_of_n" else -special.xlogy(d_N, d_N)], -1)


def _peak(alpha: float, beta: float, form: Form, kl_N: Array) -> float | None:
    """Where the derivative is 0: alpha = 2 beta d, or alpha = beta (log d + 1). A maximum only if beta > 0."""
    # Peaks outside of the KLs that were seen would be extrapolated, and are not told.
    if beta <= 0 or (form == "best_of_n" and alpha <= 0):
        return None
    log_d = math.log(alpha / (2 * beta)) if form == "best_of_n" else alpha / beta - 1
    if 2 * log_d > math.log(kl_N.max()):
        return None
    peak = math.exp(2 * log_d)
    return peak if peak >= kl_N.min() else None


def best_of_n_kl_bound(n: int) -> float:
    """log n - (n - 1) / n, in nats: no less than KL(pi_n || pi) for any score.

    Long taken for the KL itself, which it is only where no two completions have the same score (Beirami et al. 2024,
    arXiv:2401.01879).
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    return math.log(n) - (n - 1) / n


@dataclass(frozen=True)
class BestOfN:
    """What the best of n by a proxy is worth on average."""

    n: int
    kl: float
    """The bound that is taken for the KL; see best_of_n_kl_bound."""
    proxy_P: Array
    """The proxy of the best of n, expected, of each prompt."""
    gold_P: Array
    """Its gold."""


def best_of_n(proxy_PN: ArrayLike, gold_PN: ArrayLike, n: int) -> BestOfN:
    """The expected proxy and gold of the best of n completions, from one pool of N >= n of each prompt.

    Averaged exactly over all choices of n from the pool, not over some (Nakano et al. 2021, arXiv:2112.09332, appendix
    I; Gao et al. 2022): of N in the order of their proxy, number i (from 1) is the best of

        C(i - 1, n - 1) of the C(N, n) choices.

    Equal proxies share their gold: each is as likely to be taken.
    """
    from scipy import special

    proxy_PN, gold_PN = np.asarray(proxy_PN, float), np.asarray(gold_PN, float)
    if proxy_PN.ndim != 2 or proxy_PN.shape != gold_PN.shape:
        raise ValueError(f"proxy and gold must be [P, N] of one shape, got {proxy_PN.shape} and {gold_PN.shape}")
    size = proxy_PN.shape[1]
    if not 1 <= n <= size:
        raise ValueError(f"n must be between 1 and the {size} completions of a prompt, got {n}")

    def log_choices(of: Array | int, taken: int) -> Array:  # their numbers overflow from N of a thousand on
        return special.gammaln(of + 1) - special.gammaln(taken + 1) - special.gammaln(of - taken + 1)

    weight_N = np.zeros(size)
    weight_N[n - 1 :] = np.exp(log_choices(np.arange(n - 1.0, size), n - 1) - log_choices(size, n))
    order_PN = proxy_PN.argsort(1)
    proxy_PN, gold_PN = np.take_along_axis(proxy_PN, order_PN, 1), np.take_along_axis(gold_PN, order_PN, 1)
    shared_PN = np.stack([_shared(proxy_N, gold_N) for proxy_N, gold_N in zip(proxy_PN, gold_PN, strict=True)])
    return BestOfN(n, best_of_n_kl_bound(n), proxy_PN @ weight_N, shared_PN @ weight_N)


def _shared(proxy_N: Array, gold_N: Array) -> Array:
    """Each gold, or the mean of those whose proxies are equal."""
    _, level_N, number_L = np.unique(proxy_N, return_inverse=True, return_counts=True)
    return (np.bincount(level_N, gold_N) / number_L)[level_N]


# Reward against length


@dataclass(frozen=True)
class LengthBucket:
    """Texts of similar length."""

    shortest: float
    longest: float
    texts: int
    mean_score: float


@dataclass(frozen=True)
class LengthTrend:
    """How scores go with length."""

    slope: Estimate
    """Score per unit of length, by least squares, with the t interval of equal variances."""
    correlation: float
    """Pearson's; 0 where all scores are equal."""
    buckets: tuple[LengthBucket, ...]
    """From the shortest texts to the longest, as many in each as equal lengths allow."""


def reward_against_length(
    score_N: ArrayLike, length_N: ArrayLike, buckets: int = 5, *, confidence: float = 0.95
) -> LengthTrend | None:
    """Slope, correlation and means by length of at least 3 texts; None where all have one length."""
    from scipy import stats

    score_N, length_N = vector(score_N, "scores", 3), vector(length_N, "lengths", 3)
    if len(score_N) != len(length_N):
        raise ValueError(f"there must be one length for each score, got {len(length_N)} and {len(score_N)}")
    if buckets < 1:
        raise ValueError(f"buckets must be at least 1, got {buckets}")
    z_quantile(confidence)
    if np.ptp(length_N) == 0:
        return None
    slope, correlation = Estimate(0.0, 0.0, 0.0), 0.0
    if np.ptp(score_N) > 0:  # linregress has nan for what a constant does
        line = stats.linregress(length_N, score_N)
        half = stats.t.ppf((1 + confidence) / 2, len(score_N) - 2) * line.stderr
        slope = Estimate(float(line.slope), float(line.slope - half), float(line.slope + half))
        correlation = float(line.rvalue)
    rank_N = stats.rankdata(length_N) - 0.5  # of equal lengths their mean rank, so that they share a bucket
    bucket_N = (rank_N * buckets / len(length_N)).astype(int)
    by_length = []
    for number in np.unique(bucket_N):
        inside_N = bucket_N == number
        lengths = length_N[inside_N]
        mean = float(score_N[inside_N].mean())
        by_length.append(LengthBucket(float(lengths.min()), float(lengths.max()), int(inside_N.sum()), mean))
    return LengthTrend(slope, correlation, tuple(by_length))


# Texts and runs

Text = str | Sequence[Hashable]
"""A text's words, split at white space, or its tokens."""


def distinct_n(texts: Sequence[Text], n: int) -> float:
    """Different n-grams over all n-grams of all texts (Li et al. 2016); nan without any.

    It falls as texts grow in number and length, so compare it only between equal amounts.
    """
    ngrams = [ngram for text in texts for ngram in _ngrams(text, n)]
    return len(set(ngrams)) / len(ngrams) if ngrams else math.nan


def repetition(texts: Sequence[Text], n: int) -> float:
    """Share of a text's n-grams that it has said before, averaged over texts (seq-rep-n, Welleck et al. 2020).

    Texts of fewer than n tokens have no n-grams and are left out; nan if all are.
    """
    by_text = [ngrams for text in texts if (ngrams := _ngrams(text, n))]
    return sum(1 - len(set(ngrams)) / len(ngrams) for ngrams in by_text) / len(by_text) if by_text else math.nan


def _ngrams(text: Text, n: int) -> list[tuple[Hashable, ...]]:
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    tokens = text.split() if isinstance(text, str) else text
    return list(zip(*(tokens[first:] for first in range(n)), strict=False))


def collapsed(start_gold: ArrayLike, final_gold_R: ArrayLike) -> NDArray[np.bool_]:
    """The definition: a run has collapsed if it ends with less gold than it started with, or with none that is finite.

    Args:
        start_gold: finite, of each run [R], or one for all.
        final_gold_R: of each run.
    """
    start_gold, final_gold_R = np.asarray(start_gold, float), np.asarray(final_gold_R, float)
    if not np.isfinite(start_gold).all():
        raise ValueError(f"the initial policy's gold must be finite, got {start_gold.tolist()}")
    return ~np.isfinite(final_gold_R) | (final_gold_R < start_gold)
