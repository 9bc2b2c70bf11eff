"""What a run logs: keys and numbers of updates and evaluations, the writers, and experiment trackers."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from stable_baselines3.common.logger import KVWriter, Logger
from test_trunk import rollout

from textrl_gym import functional, registry
from textrl_gym.agents import DPO, GRPO, PPO
from textrl_gym.core import StopReason
from textrl_gym.training import logs, loop
from textrl_gym.training.agent import Agent
from textrl_gym.training.config import TrainOptions

QUIET: dict[str, Any] = {"progress_bar": False, "eval_every": 1, "eval_episodes": 8}


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "progress.json").read_text().splitlines()]


def tensorboard(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Key -> (step, value) of each point in TensorBoard's files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    events = EventAccumulator(str(folder)).Reload()
    return {key: [(e.step, e.value) for e in events.Scalars(key)] for key in events.Tags()["scalars"]}


# -- numbers ----------------------------------------------------------------------------------------------------------


def test_the_numbers_of_a_rollout_by_hand() -> None:
    r = rollout(torch.tensor([0, 0, 1, 1]))
    length_B = r.mask_BT.sum(1)
    r.logp_BT = -0.5 * r.mask_BT
    r.score_B = torch.tensor([1.0, 1.0, 0.0, 2.0])  # the first group is flat
    r.stop_B = torch.tensor([StopReason.EOS, StopReason.LENGTH, StopReason.STOP_STRING, StopReason.LENGTH])
    r.components = {"rouge": torch.tensor([0.0, 1.0, 0.0, 1.0]), "some": torch.tensor([3.0, math.nan, 5.0, math.nan])}
    numbers = logs.rollout_metrics(r)
    assert numbers["rollout/completion_tokens_max"] == length_B.max()
    assert numbers["rollout/completion_tokens"] == length_B.float().mean()
    assert (numbers["rollout/eos_share"], numbers["rollout/ended_share"]) == (0.25, 0.5)
    assert numbers["rollout/flat_groups"] == 0.5
    assert numbers["rollout/entropy_token"] == pytest.approx(0.5) == -numbers["rollout/logprob_token"]
    assert numbers["reward/rouge"] == 0.5
    assert numbers["reward_std/rouge"] == pytest.approx(math.sqrt(1 / 3))  # four numbers at 0.5 from their mean, n - 1
    assert numbers["reward/some"] == 4 and numbers["reward_std/some"] == pytest.approx(math.sqrt(2))
    given = logs.rollout_metrics(rollout(torch.arange(4)), sampled=False)
    assert "rollout/entropy_token" not in given and "rollout/flat_groups" not in given  # groups of one row


def test_approximate_kl_by_hand_and_without_gradient() -> None:
    logp_BT, old_BT = torch.tensor([[0.0, -1.0]], requires_grad=True), torch.tensor([[0.0, -2.0]])
    found_BT = functional.approx_kl(logp_BT, old_BT)
    # e^1 - 1 - 1 = 0.71828
    torch.testing.assert_close(found_BT, torch.tensor([[0.0, math.e - 2]]), atol=1e-6, rtol=0)
    assert not found_BT.requires_grad


def test_seconds_of_phases_add_up_and_begin_anew() -> None:
    seconds = logs.PhaseSeconds()
    for _ in range(2):
        with seconds("collect"), seconds("rollout"):
            pass
    first = seconds.take()
    assert set(first) == {"collect", "rollout"} and first["collect"] >= first["rollout"] >= 0
    assert seconds.take() == {}
    speed = logs.speed_metrics({"collect": 1.5, "update": 0.5, "evaluate": 9.0}, tokens=100)
    assert speed == {"seconds/collect": 1.5, "seconds/update": 0.5, "time/tokens_per_second": 50.0}


EVERYWHERE = {
    "rollout/score",
    "rollout/score_std",
    "rollout/completion_tokens",
    "rollout/completion_tokens_max",
    "rollout/ended_share",
    "rollout/kl_token",
    "train/learning_rate",
    "time/tokens_per_second",
    "seconds/collect",
    "seconds/update",
}
RATIO = {"train/ratio", "train/clip_fraction", "train/approx_kl_token"}
OWN: dict[str, set[str]] = {
    **dict.fromkeys(("grpo", "dr_grpo", "dapo", "gspo", "cispo"), RATIO | {"rollout/flat_groups", "train/grad_norm"}),
    "ppo": RATIO | {"train/explained_variance", "train/grad_norm"},
    "dpo": {"train/accuracy", "train/reward_margin", "train/grad_norm"},
    "sb3_ppo": {"train/approx_kl", "train/clip_fraction", "train/explained_variance", "train/entropy_loss"},
}
TRAINED = [cls for cls in map(registry.load_agent_class, registry.names("agents")) if cls.trains]


@pytest.mark.parametrize("cls", TRAINED)
def test_every_agent_logs_what_people_look_for(cls: type[Agent], tmp_path: Path) -> None:
    agent = cls("CopyText-v0", rollout_episodes=8, out=tmp_path)
    agent.learn(1, **{**QUIET, "eval_every": 0})
    (row,) = rows_of(tmp_path)
    name = next(name for name in registry.names("agents") if registry.load_agent_class(name) is cls)
    expected = EVERYWHERE | OWN.get(name, set()) | (set() if cls.is_offline else {"rollout/entropy_token"})
    assert expected <= set(row), expected - set(row)
    assert all(math.isfinite(value) for value in row.values())


# -- writers ----------------------------------------------------------------------------------------------------------


def test_evaluations_are_in_tensorboard_and_not_among_the_updates(tmp_path: Path) -> None:
    agent = GRPO("CopyText-v0", rollout_episodes=8, out=tmp_path).learn(60, **QUIET)
    shown = tensorboard(tmp_path)
    evaluations = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert len(evaluations) > 2
    for key in ("score", "kl_sequence", "entropy_token"):
        rows = [row for row in evaluations if key in row]
        assert [step for step, _ in shown[f"eval/{key}"]] == [row["timesteps"] for row in rows]
        assert [value for _, value in shown[f"eval/{key}"]] == pytest.approx([row[key] for row in rows], rel=1e-5)
    assert len(shown["rollout/score"]) == agent.num_updates == len(rows_of(tmp_path))
    assert not [key for row in rows_of(tmp_path) for key in row if key.startswith("eval/")]


def test_dpo_tells_accuracy_and_margin_of_held_out_pairs(tmp_path: Path) -> None:
    agent = DPO("CopyText-v0", rollout_episodes=16, learning_rate=3e-3, out=tmp_path)
    agent.learn(1500, **{**QUIET, "eval_every": 0})
    first, last = (json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines())
    # At the reference all implicit rewards are 0: every pair is a tie.
    assert first["pair_accuracy"] == pytest.approx(0.5) and first["pair_margin"] == pytest.approx(0, abs=1e-5)
    assert last["pair_accuracy"] > 0.7 and last["pair_margin"] > 0.05


def test_held_out_pairs_of_a_file_are_those_of_its_validation_part(tmp_path: Path) -> None:
    rows = [{"prompt": p, "chosen": f" {p}", "rejected": " d d d"} for p in ("a b", "b c", "c a", "b a") for _ in "xyz"]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    agent = DPO("CopyText-v0", pairs=str(tmp_path / "pairs.jsonl"), out=tmp_path / "run")
    assert agent.extra_metrics([]) == {"pair_accuracy": 0.5, "pair_margin": 0.0}
    assert agent._held_out is not None
    trained = {tuple(prompt) for prompt, *_ in agent.pairs}
    held_out = {
        tuple(ids[mask].tolist())
        for ids, mask in zip(agent._held_out.prompt_BP, agent._held_out.prompt_mask_BP, strict=True)
    }
    assert held_out and not held_out & trained


def test_the_bar_shows_what_the_agent_names(tmp_path: Path) -> None:
    run: Any = loop._Run.__new__(loop._Run)
    run.evaluated = {"eval/pair_accuracy": 0.75, "eval/pair_margin": 0.5}
    run.agent = DPO("CopyText-v0", rollout_episodes=16, out=tmp_path)
    facts = {"rollout/score": 0.1, "rollout/kl_sequence": 2.0, "train/accuracy": 0.5, "train/reward_margin": 0.25}
    assert run._note(facts) == "accuracy 0.50  margin 0.25  held-out 0.75  margin 0.50"
    run.agent = PPO("CopyText-v0", rollout_episodes=16, out=tmp_path)
    assert run._note(facts) == "score 0.100  KL 2.00 nats/seq"


# -- trackers ---------------------------------------------------------------------------------------------------------


class FakeRun:
    def __init__(self, given: dict[str, Any]) -> None:
        self.given, self.finished = given, 0
        self.logged: list[dict[str, float]] = []
        self.defined: list[tuple[str, str]] = []

    def define_metric(self, name: str, step_metric: str) -> None:
        self.defined.append((name, step_metric))

    def log(self, numbers: dict[str, float], step: int | None = None) -> None:
        self.logged.append(numbers)

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> list[FakeRun]:
    """A stand-in for the package; the runs that were begun in it."""
    runs: list[FakeRun] = []

    def init(**given: Any) -> FakeRun:
        runs.append(FakeRun(given))
        return runs[-1]

    module: Any = ModuleType("wandb")
    module.init, module.__spec__ = init, SimpleNamespace()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return runs


def test_a_tracker_gets_updates_evaluations_and_settings_and_its_run_goes_on(
    wandb: list[FakeRun], tmp_path: Path
) -> None:
    agent = GRPO("CopyText-v0", rollout_episodes=8, seed=3, out=tmp_path / "mine")
    agent.learn(60, log_to="wandb", **QUIET)
    (run,) = wandb
    assert run.given["name"] == "mine" and run.given["config"]["agent"] == "GRPO" and run.given["config"]["seed"] == 3
    assert run.defined == [("*", "time/total_timesteps")] and run.finished == 1
    updates = [numbers for numbers in run.logged if "train/loss" in numbers]
    assert [numbers["time/total_timesteps"] for numbers in updates] == [
        row["time/total_timesteps"] for row in rows_of(tmp_path / "mine")
    ]
    assert sum("eval/score" in numbers for numbers in run.logged) == agent.num_updates + 1
    again = GRPO.load(tmp_path / "mine", out=tmp_path / "mine")
    again.learn(30, reset_num_timesteps=False, log_to="wandb", **QUIET)
    assert wandb[1].given["id"] == run.given["id"] and wandb[1].given["resume"] == "allow"
    GRPO("CopyText-v0", rollout_episodes=8, out=tmp_path / "other").learn(1, log_to="wandb", **QUIET)
    assert wandb[2].given["id"] != run.given["id"]


def test_a_logger_of_the_users_own_keeps_its_writers(wandb: list[FakeRun], tmp_path: Path) -> None:
    written: list[str] = []

    class Mine(KVWriter):
        def write(self, key_values: dict[str, Any], key_excluded: dict[str, Any], step: int = 0) -> None:
            written.extend(key_values)

        def close(self) -> None:
            pass

    agent = GRPO("CopyText-v0", rollout_episodes=8, out=tmp_path)
    agent.set_logger(Logger(None, [Mine()]))
    agent.learn(1, log_to="wandb", **QUIET)
    assert "rollout/score" in written and wandb[0].logged


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_a_package_that_is_not_there_is_told_before_work(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=rf"log_to='{name}' needs .*pip install '{name}"):
        TrainOptions(log_to=name)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
@pytest.mark.filterwarnings("default")
def test_the_real_trackers_take_a_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network: W&B offline, trackio and MLflow in a folder."""
    pytest.importorskip(name, reason=f"the extra {name} is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # mlflow-skinny has no other without a server
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    agent = GRPO("CopyText-v0", rollout_episodes=8, out=tmp_path / "run")
    agent.learn(60, log_to=name, **QUIET)
    known = json.loads((tmp_path / "run" / logs.ID_FILE).read_text())[name]
    if name == "mlflow":
        import mlflow

        history = mlflow.MlflowClient().get_metric_history(known, "rollout/score")
        assert [point.step for point in history] == [row["time/total_timesteps"] for row in rows_of(tmp_path / "run")]
    elif name == "wandb":
        assert [*(tmp_path / "run" / "wandb").glob(f"offline-run-*-{known}")]
    again = GRPO.load(tmp_path / "run", out=tmp_path / "run")
    again.learn(30, reset_num_timesteps=False, log_to=name, **QUIET)
