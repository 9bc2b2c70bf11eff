"""The file of labels as it grows, and who is asked what next.

An answer is on the disk (written and fsynced) before whoever gave it is told so. What is asked next follows from the
file alone, but for which question is open in whose browser: a server that was killed goes on where it was.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from textrl_gym import files
from textrl_gym.data import labels
from textrl_gym.data.labels import CHECK, PAIR, QUALIFICATION, REPEAT, Item, Kind, Label
from textrl_gym.feedback.questions import AnnotateConfig

RESERVED_SECONDS = 600.0
"""So long a question that is open in somebody's browser is not asked of others."""
REPEAT_GAP = 5
"""Answers that lie at least between a question and its repetition: it is not to be remembered."""
RECENT = 50
"""Answers that the estimate of the time left is made from."""
ACTIVE_SECONDS = 600.0
MOST_SECONDS = 3600.0
"""A question that was looked at for longer was left open."""
LONGEST_NAME, LONGEST_COMMENT, MOST_SPANS = 40, 10_000, 200


# -- the file ---------------------------------------------------------------------------------------------------------


class LabelFile:
    """A file of labels that one process appends to.

    Raises:
        ValueError: another process writes it, or a line holds no label.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._stream = path.open("ab", buffering=0)
        try:
            if not files.lock(self._stream.fileno(), wait=False):
                raise ValueError(f"another process writes {str(path)!r}: end it, or name another file (out)")
            files.append_json_lines(path, [])  # removes half a line that a killed process left
            self.history = labels.read_history(path)
            _sync_folder(path.parent)
        except BaseException:
            self._stream.close()
            raise

    def append(self, label: Label) -> None:
        """Add a label; it is on the disk when this returns.

        Raises:
            OSError: it cannot be written; the file is then as it was.
        """
        line = json.dumps(dataclasses.asdict(label)).encode() + b"\n"
        size = os.fstat(self._stream.fileno()).st_size
        try:
            written = self._stream.write(line)
            if written != len(line):
                raise OSError(f"{str(self.path)!r}: only {written} of {len(line)} bytes could be written")
            os.fsync(self._stream.fileno())
        except OSError:
            self._stream.truncate(size)
            raise
        self.history.append(label)

    def unanswered(self, items: Iterable[Item]) -> list[Item]:
        """The questions that nobody's answer in the file holds for."""
        answered = {label.item for label in labels.read_labels(self.path)} if self.history else set()
        return [item for item in items if item.id not in answered]

    def add(
        self,
        item: Item,
        annotator: str,
        ranks: list[int] | None,
        *,
        comment: str = "",
        probabilities: list[float] | None = None,
        flips: int | None = None,
    ) -> None:
        """Append the answer of a program, which reads completions in the order in which they are written.

        Args:
            comment, probabilities, flips: as of `Label`.
        """
        self.append(
            Label(
                id=len(self.history) + 1,
                item=item.id,
                kind=item.kind,
                annotator=annotator,
                prompt=item.prompt,
                completions=item.completions,
                ranks=ranks,
                order=list(range(len(item.completions))),
                comment=comment,
                time=_now(),
                models=item.models,
                gold=item.gold,
                probabilities=probabilities,
                flips=flips,
            )
        )

    def close(self) -> None:
        """Let another process write the file."""
        self._stream.close()

    def __enter__(self) -> LabelFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _sync_folder(folder: Path) -> None:
    """Put the names of new files on the disk too."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -- who is asked what ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question as one annotator sees it."""

    item: Item
    kind: Kind
    turn: int
    """How often this annotator has answered it before."""
    order: list[int]
    """Places of its completions in the order in which they are shown."""


