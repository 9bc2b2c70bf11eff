"""What a file of labels is worth, and labels as other tools write and read them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from statsmodels.stats import inter_rater

from textrl_gym.cli import main
from textrl_gym.data import labels
from textrl_gym.data.labels import CHECK, PAIR, REPEAT, Label
from textrl_gym.data.preferences import load_preferences
from textrl_gym.feedback import formats
from textrl_gym.feedback.agreement import label_agreement
from textrl_gym.reports import labels_page

HOSTILE = """"'></script><hostile src=x onerror=alert(1)>"""


def crowd(
    accuracy: dict[str, float], items: int = 120, seed: int = 0, end: str = "", models: bool = False
) -> list[Label]:
    """Labels of simulated people: right with their probability. Of each item the text "good" is better."""
    rng = np.random.default_rng(seed)
    rows: list[Label] = []
    for item in range(items):
        better = int(rng.integers(2))
        texts = [f"good {item} and long{end}", f"bad {item}{end}"]
        texts = texts if better == 0 else texts[::-1]
        gold = [1.0, 0.0] if better == 0 else [0.0, 1.0]
        for name, chance in accuracy.items():
            wins = better if rng.random() < chance else 1 - better
            row = Label(
                len(rows) + 1, f"i{item}", PAIR, name, f"p{item}{end}", texts, [1, 2] if wins == 0 else [2, 1],
                order=rng.permutation(2).tolist(), seconds=float(rng.uniform(2, 8)), gold=gold,
                models=(["ppo", "start"] if better == 0 else ["start", "ppo"]) if models else [],
            )  # fmt: skip
            rows.append(row)
    return rows


def write(file: Path, rows: list[Label]) -> Path:
    file.write_text("".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows))
    return file


# -- agreement --------------------------------------------------------------------------------------------------------


def test_numbers_are_those_of_the_labels(tmp_path: Path) -> None:
    rows = crowd({"ann": 0.95, "ben": 0.9, "cat": 0.5}, models=True)
    report = label_agreement(rows)
    decisions = np.array([[int(row.ranks == [2, 1]) for row in rows[n::3]] for n in range(3)])  # [annotator, item]
    counts, _ = inter_rater.aggregate_raters(decisions.T, 2)
    assert report.fleiss is not None and report.fleiss_labels == 3
    assert report.fleiss.value == pytest.approx(inter_rater.fleiss_kappa(counts), rel=0, abs=1e-12)
    table = np.zeros((2, 2))
    np.add.at(table, (decisions[0], decisions[1]), 1)
    kappa = inter_rater.cohens_kappa(table, return_results=False)
    first = report.pairs[0]
    assert (first.first, first.second, first.comparisons) == ("ann", "ben", 120)
    assert first.kappa == pytest.approx(kappa, rel=0, abs=1e-12)
    assert first.agreement.value == pytest.approx((decisions[0] == decisions[1]).mean(), rel=0, abs=1e-12)
    assert (report.labels, report.items, report.counts) == (360, 120, {"preferences": 360})
    by_name = {one.name: one for one in report.people}
    right = {name: np.mean([row.ranks == ([1, 2] if row.gold == [1.0, 0.0] else [2, 1]) for row in rows[n::3]])
             for n, name in enumerate(by_name)}  # fmt: skip
    for name, one in by_name.items():
        assert one.gold is not None and one.gold.value == pytest.approx(right[name], rel=0, abs=1e-12)
        assert one.longer is not None and one.longer.value == pytest.approx(right[name], rel=0, abs=1e-12)
        assert one.accuracy == pytest.approx(right[name], rel=0, abs=0.08), "though the truth was not given"
    (model,) = report.models
    assert (model.model, model.other, model.comparisons) == ("ppo", "start", 360)
    assert model.preferred.value == pytest.approx(np.mean(list(right.values())), rel=0, abs=1e-12)


