"""Comparisons over tasks: statistics with their coverage, the folder, the page and the command."""

import dataclasses
import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from textrl_gym.cli.main import main
from textrl_gym.experiments.compare import CompareConfig
from textrl_gym.experiments.suite import BENCHMARK, compare_suite, read_suite, suite
from textrl_gym.reports.suite_page import suite_report
from textrl_gym.stats import suites
from textrl_gym.stats.estimates import Estimate

# -- statistics --------------------------------------------------------------------------------------------------------


def test_scores_are_normalised_by_the_anchors() -> None:
    assert suites.normalised([0.2, 0.5, 0.8], 0.2, 0.8).tolist() == pytest.approx([0.0, 0.5, 1.0])
    with pytest.raises(ValueError, match=r"above the initial policy's, got 0\.2 and 0\.2"):
        suites.normalised([0.2], 0.2, 0.2)


def test_the_interquartile_mean_of_all_runs() -> None:
    # 8 runs: the middle four of 0, .1, .2, .3, .5, .6, .7, 9 are .2, .3, .5, .6: 0.4
    one = suites.iqm_of_tasks([[0.0, 0.2, 0.5, 9.0], [0.1, 0.3, 0.6, 0.7]])
    assert one.value == pytest.approx(0.4)
    assert one.low < one.value < one.high
    fixed = suites.iqm_of_tasks([[0.5], [0.7]])
    assert fixed == Estimate(0.6, 0.6, 0.6)


def test_a_pooled_difference_needs_no_spread_of_its_own() -> None:
    # Deviations 0.1 each way of four agents' pairs: variance 4 * 2 * 0.01 / 4 = 0.02; t(4) = 2.776; 0.02 * (1/2 + 1/2)
    a, b, c, d = ([[mean - 0.1, mean + 0.1]] for mean in (0.9, 0.1, 0.5, 0.3))
    gap = suites.pooled_difference(a, b, [a, b, c, d])
    assert gap.value == pytest.approx(0.8)
    assert gap.high - gap.value == pytest.approx(2.776 * 0.02**0.5, abs=1e-3)
    with pytest.raises(ValueError, match="one run of each agent"):
        suites.pooled_difference([[1.0]], [[2.0]], [[[1.0]], [[2.0]]])
    same = suites.pooled_difference([[1.0, 1.0]], [[2.0, 2.0]], [[[1.0, 1.0]], [[2.0, 2.0]]])
    assert same == Estimate(-1.0, -1.0, -1.0)


def test_a_pooled_difference_over_prompts_and_seeds() -> None:
    a, b = np.array([[0.0, 1.0], [0.2, 1.2]]), np.array([[0.0, 0.0], [0.2, 0.2]])
    # Seeds' means 0.5, 0.7 and 0, 0.2: variance 0.02 each, of the difference 0.02 with 2 degrees. Prompts: differences
    # 0 and 1, variance 0.5, over 2: 0.25 with 1 degree. Satterthwaite: 0.27^2 / (0.02^2 / 2 + 0.25^2 / 1) = 1.163
    gap = suites.pooled_difference([a], [b], [[a], [b]])
    assert gap.value == pytest.approx(0.5)
    freedom = 0.27**2 / (0.02**2 / 2 + 0.25**2)
    assert gap.high - gap.value == pytest.approx(stats.t.ppf(0.975, freedom) * 0.27**0.5, rel=1e-9)
    fixed = suites.pooled_difference([a], [b[:1]], [[a], [b[:1]]], untrained=(False, True))
    # b has no seeds: variance of a's mean 0.02 / 2 with 1 degree.
    freedom = 0.26**2 / (0.01**2 + 0.25**2)
    assert fixed.high - fixed.value == pytest.approx(stats.t.ppf(0.975, freedom) * 0.26**0.5, rel=1e-9)


def test_ranks_are_of_means_and_ties_share() -> None:
    tables: dict[str, Any] = {"a": [[0.9, 0.91], [0.5]], "b": [[0.1, 0.12], [0.5]], "c": [[0.5, 0.52], [0.1]]}
    ranks = suites.mean_ranks(tables)
    assert [ranks[name].value for name in "abc"] == [1.25, 2.25, 2.5]  # (1 + 1.5) / 2, (3 + 1.5) / 2, (2 + 3) / 2
    assert ranks["a"].low == ranks["a"].high == 1.25


