"""The registry of metrics: an entry is all that a metric needs."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from textrl_gym.core import Rollout
from textrl_gym.evaluation import metrics
from textrl_gym.evaluation.evaluator import Evaluator
from textrl_gym.evaluation.metrics import METRICS, Drift, Metric
from textrl_gym.evaluation.text_metrics import Samples
from textrl_gym.experiments.compare import CompareConfig, print_finals
from textrl_gym.experiments.results import read_comparison, tidy
from textrl_gym.experiments.worker import run
from textrl_gym.reports import run_page
from textrl_gym.reports.comparison_page import comparison_report
from textrl_gym.training.run_folder import read_run, renamed


def letters(rollouts: Sequence[Rollout], samples: Samples) -> float:
    assert sum(map(len, rollouts)) == len(samples)
    return sum(len(sample["completion"]) for sample in samples) / len(samples)


def test_a_metric_is_added_in_one_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = Metric("Letters of a completion", "letters", decimals=2, of=letters, short="letters", drift=Drift("Q", "R"))
    monkeypatch.setitem(METRICS, "letters", entry)
    folder = tmp_path / "runs" / "reinforce-0"
    folder.mkdir(parents=True)
    spec = {"agent": "reinforce", "environment": "CopyText-v0", "seed": 0, "kl_coef": None, "settings": {}}
    spec |= {"model": None, "reward": None, "gold": None, "device": "cpu", "total_timesteps": 200, "save_every": 0}
    spec |= {"eval_every": 0, "eval_episodes": 8, "eval_seed": 0}
    (folder / "cell.json").write_text(json.dumps(spec))
    run(folder, spec)
    plan = {"environment": "CopyText-v0", "config": vars(CompareConfig(("reinforce",), 200)), "versions": {}}
    (tmp_path / "compare.json").write_text(json.dumps(plan, default=str))
    capsys.readouterr()

    # The log of evaluations, and the tidy table that is saved as CSV.
    row = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()][-1]
    value = row["letters"]
    table = tidy(tmp_path)
    assert table[~table["final"]]["letters"].iloc[-1] == value
    last = f"{table[table['final']]['letters'].iloc[0]:.2f}"
    # The terminal.
    print_finals(table)
    assert "letters" in (shown := capsys.readouterr().out) and last in shown
    # The page of the run and that of the comparison.
    assert f"<td>{value:.2f}</td>" in run_page.run_html([read_run(folder)])
    pytest.importorskip("plotly")
    page = comparison_report(tmp_path).read_text()
    assert read_comparison(tmp_path).runs[0].final["letters"] == pytest.approx(float(last), abs=0.005)
    assert "Letters of a completion, letters" in page and f"<td>{last}</td>" in page


def test_a_number_that_the_registry_does_not_know_has_its_own_name() -> None:
    rows = [{"timesteps": 0, "updates": 0, "mine": 1.23456, "score": 1.0, "reward/length": 2.0}]
    assert metrics.metric_names(rows) == ["score", "mine", "reward/length"]
    assert metrics.metric("mine").heading == "mine"
    assert metrics.metric("reward/length").heading == "Reward component length"
    assert (metrics.number(rows[0], "mine"), metrics.number(rows[0], "gold")) == ("1.235", "-")


def test_every_computed_metric_is_in_an_evaluation() -> None:
    from textrl_gym.agents.reference import Reference

    agent = Reference("CopyText-v0")
    found, _ = Evaluator(agent.env, 8).run(agent)
    computed = {key for key, metric in METRICS.items() if metric.of is not None}
    # Completions of CopyText-v0 are too short for a run of 4 words, and no conversations: those metrics are left out.
    assert computed - set(found) == {"repetition", "turns", "turn_rewards"}


def test_a_number_of_ones_own_under_an_old_name_is_left_alone() -> None:
    assert renamed({"judge": 0.5, "score": 1.0}) == {"gold": 0.5, "score": 1.0}  # of 0.1
    assert renamed({"gold": 0.5, "judge": 9.0}) == {"gold": 0.5, "judge": 9.0}  # an agent's extra_metrics has "judge"
