"""Ends of a run: by a signal, an error or a kill. What was trained is kept, and the same command goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
from torch import Tensor

from textrl_gym import files, processes, registry
from textrl_gym.agents import DPO, GRPO, PPO, SB3PPO, Reinforce
from textrl_gym.cli import main
from textrl_gym.core import Rollout
from textrl_gym.persistence.signals import Terminated, hearing_signals
from textrl_gym.registry import load_agent
from textrl_gym.training import checkpoint, loop, run_folder
from textrl_gym.training.agent import Agent
from textrl_gym.training.config import TrainOptions
from textrl_gym.training.run_folder import read_evaluations, read_run

QUIET: dict[str, Any] = {"progress_bar": False, "eval_every": 0, "eval_episodes": 4, "show_samples": 0}
TINY = ["--rollout-episodes", "16", "--eval-episodes", "4", "--show-samples", "0", "--device", "cpu"]


def weights(agent: Agent) -> Tensor:
    return torch.cat([p.detach().flatten() for p in agent.policy.parameters()])


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def logged_updates(folder: Path) -> list[int]:
    return [row["train/updates"] for row in run_folder.read_rollouts(folder)]


class AtUpdate:
    """A callback that calls `do` after the rollout of an update."""

    def __init__(self, number: int, do: Any) -> None:
        self.calls, self.number, self.do = 0, number, do

    def __call__(self, *_: object) -> bool:
        self.calls += 1
        if self.calls == self.number:
            self.do()
        return True


def fail() -> None:
    raise ConnectionError("the scoring service is away")


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [GRPO, SB3PPO])
def test_an_error_leaves_the_last_whole_update(cls: type[Agent], tmp_path: Path) -> None:
    agent = cls("CopyText-v0", seed=3, rollout_episodes=16, out=tmp_path)
    with pytest.raises(ConnectionError):
        agent.learn(10_000, callback=AtUpdate(4, fail), **QUIET)
    again = load_agent(tmp_path)
    assert again.num_updates == agent.num_updates == 3
    assert torch.equal(weights(again), weights(agent))
    assert not again.finished


@pytest.mark.parametrize(
    ("cls", "step"), [pytest.param(PPO, 10, marks=pytest.mark.slow), (Reinforce, 3), (DPO, 3), (PPO, 2)]
)
def test_an_update_that_breaks_off_in_its_middle_is_undone(cls: type[Agent], step: int, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"seed": 3, "rollout_episodes": 16, "out": tmp_path / "parted"}
    settings |= {"minibatches": 2, "epochs": 2} if cls is PPO else {"num_pairs": 32} if cls is DPO else {}
    parted = cls("CopyText-v0", **settings)
    calls = 0

    def out_of_memory(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == step:
            raise torch.OutOfMemoryError("no memory left")

    hook = parted.optimizer.register_step_pre_hook(out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        parted.learn(900, **QUIET)
    # 10 steps of 4 an update: two whole ones and one step; 2 steps: none. 3 steps of 1 an update: two whole ones.
    assert parted.num_updates == {10: 2, 3: 2, 2: 0}[step]
    hook.remove()
    again = load_agent(tmp_path / "parted", out=tmp_path / "parted")
    assert again.num_updates == parted.num_updates
    again.learn(900 - again.num_timesteps, reset_num_timesteps=False, **QUIET)
    whole = cls("CopyText-v0", **settings | {"out": tmp_path / "whole"}).learn(900, **QUIET)
    assert torch.equal(weights(again), weights(whole))
    # The broken agent itself stands where its checkpoint does, too.
    parted.learn(900 - parted.num_timesteps, reset_num_timesteps=False, **QUIET)
    assert torch.equal(weights(parted), weights(whole))


@pytest.mark.slow
def test_a_sentinel_reward_keeps_the_last_good_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "my_sentinel.py").write_text(
        "calls = 0\n"
        "def reward(completions, **columns):\n"
        "    global calls\n"
        "    calls += len(completions) == 16\n"
        "    return [-3.4e38 if calls >= 4 and row == 0 else float(len(set(text))) "
        "for row, text in enumerate(completions)]\n"
    )
    process = subprocess.run(
        [sys.executable, "-m", "textrl_gym", "train", "ppo", "CopyText-v0", *TINY, "--total-timesteps", "3000",
         "--env.reward", "my_sentinel:reward", "--out", "run"],
        cwd=tmp_path, env=os.environ, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 2
    assert "update 4: the loss is" in process.stderr
    assert "saved the checkpoint of update 3" in process.stderr
    sys.path.insert(0, str(tmp_path))
    try:
        agent = load_agent(tmp_path / "run", trust_code=True)
    finally:
        sys.path.remove(str(tmp_path))
    assert agent.num_updates == 3
    assert weights(agent).isfinite().all()


def test_a_disk_that_is_full_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    agent = GRPO("CopyText-v0", seed=0, rollout_episodes=16, out=tmp_path)
    fill = checkpoint._fill

    def full(agent: Any, *arguments: Any) -> None:
        fill(agent, *arguments)
        if agent.num_updates >= 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_fill", full)
    with pytest.raises(OSError, match="No space left"):
        agent.learn(10_000, save_every=1, **QUIET | {"progress_bar": True})
    assert files.read_state(tmp_path)["num_updates"] == 2
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".new")] == []
    err = "".join(capsys.readouterr().err.split())
    assert "thecheckpointofupdate3couldnotbesaved" in err


def test_a_folder_that_cannot_be_written_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        agent = GRPO("CopyText-v0", seed=0, rollout_episodes=16, out=out)
        with pytest.raises(ValueError, match="cannot be written"):
            agent.learn(10_000, **QUIET)
        assert agent.num_timesteps == 0


def test_what_cannot_be_saved_is_found_out_before_the_first_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = GRPO("CopyText-v0", seed=0, rollout_episodes=16, out=tmp_path)

    def broken(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(checkpoint, "_fill", broken)
    with pytest.raises(OSError, match="not supported"):
        agent.learn(10_000, **QUIET)
    assert agent.num_timesteps == 0


# -- signals and kills ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGHUP, 129, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_the_same_command_goes_on(
    number: signal.Signals, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    args = ["train", "grpo", "CopyText-v0", *TINY, "--total-timesteps", "6000", "--out", str(out), "--eval-every", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "textrl_gym", *args], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    while not (out / "progress.json").is_file() or (out / "progress.json").stat().st_size == 0:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    stopped = files.read_state(out)
    assert stopped["num_updates"] >= 1
    assert not stopped["finished"], "it was over before the signal came"
    assert main.main(args) == 0
    state = files.read_state(out)
    assert state["finished"]
    assert state["total_timesteps"] == 6000
    assert state["num_updates"] > stopped["num_updates"]
    updates = logged_updates(out)
    assert updates == list(range(1, state["num_updates"] + 1))
    # Once more: there is nothing left to do. Another setting is another run.
    capsys.readouterr()
    assert main.main(args) == 0
    assert "is finished" in capsys.readouterr().out
    assert main.main([*args, "--seed", "1"]) == 2
    assert "holds a run already, with seed=0, not 1" in capsys.readouterr().err


def test_a_signal_that_comes_while_processes_tell_each_other_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it stop this process alone, which would leave the others waiting."""

    def most(number: int) -> int:
        signal.raise_signal(signal.SIGTERM)  # after this process has given its number
        return number

    with hearing_signals() as stop:
        with monkeypatch.context() as patch:
            patch.setattr(processes, "most", most)
            stop.check()
        assert stop.number == signal.SIGTERM
        with pytest.raises(Terminated):
            stop.check()