class Session:
    """Hands out questions and takes answers, of several annotators at the same time."""

    def __init__(self, items: Sequence[Item], file: LabelFile, config: AnnotateConfig) -> None:
        self.file, self.config = file, config
        self.by_kind = {kind: [item for item in items if item.kind == kind] for kind in labels.KINDS}
        self.items = {item.id: item for item in self.by_kind[PAIR]}
        self._lock = threading.Lock()
        self._open: dict[str, tuple[str, float]] = {}
        self._seen: dict[str, float] = {}
        self._holding: tuple[int, list[Label]] = (-1, [])

    def view(self, annotator: object) -> dict[str, Any]:
        """What an annotator sees next.

        Raises:
            ValueError: the name may not answer.
        """
        with self._lock:
            return self._view(self._name(annotator))

    def answer(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Write an answer to the file, and give what comes next.

        Args:
            asked: {"annotator", "item", "turn", "ranks": of the completions as they are shown, or None for a question
                that is passed over, "all_bad", "confidence", "comment", "spans", "seconds"}.

        Raises:
            ValueError: it is no answer to what the annotator is asked.
            OSError: it cannot be written.
        """
        with self._lock:
            name = self._name(asked.get("annotator"))
            current = self._next(name)
            if current is None or (current.item.id, current.turn) != (asked.get("item"), asked.get("turn")):
                if self._repeated(name, asked):
                    return self._view(name)
                raise ValueError("this question was answered already, or is not yours now: see the next one")
            label = self._label(name, current, asked)
            self.file.append(label)
            self._open.pop(name, None)
            return self._view(name) | {"saved": label.id, "feedback": _feedback(label)}

    def is_answered(self) -> bool:
        """Whether every question has as many answers as are asked for."""
        with self._lock:
            given = self._given()
            return all(given[item.id] >= self.config.per_pair for item in self.by_kind[PAIR])

    def undo(self, annotator: object) -> dict[str, Any]:
        """Take an annotator's last answer back, and ask it again.

        Raises:
            ValueError: there is none.
            OSError: it cannot be written.
        """
        with self._lock:
            name = self._name(annotator)
            last = self._last(self._own(name))
            if last is None:
                raise ValueError("there is no answer to take back")
            number = len(self.file.history) + 1
            self.file.append(dataclasses.replace(last, id=number, undoes=last.id, time=_now()))
            return self._view(name) | {"saved": number}

    # -- the next question --------------------------------------------------------------------------------------------

    def _next(self, name: str) -> Asked | None:
        """The question that an annotator is asked now; None where there is none."""
        own = self._own(name)
        taken_back = self._taken_back(name)
        if taken_back is not None:
            return self._asked(name, self._find(taken_back.item, taken_back.kind), taken_back.kind, own)
        answered = {(label.kind, label.item) for label in own}
        for item in self.by_kind[QUALIFICATION]:
            if (QUALIFICATION, item.id) not in answered:
                return self._asked(name, item, QUALIFICATION, own)
        if self._failed(own):
            return None
        due = self._due(name, own, answered)
        if due is not None:
            return self._asked(name, due[0], due[1], own)
        pair = self._free_pair(name, answered)
        return None if pair is None else self._asked(name, pair, PAIR, own)

    def _due(self, name: str, own: Sequence[Label], answered: set[tuple[Kind, str]]) -> tuple[Item, Kind] | None:
        """An attention check or a repetition whose turn it is."""
        count = Counter(label.kind for label in own)
        rng = random.Random(f"{self.config.seed} {name} {len(own)}")
        every = self.config.check_every
        if every and (count[PAIR] + count[REPEAT] + count[CHECK] + 1) % every == 0:
            fresh = [item for item in self.by_kind[CHECK] if (CHECK, item.id) not in answered]
            if fresh:
                return rng.choice(fresh), CHECK
        if count[REPEAT] < int(self.config.repeats * count[PAIR] + 1e-9):
            pairs = [label.item for label in own if label.kind == PAIR]
            old = [item for item in pairs[:-REPEAT_GAP] if (REPEAT, item) not in answered and item in self.items]
            if old:
                return self.items[rng.choice(old)], REPEAT
        return None

    def _free_pair(self, name: str, answered: set[tuple[Kind, str]]) -> Item | None:
        """The first question that lacks answers and that nobody else is about to answer."""
        given = self._given()
        now = time.monotonic()
        held = Counter(
            item for other, (item, since) in self._open.items() if other != name and now - since < RESERVED_SECONDS
        )
        for item in self.by_kind[PAIR]:
            if (PAIR, item.id) not in answered and given[item.id] + held[item.id] < self.config.per_pair:
                return item
        return None

    def _given(self) -> Counter[str]:
        """How many annotators have answered each question."""
        return Counter(label.item for label in self._standing() if label.kind == PAIR)

    def _asked(self, name: str, item: Item, kind: Kind, own: Sequence[Label]) -> Asked:
        turn = sum(label.item == item.id for label in own)
        places = range(len(item.completions))
        # From the names alone, so that a page which asks again after a kill sees the same sides.
        rng = random.Random(f"{self.config.seed} {name} {item.id} {kind} {turn}")
        return Asked(item, kind, turn, rng.sample(places, len(places)))

    def _find(self, item: str, kind: Kind) -> Item:
        among = self.by_kind[PAIR if kind == REPEAT else kind]
        return next(one for one in among if one.id == item)

    # -- what an annotator has done -----------------------------------------------------------------------------------

    def _name(self, name: object) -> str:
        words = " ".join(name.split()) if isinstance(name, str) else ""
        if not 1 <= len(words) <= LONGEST_NAME or not words.isprintable():
            raise ValueError(f"a name has 1 to {LONGEST_NAME} printable characters")
        if self.config.annotators and words not in self.config.annotators:
            raise ValueError(f"{words!r} is no annotator here; these are: {', '.join(self.config.annotators)}")
        self._seen[words] = time.monotonic()
        return words

    def _standing(self) -> list[Label]:
        """The labels that hold, made anew where one was added."""
        if self._holding[0] != len(self.file.history):
            self._holding = (len(self.file.history), labels.standing(self.file.history))
        return self._holding[1]

    def _own(self, name: str) -> list[Label]:
        return [label for label in self._standing() if label.annotator == name]

    def _taken_back(self, name: str) -> Label | None:
        """What the annotator has just taken back, and not answered again."""
        last = next((label for label in reversed(self.file.history) if label.annotator == name), None)
        return last if last is not None and last.undoes is not None else None

    def _last(self, own: Sequence[Label]) -> Label | None:
        """The answer that can be taken back; none of the qualification, whose right answer was told."""
        return next((label for label in reversed(own) if label.kind != QUALIFICATION), None)

    def _failed(self, own: Sequence[Label]) -> bool:
        rows = [label for label in own if label.kind == QUALIFICATION]
        if not self.by_kind[QUALIFICATION]:
            return False
        right = sum(is_right(label) for label in rows)
        return right < self.config.pass_share * len(self.by_kind[QUALIFICATION])

    def _repeated(self, name: str, asked: Mapping[str, Any]) -> bool:
        """Whether the same answer was written already, and the word that it was has not come through."""
        same = [label for label in self._own(name) if label.item == asked.get("item")]
        turn, ranks = asked.get("turn"), asked.get("ranks")
        if not isinstance(turn, int) or not 0 <= turn < len(same):
            return False
        own = same[turn].ranks
        return ranks == (None if own is None else [own[place] for place in same[turn].order])

    # -- answers ------------------------------------------------------------------------------------------------------

    def _label(self, name: str, current: Asked, asked: Mapping[str, Any]) -> Label:
        item, order, ranks = current.item, current.order, asked.get("ranks")
        if ranks is not None:
            if not isinstance(ranks, list) or len(ranks) != len(order):
                raise ValueError(f"ranks must be {len(order)} whole numbers, or null to pass over, got {ranks!r}")
            ranks = [ranks[order.index(place)] for place in range(len(order))]
        comment, spans, seconds = asked.get("comment") or "", asked.get("spans") or [], asked.get("seconds")
        if not isinstance(comment, str) or len(comment) > LONGEST_COMMENT:
            raise ValueError(f"comment must be a text of at most {LONGEST_COMMENT:,} characters")
        comment.encode()  # a UnicodeEncodeError is a ValueError: half a character could not be read again
        if not isinstance(spans, list) or len(spans) > MOST_SPANS:
            raise ValueError(f"spans must be a list of at most {MOST_SPANS}")
        if seconds is not None and (isinstance(seconds, bool) or not isinstance(seconds, int | float)):
            raise ValueError(f"seconds must be a number, got {seconds!r}")
        confidence = asked.get("confidence")
        if confidence is not None and type(confidence) is not int:
            raise ValueError(f"confidence must be a whole number, got {confidence!r}")
        row = Label(
            id=len(self.file.history) + 1,
            item=item.id,
            kind=current.kind,
            annotator=name,
            prompt=item.prompt,
            completions=item.completions,
            ranks=ranks,
            all_bad=asked.get("all_bad") is True,
            order=order,
            confidence=confidence,
            comment=comment,
            spans=[_placed(span, order) for span in spans],
            seconds=seconds,
            time=_now(),
            models=item.models,
            gold=item.gold,
        )
        labels.check_label(dataclasses.asdict(row))
        return row if seconds is None else dataclasses.replace(row, seconds=min(float(seconds), MOST_SECONDS))

    # -- what the page shows ------------------------------------------------------------------------------------------

    def _view(self, name: str) -> dict[str, Any]:
        current = self._next(name)
        own = self._own(name)
        view: dict[str, Any] = {
            "annotator": name,
            "undo": self._last(own) is not None,
            "progress": self._progress(own),
        }
        if current is None:
            return view | {"phase": "failed" if self._failed(own) else "done" if self._complete(own) else "wait"}
        if current.kind == PAIR:
            self._open[name] = (current.item.id, time.monotonic())
        item = current.item
        shown = {"id": item.id, "turn": current.turn, "prompt": item.prompt}
        shown["completions"] = [item.completions[place] for place in current.order]
        # Of what kind a question is stays unsaid: a check that is known as one checks nothing.
        return view | {"phase": "qualification" if current.kind == QUALIFICATION else "pairs", "item": shown}

    def _complete(self, own: Sequence[Label]) -> bool:
        """Whether no question is left for the annotator, also none that is open in another's browser."""
        answered = {label.item for label in own if label.kind == PAIR}
        given = self._given()
        return all(item.id in answered or given[item.id] >= self.config.per_pair for item in self.by_kind[PAIR])

    def _progress(self, own: Sequence[Label]) -> dict[str, Any]:
        """Answers so far, and an estimate of the seconds that are left for all annotators together at work."""
        total = len(self.by_kind[PAIR]) * self.config.per_pair
        pairs = [label for label in self._standing() if label.kind == PAIR]
        done = min(len(pairs), total)
        times = [label.seconds for label in pairs[-RECENT:] if label.seconds is not None]
        now = time.monotonic()
        people = max(sum(now - seen < ACTIVE_SECONDS for seen in self._seen.values()), 1)
        left = statistics.median(times) * (total - done) / people if times else None
        yours = sum(label.kind != QUALIFICATION for label in own)
        qualified = sum(label.kind == QUALIFICATION for label in own)
        return {
            "yours": yours,
            "done": done,
            "total": total,
            "seconds_left": left,
            "qualified": qualified,
            "qualification": len(self.by_kind[QUALIFICATION]),
        }


def is_right(label: Label) -> bool:
    """Whether an answer prefers what the known one does: each two that differ there, in the same order."""
    if label.gold is None or label.ranks is None:
        return False
    known = labels.ranked_pairs(labels.ranks_of_scores(label.gold))
    return all(label.ranks[a] < label.ranks[b] for a, b in known)


def _feedback(label: Label) -> str | None:
    """After a qualification row: whether the answer was the known one, and which that is."""
    if label.kind != QUALIFICATION or label.gold is None:
        return None
    best = label.order.index(max(range(len(label.gold)), key=label.gold.__getitem__)) + 1
    return f"This is the known answer: {best}." if is_right(label) else f"The known answer is {best}."


def _placed(span: object, order: Sequence[int]) -> dict[str, Any]:
    """A marked part, by the place of its completion in the question and not on the page."""
    if not isinstance(span, dict) or type(span.get("completion")) is not int:
        raise ValueError("a span must name its completion by a number")
    if not 0 <= span["completion"] < len(order):
        raise ValueError(f"a span's completion must be 0 to {len(order) - 1}, got {span['completion']}")
    return span | {"completion": order[span["completion"]]}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
