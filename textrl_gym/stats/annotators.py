"""Models of annotators: who errs how often, and what most likely is right. No torch, no text.

Dawid and Skene (1979, Applied Statistics 28:20): an item has a true class j with probability p_j, and annotator a calls
it c with probability pi_ajc. EM alternates

    P(j | labels of n) ~ p_j prod_l pi_a(l),j,c(l)          p, pi: the weighted shares of these

Chen et al. (2013, WSDM, "Pairwise ranking aggregation in a crowdsourced setting"): Bradley-Terry's scores s of the
items, and for each annotator the probability eta_a of saying what the scores say,

    P(a prefers i to j) = eta_a sigmoid(s_i - s_j) + (1 - eta_a) sigmoid(s_j - s_i).

Both need items with several labels: an annotator is known by agreeing with others.

Shape legend: L labels, N items of Dawid-Skene, I texts of Bradley-Terry, A annotators, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from textrl_gym.stats.estimates import Array

RIGHT, WRONG = 1.5, 0.5
"""Labels that an annotator is given beforehand for each class: a weak belief that people are right rather than wrong.
Without it the classes could change places, and an annotator of one label would be taken for infallible."""
MOST_STEPS = 1000


@dataclass(frozen=True)
class DawidSkene:
    """What Dawid and Skene's model says."""

    posterior_NC: Array
    """Probability of each class of each item."""
    confusion_ACC: Array
    """P(says c | true class j) of each annotator: [annotator, j, c]."""
    prior_C: Array
    """Share of each class."""

    @property
    def accuracy_A(self) -> Array:
        """P(right) of each annotator, over the shares of the classes."""
        return np.einsum("ajj,j->a", self.confusion_ACC, self.prior_C)


def dawid_skene(
    item_L: ArrayLike,
    annotator_L: ArrayLike,
    label_L: ArrayLike,
    classes: int = 2,
    *,
    symmetric: bool = False,
    tolerance: float = 1e-8,
) -> DawidSkene:
    """Dawid and Skene's model by EM, from the shares of votes; see the head of this file.

    Args:
        item_L, annotator_L, label_L: numbers from 0 on, of each label.
        classes: how many there are.
        symmetric: the classes are names alone, as the two sides of a comparison: equally frequent, and an annotator
            errs equally often in each and towards each other one.
        tolerance: EM ends when no probability moves by more.

    Raises:
        ValueError: no labels, lengths that differ, or a label that is no class.
    """
    item, annotator, label = _columns(item_L, annotator_L, label_L)
    if label.max() >= classes:
        raise ValueError(f"labels must be 0 to {classes - 1}, got {label.max()}")
    people = int(annotator.max()) + 1
    posterior = np.zeros((int(item.max()) + 1, classes))
    np.add.at(posterior, (item, label), 1.0)
    posterior /= np.maximum(posterior.sum(1, keepdims=True), 1)
    for _ in range(MOST_STEPS):
        counts = np.zeros((people, classes, classes))
        np.add.at(counts.transpose(0, 2, 1), (annotator, label), posterior[item])
        prior, confusion = _most_likely(counts, posterior, symmetric)
        log = np.tile(np.log(prior), (len(posterior), 1))
        np.add.at(log, item, np.log(confusion[annotator, :, label]))
        before, posterior = posterior, np.exp(log - log.max(1, keepdims=True))
        posterior /= posterior.sum(1, keepdims=True)
        if np.abs(posterior - before).max() <= tolerance:
            break
    return DawidSkene(posterior, confusion, prior)


