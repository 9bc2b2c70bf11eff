"""Labels of annotators: what was asked, and who answered what. One JSON object a line, appended and never changed.

A label ranks the completions of one prompt. Ranks begin at 1, the best; equal ranks are a tie; None is a question that
was passed over. Taking a label back appends a line that names it: the file is the whole history, and `standing` gives
what holds. `data.preferences` reads such a file as it is.

Shape legend: L labels, A annotators, K completions of a prompt.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from textrl_gym import files
from textrl_gym.core import Row
from textrl_gym.data.rows import BadRow, RawRows, shown
from textrl_gym.stats import annotators

Kind = Literal["pair", "repeat", "check", "qualification"]
PAIR: Kind = "pair"
REPEAT: Kind = "repeat"
CHECK: Kind = "check"
QUALIFICATION: Kind = "qualification"
KINDS: tuple[Kind, ...] = (PAIR, REPEAT, CHECK, QUALIFICATION)
AnnotatorWeights = Literal["none", "dawid-skene", "bradley-terry"]
CONFIDENCE = (1, 4)
"""The scale of confidence: 1 is a guess, 4 is certain."""
SPAN_MARKS = ("good", "bad")


@dataclasses.dataclass(frozen=True)
class Item:
    """A question: completions of one prompt, to be ranked."""

    id: str
    prompt: str | list[dict[str, str]]
    """A text, or a conversation."""
    completions: list[str]
    kind: Kind = PAIR
    models: list[str] = dataclasses.field(default_factory=list)
    """Who wrote each completion; empty where it is not known."""
    gold: list[float] | None = None
    """A known score of each completion, the higher the better; annotators never see it."""

    def __post_init__(self) -> None:
        if len(self.completions) < 2:
            raise ValueError(f"item {self.id!r} must have at least 2 completions, got {len(self.completions)}")
        if self.kind not in KINDS:
            raise ValueError(f"item {self.id!r}: kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        for name, values in (("models", self.models), ("gold", self.gold or [])):
            if values and len(values) != len(self.completions):
                raise ValueError(
                    f"item {self.id!r}: {name} must have one value for each of {len(self.completions)} completions, "
                    f"got {len(values)}"
                )


@dataclasses.dataclass(frozen=True)
class Label:
    """One annotator's answer to an item; a line of the file."""

    id: int
    """Counts the lines."""
    item: str
    kind: Kind
    annotator: str
    prompt: str | list[dict[str, str]]
    completions: list[str]
    ranks: list[int] | None
    """Of each completion: 1 is the best, equal ranks are a tie; None: passed over."""
    all_bad: bool = False
    """Whether the annotator held every completion for bad; a tie, then."""
    order: list[int] = dataclasses.field(default_factory=list)
    """Places in `completions`, in the order in which they were shown; empty where it is not known."""
    confidence: int | None = None
    """1 (a guess) to 4 (certain), where it was given."""
    comment: str = ""
    spans: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """Marked parts: {"completion": place, "start", "end": characters, "mark": "good" or "bad"}."""
    seconds: float | None = None
    """How long the question was looked at."""
    time: str = ""
    """When it was answered, ISO 8601 in UTC."""
    models: list[str] = dataclasses.field(default_factory=list)
    gold: list[float] | None = None
    undoes: int | None = None
    """The label that this line takes back; the other fields then repeat it."""
    probabilities: list[float] | None = None
    """Of every two completions a < b, in the order of itertools.combinations, how likely a is the better one, 0 to 1,
    where a judge says so; a soft label."""
    flips: int | None = None
    """Of these pairs, those whose verdict turned round with their order; None: they were shown in one order."""


# -- reading ----------------------------------------------------------------------------------------------------------

_TEXT: files.Kinds = {"item": (str,), "annotator": (str,), "prompt": (str, list), "completions": (list,)}
_REQUIRED: files.Kinds = {"id": (int,), **_TEXT, "ranks": (list, type(None))}
_OPTIONAL: files.Kinds = {
    "kind": (str,),
    "all_bad": (bool,),
    "order": (list,),
    "confidence": (int, type(None)),
    "comment": (str,),
    "spans": (list,),
    "seconds": (int, float, type(None)),
    "time": (str,),
    "models": (list,),
    "gold": (list, type(None)),
    "undoes": (int, type(None)),
    "probabilities": (list, type(None)),
    "flips": (int, type(None)),
}


def read_history(file: Path) -> list[Label]:
    """Every line of a file of labels, also what was taken back.

    Raises:
        ValueError: naming the line that holds no label.
    """
    names = {field.name for field in dataclasses.fields(Label)}
    labels = []
    for number, row in enumerate(files.read_json_lines(file), 1):
        where = f"{file}, label {number}"
        files.check_fields(row, where, _REQUIRED, _OPTIONAL)
        try:
            check_label(row)
        except ValueError as error:
            raise ValueError(f"{where!r} is damaged: {error}") from error
        labels.append(Label(**{"kind": PAIR, **{name: value for name, value in row.items() if name in names}}))
    return labels


