"""What a file of labels is worth: agreement between annotators, with themselves and with known answers, and biases.

The unit is a comparison: two completions of an item, of which an annotator prefers the one, the other or neither. K
completions give K (K - 1) / 2 of them. Completions were shuffled when the item was made, so that "the first is
better" is no more frequent than "the second is" by itself.

Intervals are of 95%: of kappa and alpha by a bootstrap over comparisons, of shares by Wilson's score. Those of rankings
are too narrow: comparisons of one ranking are not independent.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from textrl_gym.data import labels
from textrl_gym.data.labels import CHECK, PAIR, QUALIFICATION, REPEAT, Label
from textrl_gym.feedback.answers import is_right
from textrl_gym.stats import agreement, annotators, pairwise
from textrl_gym.stats.estimates import Estimate

CLASSES = 3
"""Of a comparison: the earlier completion is better, the later one is, or neither."""
FEW = 20
"""Comparisons of two annotators below which their kappa says little."""
QUICK_SECONDS = 1.0
"""Nobody reads two answers in less."""


@dataclasses.dataclass(frozen=True)
class PairKappa:
    """Two annotators who compared the same completions."""

    first: str
    second: str
    comparisons: int
    agreement: Estimate
    """Share of comparisons in which both say the same."""
    kappa: float | None
    """Cohen's."""


@dataclasses.dataclass(frozen=True)
class Annotator:
    """How one annotator answers; None where there is nothing to tell it from."""

    name: str
    labels: int
    """Answers to questions, without qualification, checks and repetitions."""
    ties: int
    skipped: int
    seconds: float | None
    """Median time of an answer."""
    first: Estimate | None
    """Share of preferences for the completion that was shown earlier, where the order is known; 0.5 without a bias,
    since sides are random."""
    flipped: Estimate | None
    """Share of comparisons whose verdict turned round with the order, of a judge that is asked in both."""
    longer: Estimate | None
    """Share of preferences for the completion with more words."""
    myself: Estimate | None
    """Share of comparisons that were decided alike when they were asked again."""
    gold: Estimate | None
    """Share of preferences that are as known, a tie counting half."""
    checks: Estimate | None
    """Share of attention checks that were answered as known."""
    accuracy: float | None
    """Dawid and Skene's: how likely the annotator is right, as the others see it."""
    reliability: float | None
    """Bradley-Terry's with annotators: how likely the annotator says what the scores say; 0.5 is a coin. Of rankings
    alone: where each text is compared to one other, a coin's answers look like those to a close call."""


@dataclasses.dataclass(frozen=True)
class ModelComparison:
    """How often one model's completions were preferred to another's."""

    model: str
    other: str
    comparisons: int
    preferred: Estimate
    """A tie counts half."""


@dataclasses.dataclass(frozen=True)
class LabelReport:
    """All of it."""

    labels: int
    items: int
    counts: dict[str, int]
    """By what was asked and answered."""
    alpha: Estimate | None
    """Krippendorff's."""
    fleiss: Estimate | None
    """Fleiss' kappa of the comparisons that have the most frequent number of labels, at least 2."""
    fleiss_labels: int
    """That number."""
    pairs: list[PairKappa]
    people: list[Annotator]
    models: list[ModelComparison]
    warnings: list[str]


Comparison = tuple[str, int, int]
"""Item and two places, the lower one first."""


def decided(rows: Iterable[Label]) -> Iterator[tuple[Label, Comparison, int]]:
    """Every comparison of labels: 0 where the lower place is better, 1 where the higher one is, 2 for neither."""
    for label in rows:
        for (a, b), decision in labels.decisions(label.ranks or []):
            yield label, (label.item, a, b), decision


def label_agreement(rows: Sequence[Label]) -> LabelReport:
    """What labels are worth.

    Args:
        rows: those that hold, of all kinds.

    Raises:
        ValueError: there are none.
        ImportError: the package krippendorff or scipy is not installed.
    """
    if not rows:
        raise ValueError("there are no labels")
    pairs = [label for label in rows if label.kind == PAIR]
    counts = _counts(pairs)
    most_frequent = Counter(int(n) for n in counts.sum(1) if n >= 2).most_common(1)
    number = most_frequent[0][0] if most_frequent else 0
    people = _people(rows)
    return LabelReport(
        labels=len(rows),
        items=len({label.item for label in pairs}),
        counts=_what_was_answered(rows),
        alpha=agreement.over_items(agreement.krippendorff_alpha, counts) if len(counts) else None,
        fleiss=agreement.over_items(agreement.fleiss_kappa, counts[counts.sum(1) == number]) if number else None,
        fleiss_labels=number,
        pairs=_pair_kappas(pairs),
        people=people,
        models=_models(pairs),
        warnings=[words for person in people for words in _warnings(person)],
    )