def test_habits_are_warned_of() -> None:
    """ann always takes the first that is shown, in no time, and fails the checks."""
    rows = []
    for row in crowd({"ann": 1.0, "ben": 0.9, "cat": 0.9}, 60):
        if row.annotator == "ann":
            ranks = [1, 2] if row.order[0] == 0 else [2, 1]
            row = dataclasses.replace(row, ranks=ranks, seconds=0.3)
        rows.append(row)
    for n in range(6):
        rows.append(dataclasses.replace(rows[0], id=999 + n, item=f"c{n}", kind=CHECK, ranks=[1, 1]))
    report = label_agreement(rows)
    ann = report.people[0]
    assert ann.first is not None and ann.first.value == 1.0
    assert ann.checks is not None and ann.checks.value == 0.0
    words = " ".join(report.warnings)
    assert "ann prefers what is shown first: 1.00" in words
    assert "ann answers attention checks wrongly: 0.00" in words
    assert "ann answers in 0.3 seconds" in words
    assert "ann agrees with the others as a coin would" in words
    assert "ben" not in words and "cat" not in words
    assert report.counts["attention checks"] == 6


def test_self_agreement_ties_and_skips() -> None:
    one = Label(1, "i", PAIR, "ann", "p", ["a", "b"], [1, 2], order=[0, 1])
    rows = [one, dataclasses.replace(one, id=2, item="j", ranks=[2, 1])]
    rows += [dataclasses.replace(row, id=3 + n, kind=REPEAT, ranks=[1, 2]) for n, row in enumerate(rows)]
    rows += [
        dataclasses.replace(one, id=5, item="k", ranks=[1, 1]),
        dataclasses.replace(one, id=6, item="l", ranks=None),
    ]
    rows += [dataclasses.replace(one, id=7, item="m", ranks=[1, 1], all_bad=True)]
    (ann,) = label_agreement(rows).people
    assert ann.myself is not None and ann.myself.value == 0.5
    assert (ann.labels, ann.ties, ann.skipped) == (5, 2, 1)
    assert ann.accuracy is None and ann.gold is None, "one annotator alone is compared to nobody"
    assert label_agreement(rows).counts == {"preferences": 2, "ties": 1, "all bad": 1, "skipped": 1, "asked again": 2}
    with pytest.raises(ValueError, match="there are no labels"):
        label_agreement([])


def test_rankings_are_their_comparisons() -> None:
    one = Label(1, "i", PAIR, "ann", "p", ["a", "b", "c"], [1, 2, 3], order=[2, 1, 0])
    report = label_agreement([one, dataclasses.replace(one, id=2, annotator="ben", ranks=[1, 3, 2])])
    assert report.pairs[0].comparisons == 3
    assert report.pairs[0].agreement.value == pytest.approx(2 / 3, rel=0, abs=1e-12)


def test_the_page_shows_texts_as_texts(tmp_path: Path) -> None:
    rows = crowd({"ann": 1.0, HOSTILE: 0.6}, 40, end=HOSTILE, models=True)
    rows[0] = dataclasses.replace(rows[0], comment=HOSTILE)
    page = tmp_path / "page.html"
    labels_page.labels_report(write(tmp_path / "labels.jsonl", rows), page)
    html = page.read_text()
    assert (
        "<hostile" not in html and "&lt;hostile" in html and "default-src &#39;none&#39;" in html.replace("'", "&#39;")
    )
    assert "What they disagree on" in html and "Krippendorff" in html
    contested = labels_page.disagreements(rows)
    assert all(len({tuple(row.ranks or []) for row in some}) > 1 for some in contested)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "labels.jsonl", crowd({"ann": 0.9, "ben": 0.9}, 20))
    assert main.main(["labels", "report", str(file), "--json", str(tmp_path / "numbers.json")]) == 0
    out = capsys.readouterr().out
    assert "Krippendorff's alpha" in out and f"saved in {tmp_path / 'labels.html'}" in out.replace("\n", "")
    assert json.loads((tmp_path / "numbers.json").read_text())["items"] == 20
    assert main.main(["labels", "reprot", str(file)]) == 2
    assert "did you mean 'report'?" in capsys.readouterr().err
    assert main.main(["labels"]) == 0
    assert "labels export FILE" in capsys.readouterr().out


# -- other tools ------------------------------------------------------------------------------------------------------