def read_labels(file: Path) -> list[Label]:
    """The labels of a file that hold, in order.

    Raises:
        ValueError: there is no such file, or a line holds no label.
    """
    if not file.is_file():
        raise ValueError(f"there is no file of labels {str(file)!r}")
    return standing(read_history(file))


def standing(history: Sequence[Label]) -> list[Label]:
    """The labels that were not taken back."""
    undone = {label.undoes for label in history}
    return [label for label in history if label.undoes is None and label.id not in undone]


def check_label(row: Mapping[str, Any]) -> None:
    """Hold that the parts of a label fit each other.

    Raises:
        ValueError: naming the field and what is allowed.
    """
    completions, ranks = row["completions"], row["ranks"]
    size = len(completions)
    if size < 2 or not all(isinstance(text, str) for text in completions):
        raise ValueError(f"completions must be at least two texts, got {shown(completions)}")
    if ranks is not None:
        if len(ranks) != size or not all(type(rank) is int and 1 <= rank <= size for rank in ranks):
            raise ValueError(f"ranks must be {size} whole numbers from 1 to {size}, got {shown(ranks)}")
        if min(ranks) != 1:
            raise ValueError(f"ranks must begin at 1, got {shown(ranks)}")
    if row.get("kind", PAIR) not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {row['kind']!r}")
    order = row.get("order") or list(range(size))
    if not all(type(place) is int for place in order) or sorted(order) != list(range(size)):
        raise ValueError(f"order must hold each place from 0 to {size - 1} once, got {shown(order)}")
    confidence = row.get("confidence")
    if confidence is not None and not CONFIDENCE[0] <= confidence <= CONFIDENCE[1]:
        raise ValueError(f"confidence must be {CONFIDENCE[0]} to {CONFIDENCE[1]}, got {confidence!r}")
    seconds = row.get("seconds")
    if seconds is not None and not (math.isfinite(seconds) and seconds >= 0):
        raise ValueError(f"seconds must be finite and at least 0, got {seconds!r}")
    check_judged(row, size * (size - 1) // 2)
    for span in row.get("spans") or []:
        check_span(span, completions)
    for name in ("models", "gold"):
        if row.get(name) and len(row[name]) != size:
            raise ValueError(f"{name} must have one value for each of {size} completions, got {shown(row[name])}")


def check_judged(row: Mapping[str, Any], pairs: int) -> None:
    """Hold that what a judge says of its own verdicts fits the pairs of a label.

    Raises:
        ValueError: naming the field and what is allowed.
    """
    probabilities, flips = row.get("probabilities"), row.get("flips")
    if probabilities is not None and len(probabilities) != pairs:
        raise ValueError(f"probabilities must have one for each of {pairs} pairs, got {shown(probabilities)}")
    for chance in probabilities or ():
        if isinstance(chance, bool) or not isinstance(chance, int | float) or not 0 <= chance <= 1:
            raise ValueError(f"probabilities must be numbers from 0 to 1, got {shown(probabilities)}")
    if flips is not None and not 0 <= flips <= pairs:
        raise ValueError(f"flips must be 0 to {pairs}, got {flips!r}")


def check_span(span: object, completions: Sequence[str]) -> None:
    """Hold that a marked part lies within its completion.

    Raises:
        ValueError: naming what is wrong with it.
    """
    if not isinstance(span, dict) or set(span) != {"completion", "start", "end", "mark"}:
        raise ValueError(f"a span must have completion, start, end and mark, got {shown(span)}")
    place, start, end = span["completion"], span["start"], span["end"]
    if type(place) is not int or not 0 <= place < len(completions):
        raise ValueError(f"a span's completion must be 0 to {len(completions) - 1}, got {place!r}")
    size = len(completions[place])
    if not (type(start) is int and type(end) is int and 0 <= start < end <= size):
        raise ValueError(f"a span must lie within 0 and {size}, got {start!r} to {end!r}")
    if span["mark"] not in SPAN_MARKS:
        raise ValueError(f"a span's mark must be {' or '.join(SPAN_MARKS)}, got {span['mark']!r}")


class Standing:
    """Raw rows of a file of labels without those that were taken back, and without an unfinished last line."""

    def __init__(self, raw: RawRows) -> None:
        self.raw = raw
        self._numbers: array[int] = array("q")

    def read(self) -> Iterator[object]:
        """Every row that holds, when all of the raw ones have been read."""
        numbers: dict[int, object] = {}
        undone = set()
        row: object = None
        number = -1
        for number, row in enumerate(self.raw.read()):
            taken_back = row.get("undoes") if isinstance(row, Mapping) else None
            if taken_back is not None:
                undone.add(taken_back)
            else:
                numbers[number] = row.get("id") if isinstance(row, Mapping) else None
        # A process that was killed leaves half a line, which nobody was told of as saved.
        if isinstance(row, BadRow):
            del numbers[number]
        self._numbers = array("q", [place for place, own in numbers.items() if own is None or own not in undone])
        return (self[place] for place in range(len(self)))

    def share_read(self) -> float:
        """How much has been read."""
        return self.raw.share_read()

    def where(self, index: int) -> str:
        """A row's place in words."""
        return self.raw.where(self._numbers[index])

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int, /) -> Any:
        return self.raw[self._numbers[index]]