@pytest.mark.slow
@pytest.mark.parametrize(("tasks", "runs"), [(5, 3), (8, 5), (12, 3)])
def test_coverage_of_the_interquartile_mean(tasks: int, runs: int) -> None:
    rng, covered = np.random.default_rng(tasks), 0
    grid = (np.arange(4000) + 0.5) / 4000
    for _ in range(1000):
        means, spreads = rng.normal(0.6, 0.3, tasks), np.exp(rng.normal(0, 0.3, tasks)) * 0.15
        truth = stats.trim_mean(
            np.concatenate([stats.norm.ppf(grid, *one) for one in zip(means, spreads, strict=True)]), 0.25
        )
        table = [rng.normal(mean, spread, runs) for mean, spread in zip(means, spreads, strict=True)]
        one = suites.iqm_of_tasks(table, resamples=800, seed=int(rng.integers(1 << 30)))
        covered += one.low <= truth <= one.high
    # 0.95 with a standard error of 0.007
    assert 0.915 <= covered / 1000 <= 0.975


@pytest.mark.slow
@pytest.mark.parametrize(("tasks", "runs", "agents"), [(1, 2, 4), (5, 2, 4), (8, 3, 6)])
def test_coverage_of_pooled_differences_and_ranks(tasks: int, runs: int, agents: int) -> None:
    rng, times = np.random.default_rng(agents), 400
    covered = over_prompts = ranked = 0
    for _ in range(times):
        mean_AT, spread_T = rng.normal(0, 1, (agents, tasks)), np.exp(rng.normal(0, 0.3, tasks)) * 0.3
        tables = {str(a): [rng.normal(mean_AT[a, t], spread_T[t], runs) for t in range(tasks)] for a in range(agents)}
        gap = suites.pooled_difference(tables["0"], tables["1"], list(tables.values()))
        covered += gap.low <= (mean_AT[0] - mean_AT[1]).mean() <= gap.high
        # The same with prompts that all agents meet, whose difficulty differs by agent.
        with_prompts = {
            name: [row[:, None] + rng.normal(0, 1, 64) + rng.normal(0, 0.3, (runs, 64)) for row in table]
            for name, table in tables.items()
        }
        gap = suites.pooled_difference(with_prompts["0"], with_prompts["1"], list(with_prompts.values()))
        over_prompts += gap.low <= (mean_AT[0] - mean_AT[1]).mean() <= gap.high
        rank = suites.mean_ranks(tables, resamples=400, seed=int(rng.integers(1 << 30)))["0"]
        ranked += rank.low - 1e-9 <= stats.rankdata(-mean_AT, axis=0).mean(1)[0] <= rank.high + 1e-9
    # 3 standard errors of 0.95 are 0.033; a rank is a step, which covers more
    assert 0.915 <= covered / times <= 0.985
    assert 0.915 <= over_prompts / times <= 0.995
    assert ranked / times >= 0.915


# -- the folder and the page -------------------------------------------------------------------------------------------

SMALL = CompareConfig(
    ("reinforce", "reference"), seeds=2, total_timesteps=60, eval_episodes=8, set=("reinforce.rollout_episodes=16",),
    device="cpu",
)  # fmt: skip
TASKS = ("CopyText-v0", "KnownOptimum-v0")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("suite") / "out"
    table = compare_suite(TASKS, SMALL, out, progress_bar=False)
    assert set(table["environment"]) == set(TASKS)
    assert len(table[table["final"]]) == 6  # two seeds and one that is not trained, on two tasks
    return out


def test_scores_are_on_one_scale(done: Path) -> None:
    result = read_suite(done)
    assert set(result.scores) == {"reinforce", "reference"} and set(result.complete) == set(result.scores)
    for env_id in TASKS:
        start, best = result.anchors[env_id]
        final = [
            json.loads((done / env_id / "runs" / f"reinforce-{s}" / "evaluation.json").read_text()) for s in (0, 1)
        ]
        expected = [(one["score"] - start) / (best - start) for one in final]
        assert result.scores["reinforce"][env_id].tolist() == pytest.approx(expected)
        assert result.scores["reference"][env_id].tolist() == pytest.approx([0.0], abs=1e-6)