def test_a_signal_is_heard_in_python(tmp_path: Path) -> None:
    agent = GRPO("CopyText-v0", seed=0, rollout_episodes=16, out=tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated, match="SIGTERM"):
        agent.learn(10_000, callback=AtUpdate(3, lambda: signal.raise_signal(signal.SIGTERM)), **QUIET)
    assert files.read_state(tmp_path)["num_updates"] == 2
    assert signal.getsignal(signal.SIGTERM) is before


def test_checkpoints_come_by_time(tmp_path: Path) -> None:
    saved: list[int] = []

    def look(*_: object) -> bool:
        saved.append(files.read_state(tmp_path / name)["num_updates"])
        return True

    for name, minutes in (("often", 1e-9), ("never", 0.0), ("later", 5.0)):
        agent = GRPO("CopyText-v0", seed=0, rollout_episodes=16, out=tmp_path / name)
        agent.learn(200, callback=look, save_every_minutes=minutes, **QUIET)
        assert files.read_state(tmp_path / name)["num_updates"] == agent.num_updates
    done = agent.num_updates
    assert done >= 3
    # At the rollout of update n: the checkpoint of update n - 1, or that of the start.
    assert saved == [*range(done), *[0] * done, *[0] * done]
    with pytest.raises(ValueError, match="save_every_minutes must be a finite number, got nan"):
        TrainOptions(save_every_minutes=float("nan"))