# -- what labels say --------------------------------------------------------------------------------------------------


def ranked_pairs(ranks: Sequence[float]) -> list[tuple[int, int]]:
    """(better, worse) of every two completions of different rank."""
    places = range(len(ranks))
    return [(a, b) for a in places for b in places if ranks[a] < ranks[b]]


def likely_pairs(size: int, probabilities: Sequence[float]) -> tuple[list[tuple[int, int]], list[float]]:
    """(better, worse) of every two of `size` completions, and how likely they stand so, at least 0.5.

    Two that are equally likely the better one are a tie, and no pair.

    Args:
        probabilities: as of `Label`.
    """
    both = zip(itertools.combinations(range(size), 2), probabilities, strict=True)
    ordered = [((a, b), first) if first > 0.5 else ((b, a), 1 - first) for (a, b), first in both if first != 0.5]
    return [pair for pair, _ in ordered], [chance for _, chance in ordered]


def ranks_of_scores(scores: Sequence[float]) -> list[int]:
    """Ranks that scores give, the highest 1; equal scores have one rank."""
    order = sorted(set(scores), reverse=True)
    return [order.index(score) + 1 for score in scores]


def decisions(ranks: Sequence[int]) -> Iterator[tuple[tuple[int, int], int]]:
    """Of every two completions a < b: 0 where a is better, 1 where b is, 2 for a tie."""
    for a, b in itertools.combinations(range(len(ranks)), 2):
        yield (a, b), 2 if ranks[a] == ranks[b] else int(ranks[b] < ranks[a])


@dataclasses.dataclass(frozen=True)
class Votes:
    """The decided comparisons of some labels, as numbers for statistics."""

    pairs: list[tuple[str, int, int]]
    """(item, place, place) of every two completions that somebody compared."""
    names: list[str]
    """The annotators."""
    pair_L: np.ndarray
    """int64: which pair."""
    annotator_L: np.ndarray
    """int64: who."""
    second_L: np.ndarray
    """int64: 1 where the later place was preferred, else 0."""

    def text_numbers(self) -> np.ndarray:
        """The two completions of each pair, numbered over all items, int64 [pairs, 2]."""
        numbers: dict[tuple[str, int], int] = {}
        both = [[numbers.setdefault((item, place), len(numbers)) for place in (a, b)] for item, a, b in self.pairs]
        return np.array(both, np.int64).reshape(-1, 2)

    def texts(self) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of the preferred and of the other completion of each comparison."""
        both_L2, rows = self.text_numbers()[self.pair_L], np.arange(len(self.pair_L))
        return both_L2[rows, self.second_L], both_L2[rows, 1 - self.second_L]


def votes(rows: Iterable[Row]) -> Votes:
    """The comparisons of rows with `item`, `annotator` and `ranks`; ties decide nothing and are left out."""
    pairs: dict[tuple[str, int, int], int] = {}
    names: dict[str, int] = {}
    cast = []
    for row in rows:
        for (a, b), decision in decisions(row["ranks"]):
            if decision < 2:
                pair = pairs.setdefault((row["item"], a, b), len(pairs))
                cast.append((pair, names.setdefault(row["annotator"], len(names)), decision))
    pair_L, annotator_L, second_L = np.array(cast, np.int64).reshape(-1, 3).T
    return Votes(list(pairs), list(names), pair_L, annotator_L, second_L)


def consensus(rows: Sequence[Row], method: AnnotatorWeights) -> dict[str, dict[tuple[int, int], float]]:
    """By item, P(a is better than b) of every two completions a < b, from all annotators' labels.

    Args:
        rows: labels as rows, with `item`, `annotator` and `ranks`.
        method: see `textrl_gym.stats.annotators`.

    Raises:
        ValueError: nobody preferred anything.
    """
    cast = votes(rows)
    if not cast.pairs:
        raise ValueError("annotator_weights needs labels that prefer one completion to another; there are none")
    if method == "dawid-skene":
        fit = annotators.dawid_skene(cast.pair_L, cast.annotator_L, cast.second_L, symmetric=True)
        first_N = fit.posterior_NC[:, 0]
    else:
        scores = annotators.crowd_bradley_terry(*cast.texts(), cast.annotator_L).score_I
        both_N2 = cast.text_numbers()
        gap_N = scores[both_N2[:, 0]] - scores[both_N2[:, 1]]
        first_N = 0.5 * (1 + np.tanh(gap_N / 2))
    by_item: dict[str, dict[tuple[int, int], float]] = defaultdict(dict)
    for (item, a, b), first in zip(cast.pairs, first_N.tolist(), strict=True):
        by_item[item][a, b] = first
    return dict(by_item)


def weighted_pairs(preferred: Mapping[tuple[int, int], float]) -> tuple[list[tuple[int, int]], list[float]]:
    """Pairs (chosen, rejected) and their weights: each two completions in both orders, by how likely each is."""
    pairs = [pair for a, b in preferred for pair in ((a, b), (b, a))]
    weights = [weight for first in preferred.values() for weight in (first, 1 - first)]
    return pairs, weights