def varied(two: bool = True) -> list[Label]:
    """Labels with all that a format may have a place for."""
    post = "SUBREDDIT: r/cats\n\nTITLE: Cat\n\nPOST: It steals\n\nsocks.\n\nTL;DR:"
    span = {"completion": 1, "start": 0, "end": 2, "mark": "bad"}
    rows = [
        Label(1, "a", PAIR, "ann", post, [" Cat.", " Dog."], [1, 2], order=[1, 0], confidence=4, comment="yes",
              spans=[span], seconds=2.5, time="2026-11-29T08:00:00+00:00", models=["ppo", "start"]),
        Label(2, "a", PAIR, "ben", post, [" Cat.", " Dog."], [2, 1], order=[0, 1], confidence=1),
        Label(3, "b", PAIR, "ann", [{"role": "user", "content": "Hi"}], ["Hello.", "No."], [1, 1], order=[0, 1]),
        Label(4, "c", PAIR, "ben", "Plain:", ["x", "y"], None, order=[0, 1]),
        Label(5, "c", CHECK, "ben", "Plain:", ["x", "y"], [1, 2], order=[0, 1]),
        Label(6, "d", PAIR, "ben", "Plain:", ["x", "z"], [2, 1], order=[1, 0], all_bad=False),
    ]  # fmt: skip
    if not two:
        rows.append(Label(7, "e", PAIR, "ann", "Rank:", ["x", "y", "z"], [2, 1, 2], order=[0, 2, 1]))
    return rows


def said(rows: list[Label]) -> list[tuple[Any, ...]]:
    """Who said what of which texts, whatever their places."""
    return sorted(
        (label.annotator, json.dumps(label.prompt), tuple(sorted(zip(label.completions, label.ranks, strict=True))))
        for label in rows
        if label.ranks is not None and label.kind == PAIR
    )


@pytest.mark.parametrize("kind", ["openai", "argilla", "label-studio"])
def test_there_and_back(kind: formats.Format, tmp_path: Path) -> None:
    suffix = ".jsonl" if kind == "openai" else ".json"
    rows = [
        dataclasses.replace(row, prompt="Hi?" if row.item == "b" else row.prompt) for row in varied(kind != "argilla")
    ]
    file = write(tmp_path / "labels.jsonl", rows)
    formats.export_labels(file, kind, tmp_path / f"out{suffix}")
    formats.import_labels(tmp_path / f"out{suffix}", kind, tmp_path / "back.jsonl")
    back = labels.read_labels(tmp_path / "back.jsonl")
    assert said(back) == said(rows)
    first = next(row for row in back if row.annotator == "ann" and row.ranks and len(set(row.ranks)) > 1)
    if kind == "openai":
        assert first.confidence == 4 and sorted(first.models) == ["ppo", "start"]
        # Shown first was " Dog.", which lost.
        assert [first.completions[place] for place in first.order] == [" Dog.", " Cat."]
    else:
        assert first.comment == "yes"
    if kind == "label-studio":
        (span,) = first.spans
        assert first.completions[span["completion"]] == " Dog." and first.seconds == 2.5
        assert sum(row.ranks is None for row in back) == 1, "a question that was skipped"


def test_openai_form(tmp_path: Path) -> None:
    file = write(tmp_path / "labels.jsonl", varied())
    formats.export_labels(file, "openai", tmp_path / "out.jsonl")
    first, second, third, fourth = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert first["info"] == {"id": "a", "title": "Cat", "subreddit": "cats", "site": None, "article": None,
                             "post": "It steals\n\nsocks."}  # fmt: skip
    assert [summary["text"] for summary in first["summaries"]] == [" Dog.", " Cat."]
    assert (first["choice"], first["worker"], first["extra"]) == (1, "ann", {"confidence": 9})
    assert (second["choice"], second["extra"]) == (1, {"confidence": 6})
    assert third["choice"] is None and fourth["info"]["post"] == "Plain:"
    # What was written is read as the published schema: the tie has no label.
    rows = load_preferences(str(tmp_path / "out.jsonl"), "train", whole=True)
    assert rows.schema == "openai/summarize_from_feedback" and len(rows.rows) == 3
    assert [row["prompt"] for row in rows.rows[:]] == [varied()[0].prompt, varied()[0].prompt, "Plain:"]


