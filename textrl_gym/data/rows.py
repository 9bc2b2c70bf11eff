"""Rows of a data set: what is wrong with them, and rows that are read when they are asked for.

Every row is looked at once, when the data are opened. A bad one stops the work before it begins, or is left out.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import hashlib
import itertools
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from textrl_gym.console import time_columns
from textrl_gym.core import Row

T = TypeVar("T")
OnBadRows = Literal["stop", "skip"]
SHOWN_PLACES = 3
"""So many bad rows of a kind are named."""
PEEKED_ROWS = 1000
"""The schema is told by the columns of so many rows."""
CHECKED_AT_ONCE = 1000
"""Rows that are given to a check together, which may ask a tokenizer."""
QUIET_ROWS = 20_000
"""Fewer rows are read in a moment, without a progress bar."""


class BadRow(ValueError):
    """Why a row cannot be used, in words that count alike for all rows of the kind, and what this one has."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


class Dropped(BadRow):
    """Why nothing can be learnt from a row that is as it should be."""


class RawRows(Protocol):
    """Rows as they are written, with their places in words. `read()` has to come to its end first."""

    def read(self) -> Iterator[object]:
        """Every row from first to last, a BadRow in the place of what is none."""
        ...

    def share_read(self) -> float: ...
    def where(self, index: int) -> str: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


@dataclasses.dataclass
class RowReport:
    """What is wrong with rows of a data set, by reason."""

    total: int = 0
    counts: Counter[str] = dataclasses.field(default_factory=Counter)
    examples: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    """reason -> the first places, in words, with what stands there."""

    def add(self, where: str, bad: BadRow) -> None:
        """Count a row."""
        self.counts[bad.reason] += 1
        examples = self.examples.setdefault(bad.reason, [])
        if len(examples) < SHOWN_PLACES:
            examples.append(f"{where}: {bad.detail}" if bad.detail else where)

    def __str__(self) -> str:
        """Every reason with its number and the first places."""
        return "; ".join(
            f"{count:,} {'row' if count == 1 else 'rows'}: {reason} ({'; '.join(self.examples[reason])}"
            + (", ..." if count > len(self.examples[reason]) else "")
            + ")"
            for reason, count in self.counts.items()
        )


# -- what holds while rows are read ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RowRules:
    """What becomes of bad rows, and what more is asked of a row than its schema says."""

    bad_rows: OnBadRows = "stop"
    check: Callable[[Sequence[Row]], list[BadRow | None]] | None = None
    """What is wrong with each of some rows; None: nothing."""


_rules: contextvars.ContextVar[RowRules] = contextvars.ContextVar("rules")


@contextlib.contextmanager
def row_rules(rules: RowRules) -> Iterator[None]:
    """Rules for what is read inside, also by a user's task, whose rows() knows only of a split and a data set."""
    token = _rules.set(rules)
    try:
        yield
    finally:
        _rules.reset(token)


def current_rules() -> RowRules:
    """The rules of the innermost row_rules()."""
    return _rules.get(RowRules())


# -- rows -------------------------------------------------------------------------------------------------------------


class Rows(Sequence[dict[str, Any]]):
    """Rows that are read and converted when they are asked for, so that a million of them take little memory.

    Args:
        raw: all rows as they are written.
        places: those that are meant.
        convert: from a row as it is written.
        report: what was wrong with rows that are left out.
    """

    def __init__(
        self, raw: RawRows, places: NDArray[np.int64], convert: Callable[[Row], dict[str, Any]], report: RowReport
    ) -> None:
        self.raw, self.places, self.convert, self.report = raw, places, convert, report

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int, /) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice, /) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice, /) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.convert(self.raw[int(self.places[index])])

    def where(self, index: int) -> str:
        """A row's place in words: file and line."""
        return self.raw.where(int(self.places[index]))


class Kept(Sequence[Row]):
    """Some rows of a source."""

    def __init__(self, source: Sequence[Row], places: Sequence[int]) -> None:
        self.source, self.places = source, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any, /) -> Any:
        if isinstance(index, slice):
            return [self.source[place] for place in self.places[index]]
        return self.source[self.places[index]]