def test_the_page_has_a_row_for_each_task(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    html = suite_report(done).read_text()
    for env_id in TASKS:
        assert f'href="{env_id}/report.html"' in html
    assert "interquartile mean" in html and "<svg" in html and "Content-Security-Policy" in html
    # The same tables for other places, and the runs of all tasks as a table.
    tables = (done / "tables.md").read_text()
    assert "| agent | interquartile mean | mean rank |" in tables and "| pair | difference (95%) |" in tables
    (row,) = [line.split(" | ") for line in tables.splitlines() if line.startswith("| CopyText-v0")]
    frame = pd.read_parquet(done / "results.parquet").query("final and environment == 'CopyText-v0'")
    means = frame.groupby("agent")["score"].mean()
    assert row[3:] == [f"{means['reinforce']:.3f}", f"{means['reference']:.3f} |"]
    error = done / TASKS[0] / "runs" / "bad-0"
    error.mkdir()
    (error / "cell.json").write_text((done / TASKS[0] / "runs" / "reinforce-0" / "cell.json").read_text())
    (error / "error.txt").write_text("<b>boom</b>")
    try:
        html = suite_report(done).read_text()
        assert "CopyText-v0/bad-0: &lt;b&gt;boom&lt;/b&gt;" in html
    finally:
        for file in error.iterdir():
            file.unlink()
        error.rmdir()
    # The same command goes on, and has nothing to run.
    again = ["compare", *TASKS, "--agents", *SMALL.agents, "--seeds", "2", "--total-timesteps", "60"]
    again += ["--eval-episodes", "8", "--set", *SMALL.set, "--device", "cpu", "--out", str(done)]
    assert main(again) == 0
    printed = capsys.readouterr().out
    assert all(env_id in printed for env_id in TASKS) and str(done / "report.html") in printed
    assert main(["report", str(done)]) == 0
    assert str(done / "report.html") in capsys.readouterr().out


def test_gallery_has_a_page_for_each_task(
    done: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(root / "examples"))
    monkeypatch.setattr("sys.argv", ["gallery.py", str(done), "--out", str(tmp_path)])
    importlib.import_module("gallery").main()
    assert {file.name for file in tmp_path.iterdir()} == {
        "index.md", *(f"{env_id}.{kind}" for env_id in TASKS for kind in ("md", "svg"))
    }  # fmt: skip
    page = (tmp_path / "CopyText-v0.md").read_text()
    result = read_suite(done)
    final = result.comparisons["CopyText-v0"].groups[0].runs[0]
    assert page.startswith("# CopyText-v0\n\n") and "](CopyText-v0.svg)" in page and "## Action Space" in page
    # The first prompts, before and after, with their scores.
    for episode in final.episodes[:3]:
        assert (
            f"[score {episode['start']['score']:.2f}] {episode['start']['completion'].strip() or '(nothing)'}" in page
        )
        assert f"[score {episode['score']:.2f}] {episode['completion'].strip() or '(nothing)'}" in page
    assert f"The initial policy has {result.anchors['CopyText-v0'][0]:.3f}" in page
    assert "generated tokens" in (tmp_path / "CopyText-v0.svg").read_text()
    assert "| [KnownOptimum-v0](KnownOptimum-v0.md) |" in (tmp_path / "index.md").read_text()


def test_tasks_that_have_not_begun_are_named(done: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(done, tmp_path / "out"))
    for file in out.glob("KnownOptimum-v0/runs/*/evaluation.json"):
        file.unlink()
    result = read_suite(out)
    assert list(result.comparisons) == ["CopyText-v0"] and set(result.complete) == {"reinforce", "reference"}
    assert result.failed == {"KnownOptimum-v0": "no run has finished yet"}
    assert "KnownOptimum-v0: no run has finished yet" in suite_report(out).read_text()
    for file in out.glob("*/runs/*/evaluation.json"):
        file.unlink()
    with pytest.raises(ValueError, match="holds no finished run"):
        read_suite(out)


def test_benchmark_names_its_settings_and_file_and_flags_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[CompareConfig] = []

    def stop(names: list[str], config: CompareConfig, *_: object, **__: object) -> None:
        assert names == suite("benchmark")
        given.append(config)
        raise ValueError("enough")

    monkeypatch.setattr("textrl_gym.experiments.suite.compare_suite", stop)
    (tmp_path / "file.toml").write_text("[compare]\nseeds = 5\ntotal_timesteps = 300\n")
    out = ["--out", str(tmp_path / "out")]
    for more in ([], ["--config", str(tmp_path / "file.toml"), "--total-timesteps", "200", "--agents", "ppo"]):
        assert main(["compare", "--suite", "benchmark", *out, *more]) == 2
    assert given[0] == BENCHMARK
    assert given[1] == dataclasses.replace(BENCHMARK, seeds=5, total_timesteps=200, agents=("ppo",))


def test_what_cannot_be_compared_is_said_before_any_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "KnownOptimum-v0" in suite("verifiable") and "TLDRSummarize-v0" not in suite("verifiable")
    out = ["--agents", "grpo", "--out", str(tmp_path / "out")]
    for args, words in (
        ([*out], "compare needs ENV first"),
        (["--suite", "none", *out], "unknown suite 'none'"),
        (["CopyText-v0", "--suite", "all", *out], "give environments or --suite, and not both"),
        (["CopyText-v0", "CopyText-v0", *out], "CopyText-v0 is there twice"),
        (["CopyText-v0", "Copy-v0", *out], "unknown environment 'Copy-v0'"),
    ):
        assert main(["compare", *args]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
