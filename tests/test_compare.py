"""compare: every run once, in its own process; failures alone; killed and started again, the same table."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium
import pandas as pd
import pytest

from textrl_gym import registry
from textrl_gym.cli.main import main
from textrl_gym.experiments.compare import CompareConfig, compare, prepare, print_finals
from textrl_gym.experiments.reproduce import Reproduction
from textrl_gym.experiments.results import CREDIT, EPISODES, FLOPS, LOG, MACHINE, RESULT, SPEC, tidy
from textrl_gym.mdp.env_settings import EnvSettings
from textrl_gym.mdp.task import Task
from textrl_gym.registry import load_agent
from textrl_gym.training import run_folder

ENV = "CopyText-v0"
SMALL = CompareConfig(
    ("reinforce", "grpo"), seeds=2, total_timesteps=400, eval_episodes=8, eval_every=2, save_every=1, device="cpu",
    set=("reinforce.rollout_episodes=16", "grpo.rollout_episodes=16"),
)  # fmt: skip


def numbers(out: Path) -> dict[str, Any]:
    """The tidy table without its times, for comparing."""
    table = tidy(out).drop(columns=["train_seconds"])
    return {"rows": table.round(9).astype(str).to_dict("records")}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compare") / "done"
    table = compare(ENV, SMALL, out, progress_bar=False)
    assert len(table[table["final"]]) == 4
    return out


def test_a_run_comes_out_the_same_again(done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = done / "runs" / "reinforce-0"
    machine = json.loads((run / MACHINE).read_text())
    assert machine["threads"] >= 1 and "torch" in machine
    assert main(["reproduce", str(run), "--out", str(tmp_path / "again")]) == 0
    assert "The same: all" in capsys.readouterr().out
    assert main(["reproduce", str(done)]) == 2
    assert "holds no finished run of a comparison" in capsys.readouterr().err


def test_a_run_that_comes_out_otherwise_says_what_differs() -> None:
    again = Reproduction(
        {"score": 1.0, "kl": 0.5, "train_seconds": 3}, {"score": 1.5, "kl": 0.5, "train_seconds": 4}, {}, {}
    )
    assert again.differences == {"score": (1.0, 1.5)}
    assert again.words() == (
        "1 of 2 numbers of the last evaluation differ. score: 1.0, now 1.5. Machine and versions are the same as far "
        "as they were written down."
    )
    other = dataclasses.replace(
        again, machine_before={"threads": 1, "torch": "2"}, machine_again={"threads": 2, "torch": "2"}
    )
    assert "So does the machine, which rounds sums in its own way: threads 1, now 2." in other.words()


def test_the_table_has_a_row_an_evaluation(done: Path) -> None:
    table = tidy(done)
    assert set(table["agent"]) == {"reinforce", "grpo"} and set(table["seed"]) == {0, 1}
    for _, rows in table.groupby("run"):
        assert rows["timesteps"].iloc[0] == 0 and not rows["final"].iloc[:-1].any() and rows["final"].iloc[-1]
        assert rows["timesteps"].iloc[-1] >= 400
    start = table[table["timesteps"] == 0]
    assert start["score"].nunique() == 1  # one start, the same prompts and the same random numbers for all
    assert table[table["final"]]["score"].nunique() > 1
    assert (done / "results.csv").is_file() and (done / "results.parquet").is_file()
    episodes = [json.loads(line) for line in (done / "runs" / "grpo-0" / EPISODES).read_text().splitlines()]
    assert len(episodes) == 8
    # The start's answers are beside the agent's: the win rate is the share of prompts on which these are better.
    ahead = [(e["score"] > e["start"]["score"]) + 0.5 * (e["score"] == e["start"]["score"]) for e in episodes]
    last = table[table["final"] & (table["run"] == "grpo-0")].iloc[0]
    assert sum(ahead) / 8 == last["win_rate"]
    assert sum(e["tokens"] for e in episodes) / 8 == last["completion_tokens"]


def test_credit_is_of_the_same_texts_and_the_work_is_counted(done: Path) -> None:
    told = {}
    for agent in ("reinforce", "grpo"):
        run = done / "runs" / f"{agent}-0"
        told[agent] = [json.loads(line) for line in (run / CREDIT).read_text().splitlines()]
        counted = json.loads((run / FLOPS).read_text())
        first = json.loads((run / "progress.json").read_text().splitlines()[0])
        assert counted["tokens"] == first["time/total_timesteps"]
        # Forward passes of sampling, reference and update and a backward pass: 2 + 2 + 2 + 4 for each weight of a
        # matrix and place. Places are the tokens and less than as many of prompts; attention adds to it.
        model = load_agent(run, device="cpu").policy.model
        weights = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "transformer.h" in name)
        assert 10 * 0.6 < counted["flop"] / counted["tokens"] / weights < 10 * 3
    assert [line["tokens"] for line in told["grpo"]] == [line["tokens"] for line in told["reinforce"]]
    assert len(told["grpo"]) == 12
    assert all(len(set(line["advantage"])) == 1 for line in told["grpo"])  # one number for a whole completion
    assert any(len(set(line["advantage"])) > 1 for line in told["reinforce"])  # the KL still to come


def test_what_is_finished_is_not_run_again(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = numbers(done)
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: pytest.fail("a finished run was started"))
    compare(ENV, SMALL, done, progress_bar=False)
    assert numbers(done) == before


def test_another_comparison_in_the_folder_is_refused(done: Path) -> None:
    other = dataclasses.replace(SMALL, total_timesteps=500)
    with pytest.raises(ValueError, match=r"holds the run reinforce-0 with total_timesteps=400, not 500"):
        prepare(done, ENV, other)
    more = dataclasses.replace(SMALL, seeds=3)
    assert len(prepare(done, ENV, more)) == 6  # more runs are welcome
    for name in ("reinforce-2", "grpo-2"):
        (done / "runs" / name / SPEC).unlink()
        (done / "runs" / name).rmdir()


BROKEN = """
from textrl_gym.agents import Agent