def test_trl_form_is_what_was_preferred(tmp_path: Path) -> None:
    file = write(tmp_path / "labels.jsonl", varied(two=False))
    assert formats.export_labels(file, "trl", tmp_path / "out.jsonl") == 5
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(row["chosen"], row["rejected"]) for row in rows] == [
        (" Cat.", " Dog."), (" Dog.", " Cat."), ("z", "x"), ("y", "x"), ("y", "z"),
    ]  # fmt: skip
    ours = load_preferences(str(file), "train", whole=True).rows[:]
    theirs = load_preferences(str(tmp_path / "out.jsonl"), "train", whole=True).rows[:]
    assert len(theirs) == sum(len(row["pairs"]) for row in ours)
    formats.import_labels(tmp_path / "out.jsonl", "trl", tmp_path / "back.jsonl")
    assert len(labels.read_labels(tmp_path / "back.jsonl")) == 5


@pytest.mark.parametrize("kind", ["trl", "argilla", "label-studio"])
def test_an_order_that_a_file_does_not_know_is_no_bias(kind: formats.Format, tmp_path: Path) -> None:
    rows = [Label(n, f"i{n}", PAIR, "ann", f"p{n}", ["a", "b"], [1, 2], order=[1, 0]) for n in range(1, 41)]
    out = tmp_path / ("out.jsonl" if kind == "trl" else "out.json")
    formats.export_labels(write(tmp_path / "labels.jsonl", rows), kind, out)
    formats.import_labels(out, kind, tmp_path / "back.jsonl")
    back = labels.read_labels(tmp_path / "back.jsonl")
    assert [(row.ranks, row.order) for row in back] == [([1, 2], [])] * 40
    report = label_agreement(back)
    assert [person.first for person in report.people] == [None]
    assert not any("shown" in words for words in report.warnings)
    # Beside labels whose order is known, these count alone: here all are for what was shown last.
    again = [dataclasses.replace(row, id=row.id + 40) for row in rows[:2]]
    (ann,) = label_agreement([*(dataclasses.replace(row, annotator="ann") for row in back), *again]).people
    assert ann.first is not None and ann.first.value < 1e-9


def test_an_order_that_another_tool_showed_is_known(tmp_path: Path) -> None:
    fields, ranking = {"prompt": "p", "answer_1": "a", "answer_2": "b"}, ["answer_2", "answer_1"]
    record = {"fields": fields, "responses": {"ranking": [{"value": ranking, "user_id": "7"}]}}
    pair = {"type": "pairwise", "value": {"selected": "right"}}
    task = {"data": {"prompt": "p", "text1": "a", "text2": "b"}, "annotations": [{"result": [pair], "completed_by": 7}]}
    rows: dict[formats.Format, dict[str, Any]] = {"argilla": record, "label-studio": task}
    for kind, row in rows.items():
        (tmp_path / f"{kind}.json").write_text(json.dumps([row]))
        formats.import_labels(tmp_path / f"{kind}.json", kind, tmp_path / f"{kind}.jsonl")
        (label,) = labels.read_labels(tmp_path / f"{kind}.jsonl")
        assert (label.annotator, label.ranks, label.order) == ("7", [2, 1], [0, 1])


def test_trl_form_keeps_soft_labels(tmp_path: Path) -> None:
    """Of three texts: the first is likely better than the second, as good as the third, which the second may beat."""
    row = Label(1, "i", PAIR, "judge", "p", ["a", "b", "c"], [1, 2, 2], probabilities=[0.75, 0.5, 0.25], flips=1)
    file = write(tmp_path / "labels.jsonl", [row])
    assert formats.export_labels(file, "trl", tmp_path / "out.jsonl") == 2
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(row["chosen"], row["rejected"], row["probability"]) for row in rows] == [
        ("a", "b", 0.75),
        ("c", "b", 0.75),
    ]