def _counts(pairs: Sequence[Label]) -> agreement.Counts:
    """How many labels of each class every comparison has."""
    numbers: dict[Comparison, int] = {}
    item_and_label = [(numbers.setdefault(key, len(numbers)), decision) for _, key, decision in decided(pairs)]
    item_L, label_L = np.array(item_and_label, np.int64).reshape(-1, 2).T
    return agreement.class_counts(item_L, label_L, CLASSES)


def _what_was_answered(rows: Sequence[Label]) -> dict[str, int]:
    def words(label: Label) -> str:
        if label.kind != PAIR:
            return {REPEAT: "asked again", CHECK: "attention checks", QUALIFICATION: "qualification"}[label.kind]
        if label.ranks is None:
            return "skipped"
        return "all bad" if label.all_bad else "ties" if len(set(label.ranks)) == 1 else "preferences"

    counts = Counter(words(label) for label in rows)
    order = ("preferences", "ties", "all bad", "skipped", "asked again", "attention checks", "qualification")
    return {name: counts[name] for name in order if counts[name]}


def _pair_kappas(pairs: Sequence[Label]) -> list[PairKappa]:
    by_name: dict[str, dict[Comparison, int]] = defaultdict(dict)
    for label, key, decision in decided(pairs):
        by_name[label.annotator][key] = decision
    kappas = []
    for first, second in itertools.combinations(sorted(by_name), 2):
        both = sorted(by_name[first].keys() & by_name[second].keys())
        if both:
            a_N, b_N = ([by_name[name][key] for key in both] for name in (first, second))
            same = pairwise.win_rate([float(a == b) for a, b in zip(a_N, b_N, strict=True)])
            kappas.append(PairKappa(first, second, len(both), same, agreement.cohen_kappa(a_N, b_N)))
    return kappas


# -- each annotator ---------------------------------------------------------------------------------------------------


def _people(rows: Sequence[Label]) -> list[Annotator]:
    by_name: dict[str, list[Label]] = defaultdict(list)
    for label in rows:
        by_name[label.annotator].append(label)
    accuracy, reliability = _as_others_see_them([label for label in rows if label.kind == PAIR])
    return [_person(name, own, accuracy.get(name), reliability.get(name)) for name, own in sorted(by_name.items())]


def _person(name: str, own: Sequence[Label], accuracy: float | None, reliability: float | None) -> Annotator:
    pairs = [label for label in own if label.kind == PAIR]
    times = [label.seconds for label in pairs if label.seconds is not None]
    return Annotator(
        name=name,
        labels=len(pairs),
        ties=sum(label.ranks is not None and len(set(label.ranks)) == 1 for label in pairs),
        skipped=sum(label.ranks is None for label in pairs),
        seconds=statistics.median(times) if times else None,
        first=_share(_first_preferred(pairs)),
        flipped=_share(_flipped(pairs)),
        longer=_share(_longer_preferred(pairs)),
        myself=_share(_alike_again(own)),
        gold=_share(_as_known(pairs)),
        checks=_share(float(is_right(label)) for label in own if label.kind == CHECK),
        accuracy=accuracy,
        reliability=reliability,
    )


def _share(outcomes: Iterable[float]) -> Estimate | None:
    values = list(outcomes)
    return pairwise.win_rate(values) if values else None


def _preferences(rows: Iterable[Label]) -> Iterator[tuple[Label, Comparison, int]]:
    return ((label, key, decision) for label, key, decision in decided(rows) if decision < 2)


def _first_preferred(pairs: Iterable[Label]) -> Iterator[float]:
    """Of every preference whose order is known, 1 where it is for what was shown earlier.

    A file of chosen and rejected says nothing of the order, and its own is no annotator's choice.
    """
    for label, (_, a, b), decision in _preferences(pairs):
        if label.order:
            yield float(decision == int(label.order.index(a) > label.order.index(b)))


