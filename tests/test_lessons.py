"""Lessons: findings from seeds, the page, and the command."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from textrl_gym.cli.main import main
from textrl_gym.experiments import lessons
from textrl_gym.experiments.lessons import LessonConfig, LessonResult, Outcome, outcome
from textrl_gym.mdp.env_settings import EnvSettings
from textrl_gym.reports import lesson_page
from textrl_gym.worlds.lesson import START, Finding, Lesson, Trial

FINDING = Finding("it rises", lambda of: of["up"]["gold"] - of[START]["gold"])
LESSON = Lesson("Gold <rises>.", {"up": Trial("by <b>force</b>", "grpo", 100)}, (FINDING,), ("gold", "score", "mine"))


def numbers(golds: list[float]) -> dict[str, list[dict[str, float]]]:
    return {
        START: [{"gold": 0.5, "score": 1.0, "mine": 2.0}] * len(golds),
        "up": [{"gold": gold, "score": 2.0, "mine": 3.0} for gold in golds],
    }


@pytest.mark.parametrize(
    ("golds", "agreeing", "holds"),
    [
        ([0.7, 0.72, 0.68, 0.71, 0.7], 5, True),
        ([0.7, 0.72, 0.68, 0.71, 0.49], 4, True),  # 0.16 (0.04 to 0.28): four of five, and clear of 0
        ([0.7, 0.72, 0.49, 0.71, 0.49], 3, False),
        ([0.5, 0.5, 0.5, 0.5, 0.5], 0, False),
        ([0.9, 0.51, 0.52, 0.51, 0.45], 4, False),  # mean 0.08, interval -0.15 to 0.30
    ],
)
def test_a_finding_holds_by_its_seeds_and_its_interval(golds: list[float], agreeing: int, holds: bool) -> None:
    trials = numbers(golds)
    one = outcome(FINDING, [{name: rows[seed] for name, rows in trials.items()} for seed in range(len(golds))])
    assert (one.agreeing, one.holds) == (agreeing, holds)
    assert one.estimate.value == pytest.approx(sum(golds) / len(golds) - 0.5, abs=1e-12)


def write_run(folder: Path, name: str, completion: str) -> None:
    run = folder / name / "runs" / f"{name}-0"
    run.mkdir(parents=True)
    row = {"prompt": "a <script>", "completion": completion, "score": 1.0, "gold": 0.25}
    (run / "episodes.jsonl").write_text(json.dumps(row) + "\n")
    (run / "evaluation.json").write_text("{}")


@pytest.fixture
def result(tmp_path: Path) -> LessonResult:
    write_run(tmp_path, START, "b")
    write_run(tmp_path, "up", "<img src=x>")
    golds = [0.7, 0.72, 0.68]
    return LessonResult("X-v0", LESSON, tmp_path, numbers(golds), [Outcome("it rises", [g - 0.5 for g in golds])])


def test_the_page_says_what_came_out_and_escapes(result: LessonResult) -> None:
    html = lesson_page.lesson_report(result).read_text()
    assert "It came out." in html
    assert "0.200 (0.150 to 0.250)" in html  # t(2) = 4.303, sd 0.02: 0.2 +- 4.303 * 0.02 / sqrt(3) = 0.0497
    assert "3 of 3" in html and "gold 0.25, score 1.00" in html
    assert "&lt;img src=x&gt;" in html and "<img" not in html and "<script" not in html
    assert "Content-Security-Policy" in html


def test_a_front_has_a_point_with_intervals_for_each_trial(result: LessonResult) -> None:
    assert lesson_page.plane_svg(result) == ""
    html = lesson_page.plane_svg(
        dataclasses.replace(result, lesson=dataclasses.replace(LESSON, plane=("gold", "mine")))
    )
    assert html.count("<circle") == 2 and html.count('class="interval"') == 4
    assert ">start</text>" in html and ">up</text>" in html and "Gold score, sampled" in html


def test_tables_show_the_metrics_that_all_trials_have(result: LessonResult) -> None:
    for seed in result.numbers["up"]:
        del seed["score"]
    head, rows = lesson_page.numbers_table(result)
    assert head == ["mean of seeds (95%)", START, "up"]
    assert [row[:2] for row in rows] == [["Gold score, sampled", "0.500"], ["mine", "2.000"]]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["CopyText-v0"], "CopyText-v0 has no lesson; these have: CalibratedQA-v0, "),
        (["MathWords-v0", "--seeds", "1"], "seeds must be at least 2, got 1"),
        (["Nothing-v0"], "unknown environment 'Nothing-v0'"),
    ],
)
def test_what_cannot_be_run_is_said(args: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lesson", *args]) == 2
    assert words in capsys.readouterr().err


def test_a_trial_may_not_be_called_start() -> None:
    with pytest.raises(ValueError, match="initial policy"):
        Lesson("", {START: Trial("", "grpo", 1)}, (), ())


def test_annotators_judge_where_the_lesson_asks(tmp_path: Path) -> None:
    task = EnvSettings().task("MathWords-v0")
    assert lessons.judged(tmp_path, LESSON, task) == {}
    row = {"index": 0, "completion": "a b", "gold": 0.5, "start": {"completion": "a", "gold": 0.5}}
    (tmp_path / "episodes.jsonl").write_text(json.dumps(row) + "\n")
    lesson = dataclasses.replace(LESSON, annotators={"length_preference": 1.0, "noise": 0.0})
    # sigmoid(1); of one pair nothing can be told about length
    assert lessons.judged(tmp_path, lesson, task) == {"annotators_win_rate": pytest.approx(0.7311, abs=1e-4, rel=0)}


@pytest.mark.slow
def test_a_lesson_runs_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look at a hundredth of the work; called again it runs nothing."""
    config = LessonConfig(seeds=2, eval_episodes=8, scale=0.02, device="cpu")
    first = lessons.run_lesson("MathWords-v0", config, tmp_path / "out")
    assert set(first.numbers) == {START, "answer", "format"}
    assert all(0 <= seed["gold_best_of_8"] <= 1 for rows in first.numbers.values() for seed in rows)
    record: dict[str, Any] = json.loads((tmp_path / "out" / lessons.RECORD).read_text())
    assert [one["words"] for one in record["findings"]] == [one.words for one in first.outcomes]

    def none(*args: object) -> Any:
        raise AssertionError("nothing was left to run")

    monkeypatch.setattr("textrl_gym.experiments.launching.start", none)
    assert lessons.run_lesson("MathWords-v0", config, tmp_path / "out").numbers == first.numbers
    assert "MathWords-v0" in lesson_page.lesson_report(first).read_text()