def test_each_tenth_of_a_short_run_has_an_evaluation_which_changes_no_weight(tmp_path: Path) -> None:
    runs = {}
    for every in (0, 20):
        agent = runs[every] = GRPO("CopyText-v0", seed=0, rollout_episodes=16, out=tmp_path / str(every))
        agent.learn(500, **QUIET | {"eval_every": every})
    assert 10 < runs[20].num_updates < 20  # so that none is due by the number of updates
    after = [row["timesteps"] for row in rows(tmp_path / "20" / "evaluations.jsonl")]
    assert [min(10 * timesteps // 500, 10) for timesteps in after] == list(range(11))
    assert [row["updates"] for row in rows(tmp_path / "0" / "evaluations.jsonl")] == [0, runs[0].num_updates]
    assert torch.equal(weights(runs[0]), weights(runs[20]))


@pytest.mark.parametrize("every", [2, 1000])  # 1000: each tenth of the run
def test_a_killed_run_that_goes_on_has_the_logs_of_one_that_was_not(every: int, tmp_path: Path) -> None:
    options = QUIET | {"eval_every": every, "save_every": 4}
    agent = GRPO("CopyText-v0", seed=0, rollout_episodes=16, out=tmp_path / "whole")

    def kill() -> None:
        agent.logger.output_formats[0].file.flush()  # type: ignore[attr-defined] # SB3's JSON writer
        shutil.copytree(tmp_path / "whole", tmp_path / "killed")

    agent.learn(500, callback=AtUpdate(8, kill), **options)
    killed = tmp_path / "killed"
    assert files.read_state(killed)["num_updates"] == 4
    assert logged_updates(killed) == list(range(1, 8))
    for name in ("evaluations.jsonl", "samples.jsonl", "progress.json"):  # and the last lines are torn
        (killed / name).write_bytes((killed / name).read_bytes()[:-9])
    read_run(killed)
    again = load_agent(killed, out=killed)
    again.learn(500 - again.num_timesteps, reset_num_timesteps=False, **options)
    assert torch.equal(weights(again), weights(agent))
    assert logged_updates(killed) == logged_updates(tmp_path / "whole") == list(range(1, agent.num_updates + 1))
    timed = {"train_seconds"}
    whole_rows, killed_rows = (
        [{k: v for k, v in row.items() if k not in timed} for row in rows(folder / "evaluations.jsonl")]
        for folder in (tmp_path / "whole", killed)
    )
    assert killed_rows == whole_rows
    assert rows(killed / "samples.jsonl") == rows(tmp_path / "whole" / "samples.jsonl")


@pytest.mark.parametrize("every", [1, 1000])
def test_an_evaluation_that_a_stop_left_out_is_made_up_for(
    every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = QUIET | {"eval_every": every}
    whole, half = tmp_path / "whole", tmp_path / "half"
    GRPO("CopyText-v0", seed=0, rollout_episodes=16, out=whole).learn(500, **options)
    updates = [row["updates"] for row in rows(whole / "evaluations.jsonl")]
    left_out = updates[3]
    with monkeypatch.context() as patch:
        plain = loop._Run._evaluate

        def stopped(run: Any, greedy: bool = False) -> bool:
            if run.agent.num_updates == left_out:
                raise KeyboardInterrupt
            return plain(run, greedy)

        patch.setattr(loop._Run, "_evaluate", stopped)
        with pytest.raises(KeyboardInterrupt):
            GRPO("CopyText-v0", seed=0, rollout_episodes=16, out=half).learn(500, **options)
    again = load_agent(half, out=half)
    assert again.num_updates == left_out
    again.learn(500 - again.num_timesteps, reset_num_timesteps=False, **options)
    assert [row["updates"] for row in rows(half / "evaluations.jsonl")] == updates


@pytest.mark.parametrize("goes_on_by", ["resume", "command"])
def test_a_run_stopped_before_its_last_evaluation_is_finished(
    goes_on_by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    args = ["train", "grpo", "CopyText-v0", *TINY, "--total-timesteps", "200", "--out", str(out)]

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop._Run, "_evaluate_at_end", stopped)
        assert main.main(args) == 130
    state = files.read_state(out)
    assert state["rng_state"]["num_timesteps"] >= state["total_timesteps"] == 200
    assert state["num_updates"] not in [row["updates"] for row in rows(out / "evaluations.jsonl")]
    assert main.main(["train", "--resume", str(out)] if goes_on_by == "resume" else args) == 0
    last = rows(out / "evaluations.jsonl")[-1]
    assert last["updates"] == state["num_updates"]
    assert "score_greedy" in last
    after = files.read_state(out)
    assert (after["total_timesteps"], after["num_updates"], after["finished"]) == (200, state["num_updates"], True)


def test_a_run_killed_before_its_first_checkpoint_begins_anew(tmp_path: Path) -> None:
    out = tmp_path / "run"
    args = ["train", "grpo", "CopyText-v0", *TINY, "--total-timesteps", "200", "--out", str(out)]
    assert main.main(args) == 0
    whole = load_agent(out)
    for how in (args, ["train", "--resume", str(out)]):
        for name in ("agent.json", "checkpoint.json"):
            (out / name).unlink()
        shutil.rmtree(out / "model")
        shutil.rmtree(out / files.PREVIOUS)
        assert main.main(how) == 0
        assert torch.equal(weights(load_agent(out)), weights(whole))
        # Fewer than ten updates: one after each.
        assert [row["updates"] for row in rows(out / "evaluations.jsonl")] == list(range(whole.num_updates + 1))
        assert logged_updates(out) == list(range(1, whole.num_updates + 1))


def test_a_folder_in_which_nothing_was_trained_is_free(tmp_path: Path) -> None:
    out = tmp_path / "run"
    args = ["train", "grpo", "CopyText-v0", *TINY, "--total-timesteps", "200", "--out", str(out)]
    # No completion has it, so that no group has a spread: the health card stops the run.
    assert main.main([*args, "--env.reward", "regex:zzz"]) == 1
    assert main.main(args) == 0
    assert files.read_state(out)["finished"]
    assert [row["updates"] for row in rows(out / "evaluations.jsonl")][:1] == [0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is no JSON"),
        ("[]", "must hold an object, not list"),
        ('{"options": 3}', "'options' must be a dict, got 3"),
        ('{"options": {"eval_evry": 3}}', "eval_evry"),
        ('{"options": {"eval_every": -3}}', "eval_every must be at least 0"),
        ('{"options": {}, "settings": {"config": 1}}', "'config' in 'settings' must be a dict"),
    ],
)
def test_a_malformed_record_is_named(text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    GRPO("CopyText-v0", seed=0, rollout_episodes=16).save(tmp_path)
    (tmp_path / "run.json").write_text(text)
    assert main.main(["train", "--resume", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert str(tmp_path / "run.json") in err


# -- two in one folder ------------------------------------------------------------------------------------------------


def test_only_one_trains_in_a_folder(tmp_path: Path) -> None:
    agent = GRPO("CopyText-v0", seed=0, rollout_episodes=16, out=tmp_path)
    other = PPO("CopyText-v0", seed=0, rollout_episodes=16, out=tmp_path)

    def at_once() -> None:
        with pytest.raises(ValueError, match="another process or agent trains in"):
            other.learn(200, **QUIET)

    agent.learn(200, callback=AtUpdate(2, at_once), **QUIET)
    logged = (tmp_path / "evaluations.jsonl").read_text()
    with pytest.raises(ValueError, match="holds a run already"):
        other.learn(200, **QUIET)
    assert (tmp_path / "evaluations.jsonl").read_text() == logged
    assert other.num_timesteps == 0


@pytest.mark.parametrize("returned", [None, 0.5])
def test_an_update_without_metrics_is_told(tmp_path: Path, returned: Any) -> None:
    class Forgets(Agent):
        def update(self, rollout: Rollout) -> Any:
            return returned

    agent = Forgets("CopyText-v0", seed=0, rollout_episodes=16, out=tmp_path)
    words = rf"^update\(rollout\) of Forgets must return a mapping of numbers, got {returned}"
    with pytest.raises(TypeError, match=words):
        agent.learn(200, **QUIET)


def test_runs_of_the_same_second_have_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("textrl_gym.training.loop.time.strftime", lambda form: "20261201-120000")
    agents = [GRPO("CopyText-v0", learning_rate=rate, seed=0, rollout_episodes=16) for rate in (1e-3, 1e-4)]
    for agent in agents:
        agent.learn(100, **QUIET)
    first, second = (agent.out for agent in agents)
    assert first is not None and first == Path("runs/GRPO-CopyText-seed0-20261201-120000")
    assert second == Path(f"{first}-2")
    # A folder that another process has made, and has written nothing into, is not taken either.
    assert loop._new_folder(agents[0]) == Path(f"{first}-3") and Path(f"{first}-3").is_dir()


def test_the_end_is_what_the_last_learn_came_to(tmp_path: Path) -> None:
    agent = GRPO("CopyText-v0", seed=0, rollout_episodes=16, out=tmp_path)
    agent.learn(400, **QUIET)
    first = agent.num_updates
    agent.learn(200, **QUIET)  # the second one is shorter, so that its timesteps are the smaller number
    written = rows(tmp_path / "evaluations.jsonl")
    assert [row["updates"] for row in written] == [0, first, agent.num_updates]
    assert written[2]["timesteps"] < written[1]["timesteps"]
    run = read_run(tmp_path)
    assert run.end == written[-1]
    last = read_evaluations(tmp_path)[-1]
    assert len(last.samples) == 4
    assert all(sample["updates"] == agent.num_updates for sample in last.samples)


# -- what is loaded ---------------------------------------------------------------------------------------------------


def test_the_environment_of_a_loaded_agent_measures_to_its_reference(tmp_path: Path) -> None:
    env = gym.make_vec("CopyText-v0", num_envs=16, group_size=8, kl_coef=0.1, array="torch", autoreset_mode="Disabled")
    agent = GRPO(env, seed=0, learning_rate=0.05, out=tmp_path)
    start = [p.detach().clone() for p in agent.policy.model.parameters()]
    agent.learn(300, **QUIET)
    for loaded in (agent, GRPO.load(tmp_path)):
        reference = loaded.env.reference
        assert reference is not None
        assert all(torch.equal(a, b) for a, b in zip(start, reference.model.parameters(), strict=True))
        # The KL that stepping tells is that of the actions: log pi - log pi_ref, and not 0.
        observation, _ = loaded.env.reset(seed=0)
        action_B, logp_B = loaded.policy.act(observation, generator=loaded.generator)
        ref_logp_BV = reference.next_logprobs(observation["input_ids"], observation["attention_mask"])
        *_, infos = loaded.env.step({"token": action_B, "logprob": logp_B})
        expected_B = logp_B - ref_logp_BV.gather(1, action_B[:, None])[:, 0]
        assert expected_B.abs().max() > 0.1
        torch.testing.assert_close(torch.as_tensor(infos["kl"]).float(), expected_B, atol=1e-4, rtol=0)


def test_every_agent_says_whether_it_is_finished(tmp_path: Path) -> None:
    agent = registry.load_agent_class("best_of_n")("CopyText-v0", n=2, rollout_episodes=4, out=tmp_path)
    agent.learn(0, **QUIET)
    assert run_folder.holds_run(tmp_path)  # nothing was trained, but its evaluation is a result