def _flipped(rows: Iterable[Label]) -> Iterator[float]:
    """Of every comparison that was made in both orders, 1 where the verdict turned round."""
    for label in rows:
        if label.flips is not None:
            size = len(label.completions)
            yield from [1.0] * label.flips + [0.0] * (size * (size - 1) // 2 - label.flips)


def _longer_preferred(pairs: Sequence[Label]) -> Iterator[float]:
    for label, (_, a, b), decision in _preferences(pairs):
        words = [len(label.completions[place].split()) for place in (a, b)]
        if words[0] != words[1]:
            yield float(words[decision] > words[1 - decision])


def _alike_again(own: Sequence[Label]) -> Iterator[float]:
    before = {key: decision for _, key, decision in decided(label for label in own if label.kind == PAIR)}
    for _, key, decision in decided(label for label in own if label.kind == REPEAT):
        if key in before:
            yield float(before[key] == decision)


def _as_known(pairs: Sequence[Label]) -> Iterator[float]:
    for label, (_, a, b), decision in decided(pairs):
        if label.gold is not None and label.gold[a] != label.gold[b]:
            yield 0.5 if decision == 2 else float(decision == int(label.gold[b] > label.gold[a]))


def _as_others_see_them(pairs: Sequence[Label]) -> tuple[dict[str, float], dict[str, float]]:
    """Dawid-Skene's accuracy and Bradley-Terry's reliability by name; nothing of fewer than three annotators.

    Of two, who agree in some share of comparisons, nobody can tell which of them errs.
    """
    cast = labels.votes({"item": one.item, "annotator": one.annotator, "ranks": one.ranks or []} for one in pairs)
    if len(cast.names) < 3 or not (np.bincount(cast.pair_L, minlength=1) >= 2).any():
        return {}, {}
    accuracy_A = annotators.dawid_skene(cast.pair_L, cast.annotator_L, cast.second_L, symmetric=True).accuracy_A
    accuracy = dict(zip(cast.names, accuracy_A.tolist(), strict=True))
    if all(len(label.completions) == 2 for label in pairs):
        return accuracy, {}
    reliability_A = annotators.crowd_bradley_terry(*cast.texts(), cast.annotator_L).reliability_A
    return accuracy, dict(zip(cast.names, reliability_A.tolist(), strict=True))


def _warnings(person: Annotator) -> Iterator[str]:
    """What is odd about an annotator's answers, in words."""
    if person.first is not None and not person.first.low <= 0.5 <= person.first.high:
        side = "first" if person.first.value > 0.5 else "last"
        yield f"{person.name} prefers what is shown {side}: {_words(person.first)} of preferences go to the first"
    if person.checks is not None and person.checks.value < 0.8:
        yield f"{person.name} answers attention checks wrongly: {_words(person.checks)} as known"
    if person.accuracy is not None and person.accuracy < 0.6:
        yield f"{person.name} agrees with the others as a coin would: accuracy {person.accuracy:.2f} by Dawid and Skene"
    if person.seconds is not None and person.seconds < QUICK_SECONDS:
        yield f"{person.name} answers in {person.seconds:.1f} seconds, faster than anybody reads"


def _words(share: Estimate) -> str:
    return f"{share.value:.2f} ({share.low:.2f} to {share.high:.2f})"


# -- models -----------------------------------------------------------------------------------------------------------


def _models(pairs: Sequence[Label]) -> list[ModelComparison]:
    """Where completions are of two models or more, how often each was preferred to each other."""
    outcomes: dict[tuple[str, str], list[float]] = defaultdict(list)
    for label, (_, a, b), decision in decided(pairs):
        if label.models and label.models[a] != label.models[b]:
            names = [label.models[a], label.models[b]]
            first = min(names)  # in one direction
            won = 0.5 if decision == 2 else float(names[decision] == first)
            outcomes[first, max(names)].append(won)
    return [
        ModelComparison(model, other, len(values), pairwise.win_rate(values))
        for (model, other), values in sorted(outcomes.items())
    ]


def as_record(report: LabelReport) -> dict[str, Any]:
    """The report as JSON holds it."""
    return dataclasses.asdict(report)