class Joined:
    """The raw rows of several files, one behind the other."""

    def __init__(self, parts: Sequence[RawRows]) -> None:
        self.parts = list(parts)
        self._ends: NDArray[np.int64] = np.zeros(0, np.int64)
        self._reading = 0

    def read(self) -> Iterator[object]:
        """The rows of every file."""
        for number, part in enumerate(self.parts):
            self._reading = number
            yield from part.read()
        self._ends = np.cumsum([len(part) for part in self.parts])

    def share_read(self) -> float:
        """By files."""
        return (self._reading + self.parts[self._reading].share_read()) / len(self.parts)

    def where(self, index: int) -> str:
        """A row's place in words."""
        part, inside = self._find(index)
        return part.where(inside)

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def __getitem__(self, index: int, /) -> Any:
        part, inside = self._find(index)
        return part[inside]

    def _find(self, index: int) -> tuple[RawRows, int]:
        if len(self._ends) < len(self.parts):  # still being read
            for part in self.parts:
                if index < len(part):
                    return part, index
                index -= len(part)
        number = int(np.searchsorted(self._ends, index, side="right"))
        return self.parts[number], index - int(self._ends[number - 1] if number else 0)


class Mapped:
    """Raw rows, each through a function."""

    def __init__(self, raw: RawRows, function: Callable[[object], object]) -> None:
        self.raw, self.function = raw, function

    def read(self) -> Iterator[object]:
        """Every row."""
        return map(self.function, self.raw.read())

    def share_read(self) -> float:
        """How much has been read."""
        return self.raw.share_read()

    def where(self, index: int) -> str:
        """A row's place in words."""
        return self.raw.where(index)

    def __len__(self) -> int:
        return len(self.raw)

    def __getitem__(self, index: int, /) -> Any:
        return self.function(self.raw[index])


class Grouped:
    """Raw rows of one prompt as one row: the first, with the values of the columns `names` as lists."""

    def __init__(self, raw: RawRows, prompt: str, names: Sequence[str]) -> None:
        self.raw, self.prompt, self.names = raw, prompt, names
        self._numbers: list[array[int]] = []

    def read(self) -> Iterator[object]:
        """Every row, when all of the raw ones have been read."""
        groups: dict[object, array[int]] = {}
        for number, row in enumerate(self.raw.read()):
            # What is no row stands for itself, to be told of by its place.
            key: object = digest(repr(row[self.prompt])) if isinstance(row, Mapping) and self.prompt in row else number
            groups.setdefault(key, array("q")).append(number)
        self._numbers = list(groups.values())
        return (self[number] for number in range(len(self)))

    def share_read(self) -> float:
        """How much has been read."""
        return self.raw.share_read()

    def where(self, index: int) -> str:
        """The first of a row's places in words."""
        return self.raw.where(self._numbers[index][0])

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int, /) -> Any:
        rows = [self.raw[number] for number in self._numbers[index]]
        if not isinstance(rows[0], Mapping):
            return rows[0]
        return {**rows[0], **{name: [row.get(name) for row in rows] for name in self.names}}


# -- looking at every row ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Scan:
    """What looking at every row of a data set gave."""

    places: NDArray[np.int64]
    """The rows to use."""
    digests: NDArray[np.uint64]
    """A hash of each one's prompt, the same on every machine."""
    columns: list[str]
    bad: RowReport
    dropped: RowReport
    """Rows that fit, and from which nothing can be learnt."""


def first_columns(raw: RawRows, where: str) -> list[str]:
    """The columns of the first rows, in order: a row of jsonl may lack one that is empty in it.

    Raises:
        ValueError: there are no rows, or none that has columns.
    """
    first = list(itertools.islice(raw.read(), PEEKED_ROWS))
    if not first:
        raise ValueError(f"{where} is empty: it has no rows")
    columns = list(dict.fromkeys(name for row in first if isinstance(row, Mapping) for name in row))
    if not columns:
        report = RowReport(total=len(first))
        for number, row in enumerate(first):
            report.add(raw.where(number), row if isinstance(row, BadRow) else not_mapping(row))
        raise ValueError(f"{where} has no rows with columns: {report}")
    return columns


