"""Policies by size: the corpus, the stages, the page and the command."""

import itertools
import json
from pathlib import Path

import pytest

from textrl_gym.cli.main import main
from textrl_gym.experiments import sizes
from textrl_gym.experiments.sizes import SHAPES, Point, SizesConfig, SizesResult, corpus_rows, run_sizes
from textrl_gym.mdp.task import load_env_task
from textrl_gym.questions import passages
from textrl_gym.reports import sizes_page
from textrl_gym.stats.estimates import Estimate

ENV = "CalibratedQA-v0"


def test_the_corpus_has_other_worlds_and_poor_texts() -> None:
    task = load_env_task(ENV)
    rows = list(itertools.islice(corpus_rows(ENV, task, "train", 0), 400))
    assert rows == list(itertools.islice(corpus_rows(ENV, task, "train", 0), 400))
    assert all(set(row) == {"prompt", "completion"} for row in rows)
    questions = [question.split("{name}")[0] for question in passages.QUESTIONS.values()]
    own = [row for row in rows if any(question in row["prompt"] for question in questions)]
    assert 150 <= len(own) <= 250  # half of 400, three standard errors are 30
    # A quarter of the own ones continue another prompt: their fact is mostly of nobody in the passage.
    answered = [row for row in own if ", " in row["completion"]]
    strangers = [row for row in answered if row["completion"].split(", ")[1].split()[0] not in row["prompt"]]
    assert 0.05 <= len(strangers) / len(answered) <= 0.4
    assert rows != list(itertools.islice(corpus_rows(ENV, task, "validation", 0), 400))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["CopyText-v0"], "CopyText-v0 has no recipe for models of several sizes; these have: CalibratedQA-v0"),
        (["Tool-v0"], "Tool-v0 has no recipe for models of several sizes"),
        ([ENV, "--sizes", "xl"], "unknown size 'xl'"),
        ([ENV, "--sizes", "s", "s"], "sizes: name some of s, m, l, each once"),
        ([ENV, "--seeds", "0"], "seeds must be at least 1, got 0"),
    ],
)
def test_wrong_input_is_refused(
    args: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sizes", *args, "--out", str(tmp_path / "out")]) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_win_rates_of_seeds_stay_on_their_scale() -> None:
    # t(1) = 12.7: 0.95 +- 12.7 * 0.07 / sqrt 2 is far beyond 1
    rate = sizes.of_seeds([0.9, 1.0])
    assert (rate.value, rate.low, rate.high) == pytest.approx((0.95, 0.3147, 1.0), abs=1e-3)


def result(folder: Path) -> SizesResult:
    points = [
        Point(size, stage, count, 0.1 * number, Estimate(0.2 * number, 0.2 * number - 0.05, 0.2 * number + 0.05))
        for size, count in (("s", 250_000), ("l", 4_100_000))
        for number, stage in enumerate(sizes.STAGES, 1)
    ]
    return SizesResult("X<b>-v0", folder, 0.456, points)


def test_the_page_has_a_line_for_each_stage(tmp_path: Path) -> None:
    page = sizes_page.sizes_report(result(tmp_path)).read_text()
    assert "X&lt;b&gt;-v0" in page and "<b>" not in page and "0.456" in page
    assert page.count('class="eval') == 6 and "Content-Security-Policy" in page
    head, rows = sizes_page.points_table(result(tmp_path))
    assert rows[0] == ["Pretrained", "0.25M", "0.100", "0.20 (0.15 to 0.25)"] and len(rows[0]) == len(head)


@pytest.mark.slow
def test_every_stage_of_a_small_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "s", {"hidden_size": 32, "intermediate_size": 64, "layers": 2, "heads": 1})
    monkeypatch.setattr(sizes, "CORPUS", {"train": 600, "validation": 40})
    config = SizesConfig(("s",), seeds=2, total_timesteps=6_000, eval_rows=16, scale=0.01)
    done = run_sizes(ENV, config, tmp_path, progress_bar=False)
    assert [(point.size, point.stage) for point in done.points] == [("s", stage) for stage in sizes.STAGES]
    assert 0 < done.reference_gold < 1
    record = json.loads((tmp_path / sizes.RECORD).read_text())
    # Everything is there: the same call only measures, and comes to the same numbers.
    before = (tmp_path / "s" / "sft" / "sft.json").stat().st_mtime_ns
    run_sizes(ENV, config, tmp_path, progress_bar=False)
    assert json.loads((tmp_path / sizes.RECORD).read_text()) == record
    assert (tmp_path / "s" / "sft" / "sft.json").stat().st_mtime_ns == before
