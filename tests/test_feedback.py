"""Questions and answers: who is asked what, what is on the disk, and what goes on after a kill."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from textrl_gym.data import labels
from textrl_gym.data.labels import CHECK, PAIR, QUALIFICATION, REPEAT, Item
from textrl_gym.feedback import answers, questions
from textrl_gym.feedback.answers import LabelFile, Session
from textrl_gym.feedback.questions import AnnotateConfig
from textrl_gym.mdp.env_settings import EnvSettings

ITEMS = [Item(f"q{number}", f"prompt {number}", ["good", "bad"], gold=[1.0, 0.0]) for number in range(12)]


OPENED: list[LabelFile] = []


def begin(file: Path, items: list[Item] | None = None, **settings: Any) -> Session:
    OPENED.append(LabelFile(file))
    return Session(items or ITEMS, OPENED[-1], AnnotateConfig(**settings))


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    """Files that a test opens are closed behind it."""
    yield
    while OPENED:
        OPENED.pop().close()


def best_ranks(view: dict[str, Any]) -> list[int]:
    """Ranks that put the text "good" first."""
    return [1 if text == "good" else 2 for text in view["item"]["completions"]]


def answer(session: Session, name: str = "ann", ranks: Any = best_ranks, **more: Any) -> dict[str, Any]:
    """Answer what `name` is asked now; ranks: a function of the view, or as they are."""
    view = session.view(name)
    item = view["item"]
    given = ranks(view) if callable(ranks) else ranks
    return session.answer({"annotator": name, "item": item["id"], "turn": item["turn"], "ranks": given} | more)


# -- one annotator ----------------------------------------------------------------------------------------------------


def test_every_question_once_in_order(tmp_path: Path) -> None:
    session = begin(tmp_path / "labels.jsonl")
    seen = []
    while (view := session.view("ann"))["phase"] == "pairs":
        seen.append(view["item"]["id"])
        answer(session, seconds=2.0)
    assert seen == [item.id for item in ITEMS]
    assert view["phase"] == "done"
    assert view["progress"] == {
        "yours": 12, "done": 12, "total": 12, "seconds_left": 0.0, "qualified": 0, "qualification": 0,
    }  # fmt: skip
    rows = labels.read_labels(tmp_path / "labels.jsonl")
    assert [row.ranks for row in rows] == [[1, 2]] * 12, "ranks are of the completions as the question has them"
    assert {tuple(row.order) for row in rows} == {(0, 1), (1, 0)}, "sides change"
    assert all(answers.is_right(row) for row in rows)


def test_sides_are_a_function_of_seed_and_name(tmp_path: Path) -> None:
    def sides(file: str, **settings: Any) -> list[tuple[str, ...]]:
        session = begin(tmp_path / file, **settings)
        shown = []
        while (view := session.view("ann"))["phase"] == "pairs":
            assert session.view("ann") == view, "asking again changes nothing"
            shown.append(tuple(view["item"]["completions"]))
            answer(session)
        return shown

    assert sides("a.jsonl") == sides("b.jsonl")
    assert sides("a2.jsonl") != sides("c.jsonl", seed=1)


def test_time_left(tmp_path: Path) -> None:
    session = begin(tmp_path / "labels.jsonl", per_pair=2)
    assert session.view("ann")["progress"]["seconds_left"] is None
    view = answer(session, seconds=4.0)
    # 24 labels in all, 23 left of 4 seconds each, by one annotator; then 22 by two, of whom one took 8: median 6.
    assert view["progress"]["seconds_left"] == pytest.approx(23 * 4.0)
    view = answer(session, "ben", seconds=8.0)
    assert view["progress"]["seconds_left"] == pytest.approx(22 * 6.0 / 2)


def test_ties_passes_and_what_is_said_beside(tmp_path: Path) -> None:
    session = begin(tmp_path / "labels.jsonl")
    shown = session.view("ann")["item"]["completions"]
    span = {"completion": 0, "start": 0, "end": 2, "mark": "good"}
    answer(session, ranks=[1, 1], all_bad=True, comment="both are\nbad", confidence=4, spans=[span], seconds=1e9)
    answer(session, ranks=None)
    first, second = labels.read_labels(tmp_path / "labels.jsonl")
    assert (first.ranks, first.all_bad, first.comment, first.confidence) == ([1, 1], True, "both are\nbad", 4)
    assert first.seconds == answers.MOST_SECONDS
    assert first.completions[first.spans[0]["completion"]] == shown[0], "a mark stays with its text"
    assert (second.ranks, second.kind) == (None, PAIR)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"ranks": [1]}, "ranks must be 2 whole numbers"),
        ({"ranks": [0, 1]}, "from 1 to 2"),
        ({"ranks": ["1", "2"]}, "from 1 to 2"),
        ({"ranks": [2, 2]}, "begin at 1"),
        ({"confidence": 7}, "confidence must be 1 to 4, got 7"),
        ({"confidence": "4"}, "confidence must be a whole number"),
        ({"comment": 3}, "comment must be a text"),
        ({"comment": "x" * 10_001}, "at most 10,000"),
        ({"comment": "\ud800"}, "surrogates not allowed"),
        ({"seconds": "1"}, "seconds must be a number"),
        ({"seconds": float("nan")}, "seconds must be finite"),
        ({"seconds": True}, "seconds must be a number"),
        ({"spans": [{"completion": 5, "start": 0, "end": 1, "mark": "good"}]}, "0 to 1, got 5"),
        ({"spans": [{"completion": 0, "start": 0, "end": 99, "mark": "good"}]}, "within 0 and"),
        ({"spans": 3}, "list of at most 200"),
        ({"spans": ["x"]}, "name its completion"),
        ({"item": "q9"}, "answered already, or is not yours now"),
        ({"turn": 1}, "answered already, or is not yours now"),
        ({"annotator": ""}, "1 to 40 printable characters"),
        ({"annotator": "a\x00b"}, "printable characters"),
        ({"annotator": None}, "printable characters"),
    ],
)
def test_what_is_no_answer_is_not_written(tmp_path: Path, more: dict[str, Any], words: str) -> None:
    session = begin(tmp_path / "labels.jsonl")
    with pytest.raises(ValueError, match=words):
        answer(session, **more) if "ranks" in more else answer(session, ranks=best_ranks, **more)
    assert (tmp_path / "labels.jsonl").read_bytes() == b""


def test_an_answer_that_comes_twice_is_written_once(tmp_path: Path) -> None:
    """The word that it was saved may be lost on its way, and the page sends it again."""
    session = begin(tmp_path / "labels.jsonl")
    view = session.view("ann")
    given: dict[str, Any] = {"annotator": "ann", "item": "q0", "turn": 0, "ranks": best_ranks(view)}
    first, second = session.answer(given), session.answer(given)
    assert first["item"]["id"] == second["item"]["id"] == "q1"
    assert len(labels.read_labels(tmp_path / "labels.jsonl")) == 1
    other = given | {"ranks": [3 - rank for rank in given["ranks"]]}
    with pytest.raises(ValueError, match="answered already"):
        session.answer(other)


# -- taking back ------------------------------------------------------------------------------------------------------


def test_taken_back_answers_are_asked_again(tmp_path: Path) -> None:
    session = begin(tmp_path / "labels.jsonl")
    with pytest.raises(ValueError, match="no answer to take back"):
        session.undo("ann")
    before = session.view("ann")
    answer(session)
    answer(session)
    assert session.undo("ann")["item"]["id"] == "q1"
    view = session.undo("ann")
    assert view["item"] == before["item"], "with the same sides"
    assert view["undo"] is False
    assert [answer(session)["item"]["id"] for _ in range(3)] == ["q1", "q2", "q3"]
    assert [label.item for label in labels.read_labels(tmp_path / "labels.jsonl")] == ["q0", "q1", "q2"]
    assert len(labels.read_history(tmp_path / "labels.jsonl")) == 7


# -- several ----------------------------------------------------------------------------------------------------------


def test_each_question_to_so_many(tmp_path: Path) -> None:
    session = begin(tmp_path / "labels.jsonl", per_pair=2)
    for turn in range(24):
        name = ("ann", "ben", "cat")[turn % 3]
        if session.view(name)["phase"] == "pairs":
            answer(session, name)
    rows = labels.read_labels(tmp_path / "labels.jsonl")
    by_item = {item.id: {row.annotator for row in rows if row.item == item.id} for item in ITEMS}
    assert all(len(people) == 2 for people in by_item.values()), by_item
    assert session.view("ann")["phase"] == "done"


def test_two_at_once_are_not_asked_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = begin(tmp_path / "labels.jsonl", items=ITEMS[:2])
    first, second = session.view("ann"), session.view("ben")
    assert (first["item"]["id"], second["item"]["id"]) == ("q0", "q1")
    answer(session, "ann")
    view = session.view("ann")
    assert view["phase"] == "wait", "the other one is open in ben's browser"
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + answers.RESERVED_SECONDS + 1)
    assert session.view("ann")["item"]["id"] == "q1", "ben has left"
    answer(session, "ann")
    assert session.view("ann")["phase"] == session.view("ben")["phase"] == "done"


def test_only_who_is_named(tmp_path: Path) -> None:
    session = begin(tmp_path / "labels.jsonl", annotators=("ann", "ben"))
    with pytest.raises(ValueError, match="'eve' is no annotator here; these are: ann, ben"):
        session.view("eve")
    assert session.view("  ann ")["annotator"] == "ann"


# -- what is asked beside ---------------------------------------------------------------------------------------------


def test_repetitions_and_checks(tmp_path: Path) -> None:
    checks = [Item(f"c{n}", "?", ["good", "bad"], CHECK, gold=[1.0, 0.0]) for n in range(9)]
    many = [Item(f"q{n}", f"prompt {n}", ["good", "bad"]) for n in range(40)]
    session = begin(tmp_path / "labels.jsonl", items=[*checks, *many], repeats=0.25, check_every=10)
    while session.view("ann")["phase"] == "pairs":
        answer(session)
    rows = labels.read_labels(tmp_path / "labels.jsonl")
    kinds = [row.kind for row in rows]
    assert kinds.count(PAIR) == 40
    # A quarter of 40, of which the last may not be due when the questions end.
    assert 9 <= kinds.count(REPEAT) <= 10
    assert [number for number, kind in enumerate(kinds, 1) if kind == CHECK] == [10, 20, 30, 40, 50]
    for number, row in enumerate(rows):
        if row.kind == REPEAT:
            before = [other.item for other in rows[:number] if other.kind == PAIR]
            assert row.item in before[: -answers.REPEAT_GAP], "it comes after some others"


QUALIFYING = [Item(f"k{n}", "?", ["good", "bad"], QUALIFICATION, gold=[1.0, 0.0]) for n in range(5)]


def test_who_answers_as_known_is_let_in(tmp_path: Path) -> None:
    session = begin(tmp_path / "labels.jsonl", items=[*QUALIFYING, *ITEMS])
    for number in range(5):
        assert session.view("ann")["phase"] == "qualification"
        wrong = number == 2
        view = answer(session, ranks=(lambda v: [3 - r for r in best_ranks(v)]) if wrong else best_ranks)
        assert view["feedback"].startswith("The known answer is" if wrong else "This is the known answer")
        assert view["undo"] is False, "its right answer was told"
    assert view["phase"] == "pairs" and view["progress"]["yours"] == 0
    assert answer(session)["feedback"] is None


def test_who_does_not_is_not(tmp_path: Path) -> None:
    session = begin(tmp_path / "labels.jsonl", items=[*QUALIFYING, *ITEMS])
    for ranks in ([1, 1], None, best_ranks, best_ranks, best_ranks):
        view = answer(session, ranks=ranks)
    assert view["phase"] == "failed" and "item" not in view
    assert session.view("ben")["phase"] == "qualification"


def test_rankings(tmp_path: Path) -> None:
    items = [Item("r", "?", ["a", "b", "c"], gold=[0.0, 2.0, 1.0])]
    session = begin(tmp_path / "labels.jsonl", items=items)
    shown = session.view("ann")["item"]["completions"]
    answer(session, ranks=[{"a": 3, "b": 1, "c": 2}[text] for text in shown])
    (row,) = labels.read_labels(tmp_path / "labels.jsonl")
    assert row.ranks == [3, 1, 2] and answers.is_right(row)


# -- the file ---------------------------------------------------------------------------------------------------------


def test_it_goes_on_where_it_was(tmp_path: Path) -> None:
    file = tmp_path / "labels.jsonl"
    session = begin(file, repeats=0.2, check_every=0)
    for _ in range(7):
        answer(session)
    view = session.view("ann")
    session.file.close()
    with file.open("ab") as torn:
        torn.write(b'{"id": 8, "item": "q')  # a kill in the middle of a line, of which nobody was told
    again = begin(file, repeats=0.2)
    assert again.view("ann") == view
    answer(again)
    assert [row.id for row in labels.read_history(file)] == list(range(1, 9))


def test_one_process_at_a_time(tmp_path: Path) -> None:
    file = LabelFile(tmp_path / "labels.jsonl")
    with pytest.raises(ValueError, match="another process writes"):
        LabelFile(tmp_path / "labels.jsonl")
    file.close()
    LabelFile(tmp_path / "labels.jsonl").close()


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = begin(tmp_path / "labels.jsonl")
    answer(session)
    before = (tmp_path / "labels.jsonl").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            answer(session)
    assert (tmp_path / "labels.jsonl").read_bytes() == before
    answer(session)
    assert [row.item for row in labels.read_labels(tmp_path / "labels.jsonl")] == ["q0", "q1"]


# -- questions --------------------------------------------------------------------------------------------------------


def write(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def pair_rows(count: int = 30) -> list[dict[str, Any]]:
    return [{"prompt": f"p{n}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(count)]


def test_questions_of_a_preference_file(tmp_path: Path) -> None:
    items = questions.questions(write(tmp_path / "pairs.jsonl", pair_rows()), AnnotateConfig(n=20))
    assert len(items) == 20 and len({item.id for item in items}) == 20
    places = [item.completions.index(f"good {item.prompt[1:]}") for item in items]
    assert 3 < sum(places) < 17, "the chosen one does not always come first"
    assert [item.gold for item in items] == [[1.0, -1.0] if place == 0 else [-1.0, 1.0] for place in places]


def test_questions_that_nobody_has_compared(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "Hi"}]
    rows: list[dict[str, Any]] = [
        {"prompt": "p", "completions": ["a", "b", "c", " a "]},
        {"prompt": talk, "completions": ["x", "y"]},
    ]
    rows += [{"prompt": "same", "completions": ["a", "a "]}]
    items = questions.questions(write(tmp_path / "texts.jsonl", rows), AnnotateConfig())
    by_prompt = {json.dumps(item.prompt): item for item in items}
    assert sorted(by_prompt['"p"'].completions) == ["a", "b", "c"]
    assert by_prompt[json.dumps(talk)].prompt == talk and len(by_prompt) == 2
    assert all(item.gold is None for item in items)
    bad = write(tmp_path / "bad.jsonl", [*rows, {"prompt": "p", "completions": "a"}])
    with pytest.raises(ValueError, match=r"1 of 4 rows cannot be used.*'completions' is not a list of texts"):
        questions.questions(bad, AnnotateConfig())
    assert len(questions.questions(bad, AnnotateConfig(), EnvSettings(bad_rows="skip"))) == 2


def test_questions_of_an_environment() -> None:
    config = AnnotateConfig(n=6, check_every=5, seed=3)
    items = questions.questions("CopyText-v0", config)
    assert [item.kind for item in items].count(PAIR) == 6
    assert all(item.models == ["start", "start"] for item in items if item.kind == PAIR)
    checks = [item for item in items if item.kind == CHECK]
    assert checks and all(item.gold and sorted(item.gold) == [0.0, 1.0] for item in checks)
    assert questions.questions("CopyText-v0", config) == items, "a function of the seed"
    three = questions.questions("CopyText-v0", AnnotateConfig(n=2, completions=4))
    assert all(2 <= len(item.completions) <= 4 for item in three)


def test_two_policies_are_each_half(tmp_path: Path) -> None:
    items = questions.questions("CopyText-v0", AnnotateConfig(n=4, other_model="start", completions=3))
    assert all(len(item.models) == len(item.completions) for item in items)


def test_the_questions_stay_when_it_goes_on(tmp_path: Path) -> None:
    source = write(tmp_path / "pairs.jsonl", pair_rows())
    out = tmp_path / "labels.jsonl"
    items = questions.questions_for(out, source, AnnotateConfig(n=20))
    Path(source).unlink()
    assert questions.questions_for(out, source, AnnotateConfig(n=20, per_pair=3)) == items
    with pytest.raises(ValueError, match="begun with other questions: n was 20 and is 10"):
        questions.questions_for(out, source, AnnotateConfig(n=10))
    file = questions.items_file(out)
    file.write_text(file.read_text().replace('"kind": "pair"', '"kind": "so"', 1))
    with pytest.raises(ValueError, match=r"line 2' is damaged.*kind must be one of"):
        questions.questions_for(out, source, AnnotateConfig(n=20))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"n": 0}, r"n must lie in \[1, 1e\+06\]"),
        ({"completions": 10}, r"completions must lie in \[2, 9\]"),
        ({"repeats": 1.5}, r"repeats must lie in \[0, 1\]"),
        ({"temperature": 0.0}, "give other_model"),
        ({"annotators": ("a", "a")}, "named once each"),
        ({"annotators": ("a",), "per_pair": 2}, "per_pair=2 asks for more annotators than the 1"),
        ({"checks": "x.jsonl"}, "give that too"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        AnnotateConfig(**settings)


def test_qualification_needs_known_answers(tmp_path: Path) -> None:
    unknown = write(tmp_path / "texts.jsonl", [{"prompt": "p", "completions": ["a", "b"]}])
    with pytest.raises(ValueError, match="without a known answer"):
        questions.questions("CopyText-v0", AnnotateConfig(qualification=unknown))
    with pytest.raises(ValueError, match="unknown environment 'CopyTxt-v0'"):
        questions.questions("CopyTxt-v0", AnnotateConfig())