def look_through(
    raw: RawRows,
    where: str,
    columns: Sequence[str],
    convert: Callable[[Row], Row],
    check: Callable[[Sequence[Row]], list[BadRow | None]] | None = None,
) -> Scan:
    """Convert every row once, to find those that cannot be.

    Args:
        where: the data, in the words of the progress bar.
        columns: those that are known; the scan has all.
        convert: gives a row with `prompt`, or raises BadRow (Dropped for one that is merely of no use).
        check: what is wrong with each of some converted rows.
    """
    names, places, digests = dict.fromkeys(columns), array("q"), bytearray()
    bad, dropped = RowReport(), RowReport()
    chunk: list[tuple[int, Row]] = []

    def settle_chunk() -> None:
        faults = [None] * len(chunk) if check is None else check([row for _, row in chunk])
        for (number, row), fault in zip(chunk, faults, strict=True):
            if fault is not None:
                bad.add(raw.where(number), fault)
                continue
            places.append(number)
            digests.extend(digest(row["prompt"]))
        chunk.clear()

    for number, row in enumerate(with_progress(raw, f"reading {where}")):
        bad.total += 1
        try:
            if not isinstance(row, Mapping):
                raise row if isinstance(row, BadRow) else not_mapping(row)
            chunk.append((number, convert(row)))
        except Dropped as why:
            dropped.add(raw.where(number), why)
        except BadRow as why:
            bad.add(raw.where(number), why)
        else:
            if row.keys() - names.keys():
                names |= dict.fromkeys(row)
            if len(chunk) == CHECKED_AT_ONCE:
                settle_chunk()
    settle_chunk()
    dropped.total = bad.total
    place_N = np.frombuffer(places, np.int64) if places else np.zeros(0, np.int64)
    return Scan(place_N, np.frombuffer(bytes(digests), ">u8").astype(np.uint64), list(names), bad, dropped)


def digest(prompt: str) -> bytes:
    """8 bytes that are the same for a text on every machine, as Python's own hash is not."""
    return hashlib.blake2b(prompt.encode(), digest_size=8).digest()


def not_mapping(row: object) -> BadRow:
    """A row without columns."""
    return BadRow("is no object with columns", shown(row))


def with_progress(raw: RawRows, words: str) -> Iterator[object]:
    """The rows of raw.read(), with a progress bar where they are many."""
    rows = raw.read()
    yield from itertools.islice(rows, QUIET_ROWS)
    first = next(rows, None)
    if first is None:
        return
    # Here, not above: 0.1 s that small data need not wait for.
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), *time_columns(elapsed=False))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(words, total=1.0)
        for number, row in enumerate(itertools.chain([first], rows), start=QUIET_ROWS + 1):
            if number % 10_000 == 0:
                bar.update(task, completed=raw.share_read(), description=f"{words}: {number:,} rows")
            yield row


def settle(report: RowReport, where: str, bad_rows: OnBadRows) -> None:
    """Stop because of bad rows, or say that they are left out; nothing where there are none.

    Raises:
        ValueError: there are bad rows and `bad_rows` is "stop", or no row is left.
    """
    bad = sum(report.counts.values())
    if not bad:
        return
    words = f"{where}: {bad:,} of {report.total:,} rows cannot be used: {report}"
    if bad_rows == "stop" and bad == report.total:
        raise ValueError(words)  # to leave them out would leave none
    if bad_rows == "stop":
        flags = "--env.bad-rows skip; of reward-model --evaluate --bad-rows skip"
        raise ValueError(f'{words}. bad_rows="skip" ({flags}) leaves them out')
    if bad == report.total:
        raise ValueError(f"{words}. No row is left")
    say_once(f"{words}; they are left out")


MOST_REMEMBERED = 4
_remembered: dict[Hashable, Any] = {}
"""The last data sets that were looked through, oldest first."""


def remembered(key: Hashable, make: Callable[[], T]) -> T:
    """What make() gave for this key lately: an environment, its evaluation and its copies read the same data."""
    value = _remembered.pop(key, None)
    if value is None:
        value = make()
    _remembered[key] = value
    if len(_remembered) > MOST_REMEMBERED:
        del _remembered[next(iter(_remembered))]
    return value


_said: set[str] = set()
"""What this process has printed."""


def say_once(message: str) -> None:
    """Print a message to stderr the first time that it comes up in a process."""
    if message not in _said:
        _said.add(message)
        print(message, file=sys.stderr)


def text_of(row: Mapping[str, Any], name: str) -> str:
    """A row's text in a column.

    Raises:
        BadRow: it is none, or holds half of a character.
    """
    if not isinstance(row, Mapping):
        raise BadRow(f"a row must be a dict with {name!r}", shown(row))
    value = row.get(name)
    if not isinstance(value, str):
        raise BadRow(f"column {name!r} is not a text", shown(value))
    if not value.isascii():
        check_characters(value, f"column {name!r}")
    return value


def check_characters(text: str, what: str) -> None:
    """Raise BadRow where a text holds half of a character, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):04X} at character {error.start + 1}"
        raise BadRow(f"{what} holds half of a character (a lone surrogate)", half) from None


def shown(value: object) -> str:
    """A value's beginning, for an error."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