def _most_likely(count_ACC: Array, posterior_NC: Array, symmetric: bool) -> tuple[Array, Array]:
    """The shares of the classes and the annotators' confusions that the expected counts make most likely."""
    items, classes = posterior_NC.shape
    beforehand = np.full((classes, classes), WRONG / max(classes - 1, 1))
    np.fill_diagonal(beforehand, RIGHT)
    counts = count_ACC + beforehand
    if not symmetric:
        return (posterior_NC.sum(0) + 1) / (items + classes), counts / counts.sum(2, keepdims=True)
    right_A = np.einsum("ajj->a", counts) / counts.sum((1, 2))
    confusion = np.empty_like(counts)
    confusion[:] = ((1 - right_A) / max(classes - 1, 1))[:, None, None]
    confusion[:, range(classes), range(classes)] = right_A[:, None]
    return np.full(classes, 1 / classes), confusion


@dataclass(frozen=True)
class CrowdBradleyTerry:
    """What Chen et al.'s model says."""

    score_I: Array
    """In nats; only differences between texts that were compared mean anything."""
    reliability_A: Array
    """eta: how likely each annotator says what the scores say; 0.5 is a coin."""


def crowd_bradley_terry(
    winner_L: ArrayLike, loser_L: ArrayLike, annotator_L: ArrayLike, *, spread: float = 2.0
) -> CrowdBradleyTerry:
    """Bradley-Terry scores and the reliability of annotators, at the maximum of the posterior, by L-BFGS.

    Args:
        winner_L, loser_L: numbers of the preferred and of the other text, from 0 on.
        annotator_L: who compared them.
        spread: standard deviation of the normal prior of the scores, in nats: without one a text that was always
            preferred would have the score infinity. eta has a Beta prior of RIGHT and WRONG labels.
    """
    from scipy import optimize, special

    winner, loser, annotator = _columns(winner_L, loser_L, annotator_L)
    texts, people = int(max(winner.max(), loser.max())) + 1, int(annotator.max()) + 1
    # From reliable annotators: where all are coins nothing tells which text is the better one.
    begin = np.concatenate([np.zeros(texts), np.full(people, np.log(RIGHT / WRONG))])
    loss = crowd_loss(winner, loser, annotator, texts, spread)
    fit = optimize.minimize(loss, begin, jac=True, method="L-BFGS-B", options={"maxiter": 5000, "maxfun": 10_000})
    return CrowdBradleyTerry(fit.x[:texts], special.expit(fit.x[texts:]))


def crowd_loss(
    winner: np.ndarray, loser: np.ndarray, annotator: np.ndarray, texts: int, spread: float
) -> Callable[[Array], tuple[float, Array]]:
    """Minus the logarithm of the posterior, in nats, and its gradient, at [scores, log odds of eta]."""
    from scipy import special

    def loss(x: Array) -> tuple[float, Array]:
        score, logit = x[:texts], x[texts:]
        eta = special.expit(logit)
        own, p = eta[annotator], special.expit(score[winner] - score[loser])
        chance = own * p + (1 - own) * (1 - p)
        value = -np.log(chance).sum() + (score @ score) / (2 * spread**2)
        value -= (RIGHT * special.log_expit(logit) + WRONG * special.log_expit(-logit)).sum()
        by_gap = -(2 * own - 1) * p * (1 - p) / chance
        slope = np.zeros_like(x)
        np.add.at(slope, winner, by_gap)
        np.add.at(slope, loser, -by_gap)
        slope[:texts] += score / spread**2
        np.add.at(slope, texts + annotator, -(2 * p - 1) * own * (1 - own) / chance)
        slope[texts:] += (RIGHT + WRONG) * eta - RIGHT
        return float(value), slope

    return loss


def _columns(*columns: ArrayLike) -> list[np.ndarray]:
    arrays = [np.asarray(column, np.int64) for column in columns]
    sizes = {array.shape for array in arrays}
    if len(sizes) != 1 or arrays[0].ndim != 1 or not len(arrays[0]):
        raise ValueError(f"labels must be columns of one length, at least 1, got shapes {sorted(sizes)}")
    if min(array.min() for array in arrays) < 0:
        raise ValueError("items, annotators and labels are numbered from 0 on")
    return arrays
