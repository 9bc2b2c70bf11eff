"""Every example runs, with a small budget."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from docs_blocks import blocks

from textrl_gym.envs import known_optimum
from textrl_gym.envs.tldr_summarize import TLDRSummarize


@pytest.fixture
def example(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The examples folder, importable as from inside it, with runs/ elsewhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(root / "examples"))
    return tmp_path


def test_every_example_is_tested(root: Path) -> None:
    names = {path.stem for path in (root / "examples").glob("*.py")}
    assert names == {
        "gymnasium_loop",
        "train_grpo",
        "custom_reward",
        "custom_agent",
        "demo",
        "bench_vs_trl",
        "bench_vs_generate",
        "bench_ablation",
        "ensemble_curve",
        "gallery",  # tests/test_suites.py
        "length_bias",
        "label_selection",
        "memory_table",
        "plot_scaling",
        "rlhf_and_rlaif",
        "openenv_server",  # tests/test_openenv.py
        "torchrl_ppo",  # tests/test_torchrl.py
        "trl_grpo",  # tests/test_trl.py
        "verifiers_rollout",  # tests/test_verifiers.py
    }


def test_scaling_is_drawn(example: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {"all": 3.0, "update": 2.0, "rollout": 1.0, "reference": 0.5}
    points = [{"axis": axis, "value": value, **parts} for axis in ("rows", "new tokens") for value in (8, 64)]
    (example / "record.json").write_text(json.dumps({"measured": points}))
    monkeypatch.setattr("sys.argv", ["plot_scaling.py", "record.json", "--out", "scaling.svg"])
    importlib.import_module("plot_scaling").main()
    drawn = (example / "scaling.svg").read_text()
    assert "microseconds a token" in drawn and "new tokens" in drawn and "rollout" in drawn


@pytest.mark.slow
def test_memory_table(root: Path) -> None:
    command = [sys.executable, "-W", "ignore", str(root / "examples" / "memory_table.py")]
    done = subprocess.run([*command, "--micro-batch-tokens", "2048"], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2 + 5 * 2  # five sizes, each trained whole and as a LoRA
    assert lines[2].startswith("| SmolLM2-135M | all | 2.3 |")


@pytest.mark.slow
def test_ablation(root: Path) -> None:
    command = [sys.executable, "-W", "ignore", str(root / "examples" / "bench_ablation.py"), "--turns", "1"]
    command += ["--prompts", "1", "--group", "2", "--prompt-tokens", "6", "--new-tokens", "3", "--iterations", "1"]
    done = subprocess.run(
        [*command, "--only", "each row computes its own prompt"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    assert json.loads(done.stdout)["completion_tokens_per_second"] > 0


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


def test_the_documented_critic_learns_values(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = [b for b in blocks(root, "docs/write-your-own-agent.md") if b.title == "my_critic.py"]
    (tmp_path / block.title).write_text(block.code)
    monkeypatch.syspath_prepend(str(tmp_path))
    critic = importlib.import_module("my_critic").ActorCritic
    agent = critic("CopyText-v0", seed=0, out=tmp_path / "run", learning_rate=1e-3)
    rollout = agent.collect()
    # What the page says: the rollout's are numbers, and those of the loss are the same with a gradient.
    now_BT, head = agent.policy.values(rollout), agent.policy.value_head.weight.detach().clone()
    assert now_BT.requires_grad and not rollout.value_BT.requires_grad
    assert torch.allclose(now_BT, rollout.value_BT, atol=1e-5, rtol=0)
    before = rollout.score_B.mean()
    agent.learn(total_timesteps=4_000, progress_bar=False, eval_every=0, eval_episodes=8)
    assert not torch.equal(agent.policy.value_head.weight, head)
    assert agent.collect().score_B.mean() > before + 0.2


@pytest.mark.slow
def test_custom_agent_reaches_the_known_optimum(example: Path) -> None:
    agent = importlib.import_module("custom_agent").Reinforce(
        "KnownOptimum-v0", seed=0, out="out", rollout_episodes=256, learning_rate=3e-3
    )
    before = known_optimum.distance(agent.policy, agent.policy.reference, agent.kl.coef)
    agent.learn(total_timesteps=30_000, progress_bar=False, eval_every=0, eval_episodes=8)
    assert before > 0.1
    assert known_optimum.distance(agent.policy, agent.policy.reference, agent.kl.coef) < 0.02


@pytest.mark.slow
def test_custom_agent_outside_the_package(root: Path, tmp_path: Path) -> None:
    """A user's file in a user's folder, by the command line, with its settings as flags and its own state saved."""
    source = (root / "examples" / "custom_agent.py").read_text()
    assert len(source.splitlines()) < 60
    assert source in (root / "docs" / "write-your-own-agent.md").read_text()
    (tmp_path / "my_agents.py").write_text(source)
    env = os.environ | {"PYTHONPATH": str(root)}

    def run(*args: str) -> str:
        command = [sys.executable, "-m", "textrl_gym", *args]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    small = ["--total-timesteps", "300", "--rollout-episodes", "16", "--eval-episodes", "8", "--decay", "0.5"]
    run("train", "my_agents:Reinforce", "CopyText-v0", *small, "--out", "runs/mine")
    state = json.loads((tmp_path / "runs" / "mine" / "agent.json").read_text())
    assert (state["agent"], state["config"]["decay"]) == ("my_agents:Reinforce", 0.5)
    assert state["extra_state"]["baseline"] != 0
    assert "KL to the reference" in run("evaluate", "runs/mine", "--episodes", "8", "--trust-code")


@pytest.mark.slow
def test_demo(example: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo = importlib.import_module("demo")
    for _ in range(2):  # the second finds all done
        demo.main(["--env", "CopyText-v0", "--tokens", "800", "--out", "runs/demo"])
        out = capsys.readouterr().out
        for said in ("grpo", "ppo", "best_of_n", "reference", "report: runs/demo/report.html"):
            assert said in out
        assert (example / "runs" / "demo" / "report.html").is_file()
    assert sorted(p.name for p in Path("runs/demo/runs").iterdir()) == [
        "best_of_n-0", "grpo-0", "grpo-1", "ppo-0", "ppo-1", "reference-0",
    ]  # fmt: skip


def test_bench_vs_trl(example: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Our side of it; TRL stands in for itself, since it is not installed here."""
    module = importlib.import_module("bench_vs_trl")
    small = ["grpo", "--prompts", "2", "--group", "2", "--prompt-tokens", "9", "--new-tokens", "4", "--iterations", "1"]
    monkeypatch.setattr("sys.argv", ["bench_vs_trl.py", *small])
    with pytest.raises(SystemExit):
        module.main()
    assert "--trl-python is needed" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["bench_vs_trl.py", *small, "--side", "ours"])
    module.main()
    ours = json.loads(capsys.readouterr().out)
    assert ours["tokens_per_second"] > 0
    half = {"tokens_per_second": ours["tokens_per_second"] / 2, "peak_bytes": 2 * ours["peak_bytes"] + 2}
    monkeypatch.setattr(module, "measure", lambda python, side, argv: ours if side == "ours" else half)
    monkeypatch.setattr("sys.argv", ["bench_vs_trl.py", *small, "--trl-python", "python"])
    module.main()
    assert "completion tokens/s: ours / TRL = 2.00 (2.00 to 2.00, 3 turns)" in capsys.readouterr().out