class Broken(Agent):
    def update(self, rollout):
        raise RuntimeError("the loss is NaN")
"""


def test_a_failed_run_takes_no_other_down_and_a_saved_agent_is_only_evaluated(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_agents.py").write_text(BROKEN)
    monkeypatch.syspath_prepend(tmp_path)
    saved = done / "runs" / "grpo-0"
    config = dataclasses.replace(SMALL, agents=("broken_agents:Broken", str(saved)), seeds=1, set=())
    with pytest.warns(UserWarning, match=r"1 of 2 runs failed: broken_agents.Broken-0: RuntimeError: the loss is NaN"):
        table = compare(ENV, config, tmp_path / "out", progress_bar=False)
    assert "Traceback" in (tmp_path / "out" / "runs" / "broken_agents.Broken-0" / LOG).read_text()
    last = tidy(done)
    expected = last[last["final"] & (last["run"] == "grpo-0")]["score"].item()
    assert table["score"].tolist() == [expected]
    assert table["agent"].tolist() == ["grpo-0"]


@pytest.mark.slow
def test_all_are_trained_on_the_reward_that_is_named(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, agents=("reinforce",), seeds=1, set=SMALL.set[:1])
    env = EnvSettings(reward="length=-0.5")
    table = compare(ENV, config, tmp_path / "out", progress_bar=False, env=env)
    assert ((table["score"] + 0.5 * table["completion_tokens"]).abs() < 1e-6).all()
    log = (tmp_path / "out" / "runs" / "reinforce-0" / "evaluations.jsonl").read_text().splitlines()
    assert json.loads(log[-1])["score"] > json.loads(log[0])["score"]  # it was also learnt
    with pytest.raises(ValueError, match=r"holds the run reinforce-0 with env.reward='length=-0.5', not None"):
        prepare(tmp_path / "out", ENV, config)


def test_wrong_settings_name_themselves(tmp_path: Path) -> None:
    for change, message in (
        ({"agents": ()}, "agents: name at least one"),
        ({"agents": ("ppo", "ppo")}, "agents: ppo is there twice"),
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"kl_coef": (0.1, -1.0)}, r"kl_coef must be at least 0, got \(0.1, -1.0\)"),
        ({"agents": ("pppo",), "set": ()}, r"unknown agent 'pppo' \(did you mean 'ppo'\?\); allowed: "),
        ({"set": ("ppo.learning_rate=1",)}, r"'ppo.learning_rate=1' is not agent.setting=value with an agent of rein"),
        (
            {"set": ("grpo.learning_rat=1",)},
            "grpo has no setting 'learning_rat' .did you mean 'learning_rate'.*allowed: ",
        ),
        ({"set": ("grpo.group_size=1",)}, "group_size must be at least 2, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare(tmp_path / "out", ENV, dataclasses.replace(SMALL, **change))
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_folders_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    for out in (tmp_path / "notes", tmp_path / "notes" / "out"):
        with pytest.raises(ValueError, match=f"the folder '{out}' cannot be written: (File exists|Not a directory)"):
            prepare(out, ENV, SMALL)
    assert (tmp_path / "notes").read_text() == "mine"


def test_logs_are_cut_to_the_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "evaluations.jsonl").write_text('{"timesteps": 0}\n{"timesteps": 40}\n{"timesteps": 80}\n')
    (tmp_path / "progress.json").write_text('{"time/total_timesteps": 40}\n{"time/total_timesteps": 60}\n{"time/tot')
    run_folder.cut_logs(tmp_path, updates=2, timesteps=40)
    assert (tmp_path / "evaluations.jsonl").read_text() == '{"timesteps": 0}\n{"timesteps": 40}\n'
    assert (tmp_path / "progress.json").read_text() == '{"time/total_timesteps": 40}\n'


@pytest.mark.slow
def test_killed_and_started_again_it_ends_with_the_same_table(done: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = out / "runs" / "reinforce-0"
    command = [
        sys.executable, "-W", "ignore", "-m", "textrl_gym", "compare", ENV, "--agents", "reinforce", "--seeds", "1",
        "--total-timesteps", "400", "--eval-episodes", "8", "--eval-every", "2", "--save-every", "1", "--device", "cpu",
        "--out", str(out), "--set", SMALL.set[0],
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (run / "agent.json").is_file():  # the first checkpoint
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    with (run / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the run has ended with it
    assert not (run / RESULT).is_file(), "it was over before it could be killed"
    subprocess.run(command, check=True, capture_output=True)
    expected = tidy(done)
    expected = expected[expected["run"] == "reinforce-0"].reset_index(drop=True)
    assert (out / "report.html").is_file()
    pd.testing.assert_frame_equal(
        tidy(out).drop(columns="train_seconds"), expected.drop(columns="train_seconds"), check_exact=True
    )


@pytest.mark.slow
def test_a_judge_of_ones_own_judges_every_evaluation(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, agents=("grpo",), seeds=1, set=("grpo.rollout_episodes=16",), gold="length")
    table = compare(ENV, config, tmp_path / "out", progress_bar=False)
    assert table["gold"].notna().all() and len(table) > 2  # those of training, too
    run = tmp_path / "out" / "runs" / "grpo-0"
    assert json.loads((run / SPEC).read_text())["gold"] == "length"
    episodes = [json.loads(line) for line in (run / EPISODES).read_text().splitlines()]
    assert table["gold"].iloc[-1] == pytest.approx(sum(e["gold"] for e in episodes) / 8, abs=1e-6, rel=0)
    with pytest.raises(ValueError, match=r"holds the run grpo-0 with gold='length', not None"):
        prepare(tmp_path / "out", ENV, dataclasses.replace(config, gold=None))


TASK = """
import gymnasium, textrl_gym
from textrl_gym.envs.copy_text import CopyText

