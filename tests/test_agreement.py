"""Agreement between annotators: numbers of statsmodels and krippendorff, and simulated people of known noise."""

from __future__ import annotations

from typing import Any

import krippendorff
import numpy as np
import pytest
from statsmodels.stats import inter_rater

from textrl_gym.stats import agreement, annotators

EXACT: dict[str, Any] = {"rel": 0, "abs": 1e-12}


def simulated(accuracy_A: list[float], items: int, seed: int, classes: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """True classes [N], and what each annotator says, [N, A]: right with its probability, else another class."""
    rng = np.random.default_rng(seed)
    truth_N = rng.integers(classes, size=items)
    wrong_NA = rng.random((items, len(accuracy_A))) >= accuracy_A
    other_NA = (truth_N[:, None] + rng.integers(1, classes, size=wrong_NA.shape)) % classes
    return truth_N, np.where(wrong_NA, other_NA, truth_N[:, None])


def columns(label_NA: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels as columns: item, annotator, label."""
    items, people = label_NA.shape
    return np.repeat(np.arange(items), people), np.tile(np.arange(people), items), label_NA.ravel()


# -- kappa and alpha --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_kappas_are_those_of_statsmodels(classes: int) -> None:
    _, label_NA = simulated([0.9, 0.7, 0.6, 0.8], 173, seed=classes, classes=classes)
    table = np.zeros((classes, classes))
    np.add.at(table, (label_NA[:, 0], label_NA[:, 1]), 1)
    theirs = inter_rater.cohens_kappa(table, return_results=False)
    assert agreement.cohen_kappa(label_NA[:, 0], label_NA[:, 1]) == pytest.approx(theirs, **EXACT)
    counts, _ = inter_rater.aggregate_raters(label_NA, classes)
    item, _, label = columns(label_NA)
    assert (agreement.class_counts(item, label, classes) == counts).all()
    assert agreement.fleiss_kappa(counts) == pytest.approx(inter_rater.fleiss_kappa(counts), **EXACT)


def test_alpha_is_krippendorffs_own() -> None:
    """Items of one to four labels: those of one say nothing, and are left out there too."""
    _, label_NA = simulated([0.9, 0.7, 0.6, 0.8], 173, seed=3, classes=3)
    given_NA = np.random.default_rng(0).random(label_NA.shape) < 0.6
    data_AN = np.where(given_NA, label_NA, np.nan).T
    theirs = krippendorff.alpha(reliability_data=data_AN, level_of_measurement="nominal")
    item, _, label = (column[given_NA.ravel()] for column in columns(label_NA))
    counts = agreement.class_counts(item, label, 3)
    assert 1 in counts.sum(1)
    assert agreement.krippendorff_alpha(counts) == pytest.approx(theirs, **EXACT)


def test_by_hand() -> None:
    # Observed 3 of 4; both say 0 half the time: 0.5 by chance; (0.75 - 0.5) / 0.5.
    assert agreement.cohen_kappa([0, 0, 1, 1], [0, 0, 1, 0]) == pytest.approx((0.75 - 0.5) / 0.5, **EXACT)
    # Observed (1 + 0) / 2; 3 of 4 labels are 0: 0.625 by chance.
    assert agreement.fleiss_kappa([[2, 0], [1, 1]]) == pytest.approx((0.5 - 0.625) / 0.375, **EXACT)


def test_where_nothing_can_be_said() -> None:
    assert agreement.cohen_kappa([1, 1], [1, 1]) is None
    assert agreement.fleiss_kappa([[2, 0], [2, 0]]) is None
    assert agreement.krippendorff_alpha([[2, 0], [2, 0]]) is None
    assert agreement.krippendorff_alpha([[1, 0], [0, 1]]) is None
    with pytest.raises(ValueError, match="same number of labels, at least 2, got 1 to 2"):
        agreement.fleiss_kappa([[2, 0], [1, 0]])
    with pytest.raises(ValueError, match="got 2 and 1"):
        agreement.cohen_kappa([1, 1], [1])


def test_alpha_recovers_the_noise() -> None:
    """Two classes, equally frequent, right with probability p: two annotators agree with p^2 + (1 - p)^2, chance with
    1/2, so that alpha is (2p - 1)^2, 0.64 for p = 0.9."""
    values, inside = [], 0
    for seed in range(20):
        _, label_NA = simulated([0.9] * 3, 300, seed)
        item, _, label = columns(label_NA)
        counts = agreement.class_counts(item, label, 2)
        estimate = agreement.over_items(agreement.krippendorff_alpha, counts, resamples=100, seed=seed)
        assert estimate is not None
        values.append(estimate.value)
        inside += estimate.low <= 0.64 <= estimate.high
    # The standard deviation of one was 0.033 over 300 seeds; four of the mean of 20 are 0.03.
    assert np.mean(values) == pytest.approx(0.64, rel=0, abs=0.03)
    assert inside >= 16  # 95% of 20 are 19; 16 or more have probability 0.997


# -- models of annotators ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [False, True])
def test_dawid_skene_recovers_accuracies_and_beats_the_majority(symmetric: bool) -> None:
    # Three who know something: of two alone only the product of their accuracies (over chance) could be told.
    accuracy = [0.95, 0.8, 0.7, 0.55, 0.5]
    truth_N, label_NA = simulated(accuracy, 2000, seed=1)
    fit = annotators.dawid_skene(*columns(label_NA), symmetric=symmetric)
    assert fit.accuracy_A == pytest.approx(accuracy, rel=0, abs=0.04)  # standard errors are about 0.01
    right = float((fit.posterior_NC.argmax(1) == truth_N).mean())
    majority = float(((label_NA.mean(1) > 0.5) == truth_N).mean())
    assert right > 0.92 and majority < 0.88, (right, majority)


def test_dawid_skene_knows_confusions() -> None:
    """One annotator calls half of class 2 class 0."""
    rng = np.random.default_rng(0)
    truth_N, label_NA = simulated([0.9, 0.9, 0.9, 0.9], 3000, seed=2, classes=3)
    label_NA[:, 0] = np.where((truth_N == 2) & (rng.random(3000) < 0.5), 0, truth_N)
    fit = annotators.dawid_skene(*columns(label_NA), classes=3)
    assert fit.confusion_ACC[0] == pytest.approx(np.array([[1, 0, 0], [0, 1, 0], [0.5, 0, 0.5]]), rel=0, abs=0.04)


def test_dawid_skene_of_a_label_alone() -> None:
    """One annotator, one label: believed as far as the prior goes, RIGHT / (RIGHT + WRONG) or more, and never 1."""
    fit = annotators.dawid_skene([0], [0], [1], symmetric=True)
    assert 0.75 <= fit.posterior_NC[0, 1] < 1
    with pytest.raises(ValueError, match="labels must be 0 to 1, got 2"):
        annotators.dawid_skene([0], [0], [2])
    with pytest.raises(ValueError, match="columns of one length"):
        annotators.dawid_skene([0, 1], [0], [1])


def test_bradley_terry_recovers_scores_and_reliability() -> None:
    """40 texts compared at random by three reliable annotators (eta 0.98), a coin and one who reads the scale
    upside down."""
    rng = np.random.default_rng(0)
    score_I = rng.normal(0, 1.5, 40)
    eta_A = np.array([0.98, 0.98, 0.98, 0.5, 0.05])
    pair_L2 = np.array([rng.choice(40, 2, replace=False) for _ in range(6000)])
    who_L = rng.integers(5, size=6000)
    p_L = 1 / (1 + np.exp(score_I[pair_L2[:, 1]] - score_I[pair_L2[:, 0]]))
    first_L = rng.random(6000) < eta_A[who_L] * p_L + (1 - eta_A[who_L]) * (1 - p_L)
    winner_L = np.where(first_L, pair_L2[:, 0], pair_L2[:, 1])
    loser_L = np.where(first_L, pair_L2[:, 1], pair_L2[:, 0])
    fit = annotators.crowd_bradley_terry(winner_L, loser_L, who_L)
    assert fit.reliability_A == pytest.approx(eta_A, rel=0, abs=0.06)
    assert np.corrcoef(fit.score_I, score_I)[0, 1] > 0.98


def test_the_gradient_of_bradley_terry_is_that_of_its_loss() -> None:
    from scipy import optimize

    rng = np.random.default_rng(0)
    winner, loser, who = rng.integers(3, size=20), rng.integers(3, 6, size=20), rng.integers(2, size=20)
    loss = annotators.crowd_loss(winner, loser, who, texts=6, spread=2.0)
    x = rng.normal(size=8)
    assert optimize.check_grad(lambda y: loss(y)[0], lambda y: loss(y)[1], x) < 1e-5
