"""The published benchmark: its table is whole, its page says what the table does, and its numbers have not drifted."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import pandas as pd
import pytest
from scipy import stats

from textrl_gym import registry
from textrl_gym.experiments.compare import compare
from textrl_gym.experiments.suite import BENCHMARK, suite
from textrl_gym.stats.estimates import pooled_spread

CONFIDENCE = 0.999
"""Of the interval in which a run of today must be: CI asks thousands of times a year."""
QUICK = ("CopyText-v0", "grpo")


@pytest.fixture(scope="module")
def published(root: Path) -> pd.DataFrame:
    return pd.read_parquet(root / "docs" / "benchmark.parquet")


def measure(rows: pd.DataFrame) -> pd.Series:
    """Gold scores, or where a task has none the scores."""
    return rows["gold"] if "gold" in rows and rows["gold"].notna().all() else rows["score"]


def test_every_agent_was_run_on_every_task(published: pd.DataFrame) -> None:
    final = published[published["final"]]
    assert sorted(final["environment"].unique()) == sorted(suite("benchmark")) == sorted(registry.env_ids())
    runs = final.groupby(["environment", "agent"]).size()
    for env_id in suite("benchmark"):
        for agent in BENCHMARK.agents:
            seeds = BENCHMARK.seeds if registry.load_agent_class(agent).trains else 1
            assert runs[env_id, agent] == seeds, (env_id, agent)
    assert final["score"].notna().all()


def test_the_page_says_what_the_table_does(published: pd.DataFrame, root: Path) -> None:
    page = (root / "docs" / "benchmark.md").read_text()
    final = published[published["final"]]
    (head,) = re.findall(r"^\| task \| initial policy \| best known \|(.*)\|$", page, re.MULTILINE)
    agents = [name.strip() for name in head.split("|")]
    assert set(agents) == set(BENCHMARK.agents)
    for env_id, rows in final.groupby("environment"):
        (line,) = re.findall(rf"^\| {env_id} \|(.*)\|$", page, re.MULTILINE)
        start, best, *means = [float(cell) for cell in line.split("|")]
        values = measure(rows).groupby(rows["agent"]).mean()
        assert means == pytest.approx([values[agent] for agent in agents], abs=6e-4), env_id
        assert start == pytest.approx(values["reference"], abs=6e-4) and best >= max(means) - 1e-3


def drift(published: pd.DataFrame, env_id: str, agent: str, out: Path) -> tuple[float, float]:
    """How far a run of today is from the published mean, and how far it may be.

    A further run lies within t * s * sqrt(1 + 1 / seeds) of the mean of the published ones, where s is the spread of
    seeds, pooled over the agents of the task: three seeds of one agent alone say little of it.
    """
    of_task = published[published["final"] & (published["environment"] == env_id)]
    scores = {name: measure(rows).to_numpy() for name, rows in of_task.groupby("agent")}
    spread = pooled_spread(list(scores.values()))
    assert spread is not None
    widest = float(stats.t.ppf((1 + CONFIDENCE) / 2, spread.freedom))
    widest *= math.sqrt(spread.variance * (1 + 1 / len(scores[agent])))
    config = dataclasses.replace(BENCHMARK, agents=(agent,), seeds=1, device="cpu", workers=1)
    table = compare(env_id, config, out, progress_bar=False)
    (score,) = measure(table[table["final"]])
    return abs(float(score) - float(scores[agent].mean())), widest


def test_the_numbers_have_not_drifted(published: pd.DataFrame, tmp_path: Path) -> None:
    distance, widest = drift(published, *QUICK, tmp_path / "out")
    assert distance < widest


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(suite("benchmark"))), ids=suite("benchmark"))
def test_the_numbers_of_each_task_have_not_drifted(number: int, published: pd.DataFrame, tmp_path: Path) -> None:
    trained = [agent for agent in BENCHMARK.agents if registry.load_agent_class(agent).trains]
    # An agent for each task, in turn, so that each is run on two tasks or three.
    distance, widest = drift(published, suite("benchmark")[number], trained[number % len(trained)], tmp_path / "out")
    assert distance < widest
