"""Agreement between annotators, chance taken off: Cohen's and Fleiss' kappa, Krippendorff's alpha. No torch, no text.

    kappa = (p_o - p_e) / (1 - p_e),      alpha = 1 - D_o / D_e

p_o is the observed agreement and p_e that of annotators who label at random with the same frequencies; D_o and D_e are
the observed and expected disagreement. 1 is full agreement, 0 what chance gives.

Shape legend: N items, A annotators, C classes, R resamples.

References: Cohen 1960 (Educational and Psychological Measurement 20:37), Fleiss 1971 (Psychological Bulletin 76:378),
Krippendorff 2011, "Computing Krippendorff's alpha-reliability".
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from textrl_gym.extras import install
from textrl_gym.stats.estimates import Array, Estimate

Counts = NDArray[np.int64]


def cohen_kappa(first_N: ArrayLike, second_N: ArrayLike) -> float | None:
    """Cohen's kappa of two annotators who labelled the same items; None where both use one class alone.

    Args:
        first_N, second_N: class of each item.

    Raises:
        ValueError: of no or of different lengths.
    """
    a_N, b_N = np.asarray(first_N), np.asarray(second_N)
    if a_N.ndim != 1 or a_N.shape != b_N.shape or not len(a_N):
        raise ValueError(f"two annotators need labels of the same items, at least one, got {len(a_N)} and {len(b_N)}")
    classes_C = np.unique(np.concatenate([a_N, b_N]))
    p_a = (a_N[:, None] == classes_C).mean(0)
    p_b = (b_N[:, None] == classes_C).mean(0)
    return _beyond_chance(float((a_N == b_N).mean()), float(p_a @ p_b))


def fleiss_kappa(count_NC: ArrayLike) -> float | None:
    """Fleiss' kappa of items that have the same number of labels each; None where all labels are of one class.

    Args:
        count_NC: how many annotators gave item n the class c.

    Raises:
        ValueError: not every item has the same number of labels, at least two.
    """
    counts = np.asarray(count_NC, np.float64)
    if counts.ndim != 2 or not len(counts) or counts.min() < 0:
        raise ValueError(f"counts must be [items, classes] and at least 0, got shape {counts.shape}")
    labels = counts.sum(1)
    if labels.min() != labels.max() or labels[0] < 2:
        raise ValueError(
            f"every item must have the same number of labels, at least 2, got {labels.min():g} to {labels.max():g}"
        )
    n = labels[0]
    observed = float(((counts**2).sum(1) - n).mean() / (n * (n - 1)))
    share_C = counts.sum(0) / counts.sum()
    return _beyond_chance(observed, float(share_C @ share_C))


def _beyond_chance(observed: float, expected: float) -> float | None:
    # One class alone leaves nothing that chance could miss: 0 / 0.
    return None if expected >= 1 else (observed - expected) / (1 - expected)


def krippendorff_alpha(count_NC: ArrayLike) -> float | None:
    """Krippendorff's alpha of nominal labels; items may have any number of labels. None where it is not defined.

    That is where no item has two labels, or all labels are of one class.

    Args:
        count_NC: how many annotators gave item n the class c.

    Raises:
        ImportError: the package krippendorff is not installed.
    """
    counts = np.asarray(count_NC, np.int64)
    paired = counts[counts.sum(1) >= 2]
    if not len(paired) or (paired.sum(0) > 0).sum() < 2:
        return None
    try:
        import krippendorff
    except ImportError as error:
        raise ImportError(f"agreement needs the package krippendorff: {install('annotate')}") from error
    return float(krippendorff.alpha(value_counts=paired, level_of_measurement="nominal"))


def over_items(
    statistic: Callable[[Counts], float | None],
    count_NC: ArrayLike,
    *,
    confidence: float = 0.95,
    resamples: int = 500,
    seed: int = 0,
) -> Estimate | None:
    """A statistic of items with the percentile interval of a bootstrap over items; None where it is not defined.

    Resamples in which it is not defined are left out. The interval is (nan, nan) where fewer than half are left.
    """
    counts: Counts = np.asarray(count_NC, np.int64)
    value = statistic(counts)
    if value is None:
        return None
    rng = np.random.default_rng(seed)
    drawn = (statistic(counts[rng.integers(len(counts), size=len(counts))]) for _ in range(resamples))
    values = [one for one in drawn if one is not None]
    if len(values) < resamples / 2:
        return Estimate(value, math.nan, math.nan)
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return Estimate(value, float(low), float(high))


def class_counts(item_L: ArrayLike, label_L: ArrayLike, classes: int) -> Counts:
    """How many labels of each class an item has, int64 [N, C], of labels that name their item and class by number."""
    items, labels = np.asarray(item_L, np.int64), np.asarray(label_L, np.int64)
    counts = np.zeros((int(items.max(initial=-1)) + 1, classes), np.int64)
    np.add.at(counts, (items, labels), 1)
    return counts


def shares(count_NC: Counts) -> Array:
    """The share of each class among all labels."""
    return count_NC.sum(0) / max(count_NC.sum(), 1)
