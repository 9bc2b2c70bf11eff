"""An environment, an agent and a reward are one file each: added to a copy of the tree, they are found and shown."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ENVIRONMENT = """
from textrl_gym.envs.copy_text import CopyText as _CopyText

ID = "Shout-v0"

class Shout(_CopyText):
    reward = "count_a"
    gold = "count_a"
"""
AGENT = """
from textrl_gym.core import Rollout
from textrl_gym.training.agent import Agent

class Listener(Agent):
    def update(self, rollout: Rollout) -> dict[str, float]:
        return {"heard": float(len(rollout))}
"""
REWARD = """
def reward(prompts, completions, **columns):
    return [float(completion.split().count("a")) for completion in completions]
"""


@pytest.fixture(scope="module")
def tree(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with one more file in each of the three folders, and nothing else changed."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("textrl_gym", "agents", "envs"):
        shutil.copytree(root / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    (tree / "envs" / "shout.py").write_text(ENVIRONMENT)
    (tree / "agents" / "listener.py").write_text(AGENT)
    (tree / "textrl_gym" / "rewards" / "count_a.py").write_text(REWARD)
    return tree


def python(tree: Path, *args: str) -> str:
    """The output of an interpreter that imports the copy."""
    env = os.environ | {"PYTHONPATH": str(tree), "COLUMNS": "200"}
    done = subprocess.run([sys.executable, *args], cwd=tree, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_registry_lists_them(tree: Path) -> None:
    code = """
import gymnasium, textrl_gym
from textrl_gym import registry
print(textrl_gym.__file__)
print(type(gymnasium.make("Shout-v0").unwrapped.vector.task).__name__)
print(*(name in registry.names(kind) for kind, name in
        (("envs", "shout"), ("agents", "listener"), ("rewards", "count_a"))))
"""
    where, task, listed = python(tree, "-c", code).splitlines()
    assert where == str(tree / "textrl_gym" / "__init__.py"), "the checkout was imported, not the copy"
    assert (task, listed) == ("Shout", "True True True")


@pytest.mark.slow
def test_a_comparison_shows_them(tree: Path) -> None:
    pytest.importorskip("plotly")
    settings = ["--seeds", "1", "--total-timesteps", "60", "--eval-episodes", "8", "--device", "cpu", "--workers", "1"]
    settings += ["--set", "listener.rollout_episodes=16", "--env.reward", "count_a=1.0,length=-0.5"]
    out = tree / "out"
    terminal = python(
        tree, "-m", "textrl_gym", "compare", "Shout-v0", "--agents", "listener", *settings, "--out", str(out)
    )
    log = [json.loads(line) for line in (out / "runs" / "listener-0" / "evaluations.jsonl").read_text().splitlines()]
    with (out / "results.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    page = (out / "report.html").read_text()
    for row in (log[-1], table[-1]):  # The gold score is the new reward, and so is the mixture's first part.
        assert float(row["gold"]) == pytest.approx(float(row["reward/count_a"]), abs=1e-6)
        mixed = float(row["reward/count_a"]) - 0.5 * float(row["reward/length"])
        assert float(row["score"]) == pytest.approx(mixed, abs=1e-6)
    assert table[-1]["agent"] == "listener"
    updates = [json.loads(line) for line in (out / "runs" / "listener-0" / "progress.json").read_text().splitlines()]
    assert updates[0]["train/heard"] == 16
    for word in ("listener", "reward/count_a"):
        assert word in terminal
    for word in ("Shout-v0", "listener", "Reward component count_a"):
        assert word in page
