"""Every example runs, with a small budget."""

import importlib
from pathlib import Path

import pytest

from textrl_gym import cli


@pytest.fixture
def example(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The examples folder, importable as from inside it, with runs/ elsewhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(root / "examples"))
    return tmp_path


def test_every_example_is_tested(root: Path) -> None:
    names = {path.stem for path in (root / "examples").glob("*.py")}
    assert names == {"gymnasium_loop", "train_grpo", "custom_reward", "custom_agent", "demo"}


def test_gymnasium_loop(example: Path, capsys: pytest.CaptureFixture[str]) -> None:
    importlib.import_module("gymnasium_loop").main("CopyText-v0")
    assert "score " in capsys.readouterr().out


def test_train_grpo(example: Path, capsys: pytest.CaptureFixture[str]) -> None:
    importlib.import_module("train_grpo").main("CopyText-v0", "500", "out")
    assert "after {" in capsys.readouterr().out
    assert (example / "out" / "agent.json").is_file()


def test_custom_reward(example: Path, capsys: pytest.CaptureFixture[str]) -> None:
    importlib.import_module("custom_reward").main("CopyText-v0")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8  # two rewards, four rows each
    assert sum("custom_reward:calm" in line for line in lines) == 4


def test_custom_agent_learns(example: Path) -> None:
    agent = importlib.import_module("custom_agent").Reinforce("CopyText-v0", seed=0, out="out", learning_rate=3e-3)
    before = agent.collect().score_B.mean()
    agent.learn(total_timesteps=12_000, progress_bar=False, eval_every=0, eval_episodes=8)
    assert agent.collect().score_B.mean() > before + 0.2


def test_custom_agent_by_the_command_line(example: Path) -> None:
    args = ["--total-timesteps", "300", "--rollout-episodes", "16", "--eval-episodes", "8", "--baseline", "none"]
    assert cli.main(["train", "custom_agent:Reinforce", "CopyText-v0", *args, "--out", "out"]) == 0
    assert cli.main(["evaluate", "out", "--episodes", "8"]) == 0


def test_demo(example: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo = importlib.import_module("demo")
    for _ in range(2):  # the second replaces the first
        demo.main(["--env", "CopyText-v0", "--tokens", "800", "--out", "runs/demo"])
        out = capsys.readouterr().out
        assert "GRPO" in out
        assert "PPO" in out
        assert "report: runs/demo/report.html" in out
        assert (example / "runs" / "demo" / "report.html").is_file()