def vowels(completions, **columns):
    return [float(text.count("a")) for text in completions]

class Mine(CopyText):
    reward = "their_task:vowels"

gymnasium.register("Mine-v0", "textrl_gym.mdp.text_env:TextEnv",
    vector_entry_point="textrl_gym.mdp.text_env:TextVectorEnv", kwargs={"task": Mine, "max_new_tokens": 3})
"""


def test_runs_import_the_module_of_a_users_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "their_task.py").write_text(TASK)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    config = CompareConfig(("grpo",), seeds=1, total_timesteps=60, eval_episodes=4, eval_every=0, save_every=1)
    out = tmp_path / "out"
    table = compare("their_task:Mine-v0", config, out, progress_bar=False)
    assert len(table[table["final"]]) == 1
    # As it was registered, budget too: it is registered again in the run's process with the same keywords.
    episodes = [json.loads(line) for line in (out / "runs" / "grpo-0" / EPISODES).read_text().splitlines()]
    assert max(episode["tokens"] for episode in episodes) <= 3
    assert all(episode["score"] == episode["completion"].count("a") for episode in episodes)
    # The folder's checkpoint names the task and its reward; the same call may load it.
    (out / "runs" / "grpo-0" / RESULT).unlink()
    assert len(compare("Mine-v0", config, out, progress_bar=False)) == len(table)


def test_a_task_that_no_other_process_can_import_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Local(Task):
        pass

    for task, words in (("__main__:Mine", "'__main__:Mine'"), (Local, "<locals>.Local'"), (Local(), "object at")):
        registry.register("Local-v0", task)  # type: ignore[arg-type]
        with pytest.raises(
            ValueError, match=f"Local-v0 is registered with the task .*{words}.*put the class into a module"
        ):
            registry.registration("Local-v0")
        del gymnasium.registry["Local-v0"]
    gymnasium.register("Local-v0", registry.ENV_ENTRY, kwargs={"task": "a:B", "reward": len})
    with pytest.raises(ValueError, match="registered with reward=<built-in function len>"):
        registry.registration("Local-v0")
    del gymnasium.registry["Local-v0"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"gold": "endpoint"}, r"gives no scores: finish the comparison .* `textrl-gym judge DIR --judge endpoint"),
        ({"gold": "gold"}, "CopyText has no gold score of its own"),
        ({"gold": "lenght"}, "unknown reward 'lenght'; allowed: "),
        ({"env.reward": "lenght"}, "unknown reward 'lenght'; allowed: "),
        ({"env.reward": "length=x"}, "reward 'length=x' must be a name, or NAME=WEIGHT"),
        ({"env.dataset": "x.jsonl"}, "CopyText-v0 has only its own prompts"),
    ],
)
def test_a_wrong_judge_or_reward_is_told_before_any_run(wrong: dict[str, Any], message: str, tmp_path: Path) -> None:
    env = EnvSettings(**{name.removeprefix("env."): wrong.pop(name) for name in list(wrong) if "." in name})
    with pytest.raises(ValueError, match=message):
        compare(ENV, dataclasses.replace(SMALL, **wrong), tmp_path / "out", progress_bar=False, env=env)
    assert not (tmp_path / "out").exists()


def test_a_comparison_of_version_0_1_goes_on_with_its_own_gold_score(tmp_path: Path) -> None:
    """0.1 wrote `judge` where cell.json has `gold` now: the same one goes on, another is refused."""
    config = dataclasses.replace(SMALL, agents=("grpo",), seeds=1, set=SMALL.set[1:], gold="length")
    (folder,) = prepare(tmp_path, ENV, config).values()
    spec = json.loads((folder / SPEC).read_text())
    spec["judge"] = spec.pop("gold")
    del spec["env"]  # and `reward` where the environment's settings are now
    spec["reward"] = None
    (folder / SPEC).write_text(json.dumps(spec))
    assert list(prepare(tmp_path, ENV, config).values()) == [folder]
    with pytest.raises(ValueError, match=r"holds the run grpo-0 with gold='length', not None"):
        prepare(tmp_path, ENV, dataclasses.replace(config, gold=None))
    (folder / SPEC).write_text(json.dumps(spec | {"reward": "rouge"}))
    assert list(prepare(tmp_path, ENV, config, EnvSettings(reward="rouge")).values()) == [folder]
    with pytest.raises(ValueError, match=r"with env.reward='rouge', not None"):
        prepare(tmp_path, ENV, config)


def test_the_terminal_shows_numbers_that_the_registry_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    common = {"kl_coef": math.nan, "final": True, "timesteps": 400, "updates": 9, "score": 1.0, "kl_token": 0.5}
    rows = [
        {"run": f"a-{seed}", "agent": "a", "seed": seed, **common, "mine": seed + 0.5, "reward/[x]": 2.0}
        for seed in range(2)
    ]
    print_finals(pd.DataFrame([*rows, {"run": "b-0", "agent": "b", "seed": 0, **common}]))
    lines = capsys.readouterr().out.splitlines()
    assert [cell.strip() for cell in lines[1].split("┃")[1:-1]] == ["agent", "seeds", "score", "mine", "reward/[x]"]
    # Means over the seeds: (0.5 + 1.5) / 2. Agent b has neither number. kl_token is known, and has no short heading.
    assert [cell.strip() for cell in lines[3].split("│")[1:-1]] == ["a", "2", "1.000", "1.000", "2.000"]
    assert [cell.strip() for cell in lines[4].split("│")[1:-1]] == ["b", "1", "1.000", "", ""]