def test_alpaca_farm_form(tmp_path: Path) -> None:
    file = write(tmp_path / "labels.jsonl", varied())
    formats.export_labels(file, "alpaca-farm", tmp_path / "out.json")
    rows = json.loads((tmp_path / "out.json").read_text())
    assert [row["preference"] for row in rows] == [2, 2, 0, 1]
    assert rows[2]["instruction"] == "Hi" and rows[2]["output_1"] == "Hello."
    assert load_preferences(str(tmp_path / "out.json"), "train", whole=True).schema == "tatsu-lab/alpaca_farm"
    formats.import_labels(tmp_path / "out.json", "alpaca-farm", tmp_path / "back.jsonl")
    back = labels.read_labels(tmp_path / "back.jsonl")
    assert [row.ranks for row in back if row.annotator == "ann"] == [[2, 1], [1, 1]]


def test_alpaca_farm_gives_prompts_back_as_they_were(tmp_path: Path) -> None:
    talk = [{"role": role, "content": text} for role, text in (("user", "Hi"), ("assistant", "Yes?"), ("user", "Why?"))]
    prompts: list[Any] = ["A text:", talk[:1], talk, "\n\nHuman: a text too\n\nAssistant:"]
    rows = [Label(n, f"i{n}", PAIR, "ann", prompt, ["a", "b"], [1, 2]) for n, prompt in enumerate(prompts, 1)]
    formats.export_labels(write(tmp_path / "labels.jsonl", rows), "alpaca-farm", out := tmp_path / "out.json")
    formats.import_labels(out, "alpaca-farm", tmp_path / "back.jsonl")
    assert [row.prompt for row in labels.read_labels(tmp_path / "back.jsonl")] == prompts
    # AlpacaFarm's own rows are what a user says.
    entries = json.loads(out.read_text())
    out.write_text(json.dumps([{name: value for name, value in entries[0].items() if name != "prompt_form"}]))
    formats.import_labels(out, "alpaca-farm", tmp_path / "own.jsonl")
    (own,) = labels.read_labels(tmp_path / "own.jsonl")
    assert own.prompt == [{"role": "user", "content": "A text:"}]
    out.write_text(json.dumps([entries[0] | {"prompt_form": "turns"}]))
    with pytest.raises(ValueError, match="prompt_form must be one of text, user, conversation, got 'turns'"):
        formats.import_labels(out, "alpaca-farm", tmp_path / "bad.jsonl")


@pytest.mark.parametrize(
    ("work", "kind", "out", "words"),
    [
        (
            "export",
            "csv",
            "out.csv",
            "format must be one of trl, openai, alpaca-farm, argilla, label-studio, got 'csv'",
        ),
        ("export", "trl", "out.json", r"a file \*.jsonl for trl"),
        ("export", "openai", "out.jsonl", "openai has comparisons of two; item 'e' ranks 3"),
        ("export", "label-studio", "out.json", "label-studio has comparisons of two"),
        ("export", "trl", "labels.jsonl", "is there already"),
        ("import", "openai", "out.jsonl", "entry 1 does not fit openai: KeyError"),
        ("import", "label-studio", "out.jsonl", "entry 1 does not fit label-studio"),
        ("import", "trl", "labels.jsonl", "is there already"),
    ],
)
def test_what_does_not_fit(work: str, kind: Any, out: str, words: str, tmp_path: Path) -> None:
    file = write(tmp_path / "labels.jsonl", varied(two=False))
    with pytest.raises(ValueError, match=words):
        (formats.export_labels if work == "export" else formats.import_labels)(file, kind, tmp_path / out)


def test_export_and_import_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out, back = (tmp_path / name for name in ("labels.jsonl", "out.jsonl", "back.jsonl"))
    write(file, varied())
    assert main.main(["labels", "export", str(file), "--format", "openai", "--out", str(out)]) == 0
    assert "4 entries" in capsys.readouterr().out
    assert main.main(["labels", "import", str(out), "--format", "openai", "--out", str(back)]) == 0
    assert "4 labels" in capsys.readouterr().out and said(labels.read_labels(back))