@pytest.mark.parametrize("spread", [[], ["--spread"]])
def test_bench_vs_generate(example: Path, spread: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--prompts", "2", "--group", "3", "--prompt-tokens", "9", "--new-tokens", "4", "--turns", "2"]
    importlib.import_module("bench_vs_generate").main([*small, *spread])
    assert "ours / generate = " in capsys.readouterr().out


@pytest.mark.slow
def test_length_bias(example: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = [
        "--prompts",
        "4",
        "--replaced-token-steps",
        "1",
        "--eval-prompts",
        "8",
        "--tokens",
        "1000",
        "--episodes",
        "8",
    ]
    module = importlib.import_module("length_bias")
    for _ in range(2):  # the second reads what the first has trained
        module.main([*small, "--out", "length"])
        out = capsys.readouterr().out
        for words in ("length preference", "0.4", "wins by gold", "controlled, length-loving"):
            assert words in out
    state = json.loads((example / "length" / "preference-0.4" / "grpo" / "agent.json").read_text())
    assert state["env"]["reward"] == "length/preference-0.4/reward"
    record = json.loads((example / "length" / "preference-0.4" / "reward" / "reward_training.json").read_text())
    assert record["config"]["annotators"]["length_preference"] == 0.4


def test_ensemble_curve(example: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = TLDRSummarize().reward_model_path
    settings = {"members": [own, own], "combine": "mean", "coefficient": 0.5}  # two that agree in everything
    Path("two").mkdir()
    Path("two", "ensemble.json").write_text(json.dumps(settings))
    importlib.import_module("ensemble_curve").main(["two", "--posts", "3", "--pool", "4", "--plot", "curve.html"])
    out = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out if line.startswith("│")]
    assert [row[0] for row in rows] == ["1", "2", "4"] * 2
    for row in rows[:3]:
        assert row[2] == row[4] == row[5] == row[6]  # a single one, the mean, the worst, and less no variance
        assert row[7] >= row[2]  # nothing selects better than gold
    assert rows[-1][1:] == ["+0.000 ± 0.000"] * 3
    assert "Plotly.newPlot" in Path("curve.html").read_text()


@pytest.mark.slow
def test_rlhf_and_rlaif(example: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--labels", "60", "--tokens", "600", "--episodes", "32", "--seeds", "2", "--epochs", "1", "--out", "both"]
    module = importlib.import_module("rlhf_and_rlaif")
    for _ in range(2):  # the second reads what the first has trained
        module.main(small)
        out = capsys.readouterr().out
        for words in ("60 labels, 2 seeds", "AI critic", "people who fear words", "the gold score itself"):
            assert words in out
    labels = {
        name: [json.loads(line) for line in Path("both", name, "0", "round-1", "labels.jsonl").read_text().splitlines()]
        for name in ("people", "AI-critic")
    }
    # The same questions; of the critic's labels each names the principle that decided.
    assert [row["item"] for row in labels["people"]] == [row["item"] for row in labels["AI-critic"]]
    assert all(row["comment"] for row in labels["AI-critic"]) and not any(row["comment"] for row in labels["people"])


def test_labels_that_selection_saves(example: Path) -> None:
    needed = importlib.import_module("label_selection").needed
    curve_L = np.array([0.5, 0.6, 0.8, 0.7])
    assert needed(curve_L, 0.7, 100) == pytest.approx(250.0)  # in the middle between 200 and 300 labels
    assert needed(curve_L, 0.4, 100) == 100.0 and np.isnan(needed(curve_L, 0.9, 100))


@pytest.mark.slow
def test_label_selection(example: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--pool", "120", "--step", "30", "--steps", "2", "--heldout", "64", "--epochs", "1", "--seeds", "1"]
    module = importlib.import_module("label_selection")
    module.main([*small, "--out", "selection"])
    out = capsys.readouterr().out
    assert "uncertainty: labels saved" in out and "disagreement: labels saved" in out
    begun = {json.loads(file.read_text())["accuracy"][0] for file in Path("selection").glob("*/0/accuracy.json")}
    assert len(begun) == 1  # all begin with the same labels
