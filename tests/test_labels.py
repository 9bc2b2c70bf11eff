"""Files of labels: what holds after labels were taken back, what a damaged line says, and what is trained on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from textrl_gym.data import labels, ranked
from textrl_gym.data.labels import Item, Label
from textrl_gym.data.preferences import load_preferences
from textrl_gym.envs.copy_text import CopyText


def label(number: int, item: str = "1", annotator: str = "ann", **fields: Any) -> dict[str, Any]:
    one = Label(number, item, "pair", annotator, f"prompt {item}", ["a", "b"], [1, 2], order=[1, 0])
    return dataclasses.asdict(dataclasses.replace(one, **fields))


def write(file: Path, rows: list[dict[str, Any]], end: str = "") -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + end)
    return file


def test_what_was_taken_back_does_not_hold(tmp_path: Path) -> None:
    rows = [label(1), label(2, "2"), label(3, "2", undoes=2), label(4, "2", ranks=[2, 1])]
    file = write(tmp_path / "labels.jsonl", rows)
    assert [one.id for one in labels.read_history(file)] == [1, 2, 3, 4]
    assert [(one.id, one.ranks) for one in labels.read_labels(file)] == [(1, [1, 2]), (4, [2, 1])]
    rows = load_preferences(str(file), "train", whole=True).rows[:]
    assert [(row["id"], row["pairs"]) for row in rows] == [(1, [(0, 1)]), (4, [(1, 0)])]


def test_half_a_line_at_the_end_was_never_saved(tmp_path: Path) -> None:
    file = write(tmp_path / "labels.jsonl", [label(1), label(2, "2")], '{"id": 3, "item')
    assert len(labels.read_labels(file)) == 2
    assert len(load_preferences(str(file), "train", whole=True).rows) == 2
    file = write(tmp_path / "broken.jsonl", [label(1)], '{"id": 3, "item\n' + json.dumps(label(2, "2")) + "\n")
    with pytest.raises(ValueError, match="line 2 is no JSON"):
        labels.read_labels(file)
    with pytest.raises(ValueError, match="1 of 3 rows cannot be used"):
        load_preferences(str(file), "train", whole=True)


def test_only_answers_to_pairs_are_trained_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [label(1), label(2, "2"), label(3, "3", kind="check"), label(4, "1", kind="repeat")]
    rows += [label(5, "4", ranks=None), label(6, "5", ranks=[1, 1]), label(7, "6", kind="qualification")]
    dropped = load_preferences(str(write(tmp_path / "labels.jsonl", rows)), "train", whole=True).dropped
    words = "questions that were asked again, checks and qualification rows"
    assert dropped == {words: 3, "without a label": 1, "ties": 1}
    assert f"dropped 3 {words}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"completions": ["a"]}, "at least two texts"),
        ({"completions": ["a", 2]}, "at least two texts"),
        ({"ranks": [1]}, "2 whole numbers from 1 to 2, got [1]"),
        ({"ranks": [0, 1]}, "2 whole numbers from 1 to 2"),
        ({"ranks": [2, 2]}, "ranks must begin at 1"),
        ({"ranks": [1, True]}, "2 whole numbers"),
        ({"ranks": "12"}, "'ranks' must be list or null"),
        ({"kind": "x"}, "kind must be one of pair, repeat, check, qualification, got 'x'"),
        ({"order": [0, 0]}, "each place from 0 to 1 once"),
        ({"confidence": 5}, "confidence must be 1 to 4, got 5"),
        ({"seconds": -1.0}, "at least 0, got -1.0"),
        ({"gold": [1.0]}, "gold must have one value for each of 2"),
        ({"spans": [{"completion": 0, "start": 0, "end": 2, "mark": "good"}]}, "within 0 and 1, got 0 to 2"),
        ({"spans": [{"completion": 2, "start": 0, "end": 1, "mark": "good"}]}, "completion must be 0 to 1, got 2"),
        ({"spans": [{"completion": 0, "start": 0, "end": 1, "mark": "so"}]}, "mark must be good or bad, got 'so'"),
        ({"spans": [{"completion": 0}]}, "completion, start, end and mark"),
        ({"annotator": None}, "'annotator' must be str"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    file = write(tmp_path / "labels.jsonl", [label(1), label(2) | fields])
    with pytest.raises(ValueError, match=r"label 2' is damaged") as error:
        labels.read_labels(file)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"completions": ["a"]}, "at least 2 completions, got 1"),
        ({"models": ["m"]}, "models must have one value for each of 2 completions, got 1"),
        ({"gold": [1.0, 2.0, 3.0]}, "gold must have one value for each of 2"),
        ({"kind": "x"}, "kind must be one of"),
    ],
)
def test_items_that_are_none(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Item(**({"id": "1", "prompt": "p", "completions": ["a", "b"]} | fields))


def test_ranks() -> None:
    assert labels.ranks_of_scores([0.5, 2.0, 0.5, -1.0]) == [2, 1, 2, 3]
    assert labels.ranked_pairs([2, 1, 2]) == [(1, 0), (1, 2)]
    # a < b: 0 where a is better, 1 where b is, 2 for a tie
    assert list(labels.decisions([2, 1, 2])) == [((0, 1), 1), ((0, 2), 2), ((1, 2), 0)]


# -- weights ----------------------------------------------------------------------------------------------------------


def crowd(items: int = 40) -> list[dict[str, Any]]:
    """Two who agree, that the first is better, and a third who says the opposite."""
    ranks = {"ann": [1, 2], "ben": [1, 2], "cat": [2, 1]}
    rows: list[dict[str, Any]] = []
    for item in range(items):
        for name in ranks:
            rows.append(label(len(rows) + 1, str(item), name, ranks=ranks[name], prompt="a b c"))
    return rows


@pytest.mark.parametrize("method", ["dawid-skene", "bradley-terry"])
def test_who_always_contradicts_counts_little(method: labels.AnnotatorWeights) -> None:
    preferred = labels.consensus(crowd(), method)
    assert len(preferred) == 40
    # The majority of two of three would be 0.67; who is always wrong confirms the others.
    assert all(first > 0.9 for pairs in preferred.values() for first in pairs.values())


def test_weighted_pairs_are_both_orders() -> None:
    assert labels.weighted_pairs({(0, 1): 0.75, (1, 2): 0.5}) == (
        [(0, 1), (1, 0), (1, 2), (2, 1)],
        [0.75, 0.25, 0.5, 0.5],
    )


def test_labels_of_an_item_become_one_comparison(tmp_path: Path) -> None:
    file = str(write(tmp_path / "labels.jsonl", crowd()))
    task = CopyText()
    tokenizer = task.load_tokenizer()
    every = ranked.read_preferences(file, "train", task, tokenizer, whole=True)
    assert len(every) == 120 and every[0].weights == []
    one = ranked.read_preferences(file, "train", task, tokenizer, whole=True, annotator_weights="dawid-skene")
    assert len(one) == 40
    assert one[0].pairs == [(0, 1), (1, 0)]
    assert one[0].weights[0] > 0.9 and sum(one[0].weights) == pytest.approx(1, rel=0, abs=1e-12)


def test_weights_need_names(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n} TL;DR:", "chosen": "a", "rejected": "b"} for n in range(20)]
    file = str(write(tmp_path / "pairs.jsonl", rows))
    task = CopyText()
    with pytest.raises(ValueError, match="names no annotators"):
        ranked.read_preferences(file, "train", task, task.load_tokenizer(), annotator_weights="dawid-skene")
    with pytest.raises(ValueError, match="there are none"):
        labels.consensus([label(1, ranks=[1, 1])], "dawid-skene")
