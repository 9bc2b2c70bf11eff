"""Checkpoints: killed at any moment, the folder holds the old one or the new one whole; and those of older versions."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from textrl_gym import files, registry
from textrl_gym.agents import GRPO, PPO
from textrl_gym.cli.main import main
from textrl_gym.training.run_folder import read_run

NAMES = ("model", "agent.json", "training")


def fill(number: int) -> Any:
    def into(folder: Path) -> None:
        for name in (*NAMES, f"only{number}"):
            if name == "model":
                (folder / name).mkdir()
                (folder / name / f"part{number}").write_text(str(number))
            else:
                (folder / name).write_text(f'{{"number": {number}}}')

    return into


def number_of(folder: Path) -> set[int]:
    """The numbers of the checkpoint's parts: one, where it is whole."""
    state = files.read_state(folder)["number"]
    parts = {int(path.read_text()) for path in (folder / "model").iterdir()}
    own = {int(path.name.removeprefix("only")) for path in folder.glob("only*")}
    return {state, json.loads((folder / "training").read_text())["number"]} | parts | own


class Killed(BaseException):
    pass


@pytest.mark.parametrize("keep", [True, False])
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: bool
) -> None:
    calls, moment = 0, 0

    def killing(plain: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal calls
            if calls == moment:
                raise Killed
            calls += 1
            return plain(*args, **options)

        return call

    places = ((os, "replace"), (shutil, "rmtree"), (Path, "unlink"), (Path, "rmdir"), (Path, "mkdir"))
    seen: list[int] = []
    while True:
        folder = tmp_path / str(moment) / "run"
        folder.mkdir(parents=True)
        (folder / "progress.json").write_text("kept")
        files.write_folder(folder, fill(0), keep)
        files.write_folder(folder, fill(1), keep)
        calls, done = 0, False
        with monkeypatch.context() as patch:
            for owner, name in places:
                patch.setattr(owner, name, killing(getattr(owner, name)))
            with contextlib.suppress(Killed):
                files.write_folder(folder, fill(2), keep)
                done = True
        found = number_of(folder)
        assert len(found) == 1, f"killed at {moment}: parts of checkpoints {found}"
        seen += found
        # The one before is whole too, unless the kill came between the removal of the last but one and its move.
        if keep and (folder / files.PREVIOUS).is_dir():
            assert number_of(folder / files.PREVIOUS) == {seen[-1] - 1}
        assert (folder / "progress.json").read_text() == "kept"
        files.write_folder(folder, fill(3), keep)  # and it goes on
        assert number_of(folder) == {3}
        left = {path.name for path in folder.iterdir()} - {*NAMES, "only3", "progress.json", files.MANIFEST}
        assert left == ({files.PREVIOUS} if keep else set()), "nothing half-made is left"
        if done:
            break
        moment += 1
    assert moment > 10
    assert seen == sorted(seen)
    assert set(seen) == {1, 2}


def test_a_checkpoint_is_what_was_saved_last(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"rollout_episodes": 8, "group_size": 4, "seed": 0}
    other = GRPO("CopyText-v0", **settings).env.task.load_model(None)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(3.0)
    # A model that was loaded has no name, so that its reference is a part of the checkpoint; PPO has a value head.
    PPO("CopyText-v0", model=other, **settings).save(tmp_path)
    assert {"reference", "value_head.safetensors"} <= {path.name for path in tmp_path.iterdir()}
    (tmp_path / "notes.txt").write_text("of the user")
    (tmp_path / files.MANIFEST).unlink()  # as 0.1 left it
    second = GRPO("CopyText-v0", **settings)
    second.save(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"agent.json", "checkpoint.json", "model", "training.safetensors", "notes.txt"}
    loaded = GRPO.load(tmp_path)
    assert second.policy.reference is not None
    assert loaded.policy.reference is not None
    for a, b in zip(
        second.policy.reference.model.parameters(), loaded.policy.reference.model.parameters(), strict=True
    ):
        assert torch.equal(a, b)


def test_a_failure_while_saving_leaves_the_old_one_and_no_waste(tmp_path: Path) -> None:
    def full(folder: Path) -> None:
        (folder / "model").write_text("half")
        raise OSError(28, "No space left on device")

    files.write_folder(tmp_path, fill(1))
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(OSError, match="No space left"):
        files.write_folder(tmp_path, full)
    assert number_of(tmp_path) == {1}
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_what_dead_processes_left_half_made_is_removed(tmp_path: Path) -> None:
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    run = tmp_path / "run"
    number = int(dead.stdout)
    for path in (run / f".checkpoint.{number}.new", run / f".checkpoint.{os.getpid()}.new", run / ".checkpoint.1.new"):
        (path / "model").mkdir(parents=True)
    (tmp_path / f".run.{number}.new").mkdir()  # where 0.1 made them
    (run / f".report.html.{number}.new").write_text("half")
    files.write_folder(run, fill(1))
    assert [path.name for path in run.glob(".*")] == [".checkpoint.1.new"], "process 1 runs"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("name", [".", "sub/..", "link", "a b/läuf 日本"])
def test_any_name_of_a_folder_will_do(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    # /dev/shm is another file system, so that a rename into it fails.
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        (tmp_path / "link").symlink_to(elsewhere)
        files.write_folder(name, fill(1))
        files.write_folder(name, fill(2), keep_previous=True)
        assert number_of(Path(name)) == {2}
        assert number_of(Path(name) / files.PREVIOUS) == {1}
        assert (tmp_path / "link").is_symlink()


def test_readers_at_once_finish_a_checkpoint_once(tmp_path: Path) -> None:
    for number in range(40):
        files.write_folder(tmp_path, fill(number))
        fresh = tmp_path / "moving"
        fresh.mkdir()
        fill(number + 1)(fresh)
        listed = [path.relative_to(fresh).as_posix() for path in fresh.rglob("*") if path.is_file()]
        (fresh / files.MANIFEST).write_text(json.dumps({"files": [*listed, files.MANIFEST]}))
        fresh.rename(tmp_path / files.WHOLE)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(files.finish_folder, [tmp_path] * 8))
        assert number_of(tmp_path) == {number + 1}


# -- damage -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A run's folder with the checkpoints of updates 1 and 2."""
    agent = GRPO("CopyText-v0", seed=0, rollout_episodes=8, group_size=4, out=tmp_path / "run")
    for number in (1, 2):
        agent.num_updates = number
        agent.save(tmp_path / "run")
    return tmp_path / "run"


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


@pytest.mark.parametrize("name", ["model/model.safetensors", "training.safetensors", "agent.json", "model/config.json"])
@pytest.mark.parametrize("harm", [truncate, Path.unlink])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    two: Path, name: str, harm: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert registry.load_agent(two).num_updates == 2
    assert capsys.readouterr().err == ""
    harm(two / name)
    assert registry.load_agent(two).num_updates == 1
    said = capsys.readouterr().err
    assert f"the newest checkpoint in '{two}' is damaged" in said
    assert str(two / name) in said
    # A save keeps the whole one of the two.
    agent = GRPO.load(two, out=two)
    agent.num_updates = 3
    agent.save(two)
    assert files.read_state(two)["num_updates"] == 3
    assert files.read_state(two / files.PREVIOUS)["num_updates"] == 1
    harm(two / name)
    harm(two / files.PREVIOUS / name)
    with pytest.raises(ValueError, match=re.escape(str(two / name))):
        registry.load_agent(two)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "must hold an object, not list"),
        ("{}", "names no agent"),
        ('{"agent": 3}', "names no agent"),
        ('{"agent": "grpo"}', "is damaged"),
        ('{"agent": "grpo", "version": "0.2"}', "is damaged: it has no 'task'"),
        ("\udcff", "is no JSON"),
    ],
)
def test_a_malformed_state_is_named(two: Path, text: str, words: str) -> None:
    file = two / "agent.json"
    file.write_bytes(text.encode(errors="surrogateescape"))
    shutil.rmtree(two / files.PREVIOUS)
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        registry.load_agent(two)
    assert str(file) in str(error.value)


def test_a_state_with_a_wrong_type_is_named(two: Path) -> None:
    state = files.read_state(two)
    files.write_state(two, state | {"num_updates": "7"})
    with pytest.raises(ValueError, match=r"agent\.json' is damaged: 'num_updates' must be int, got '7'"):
        registry.load_agent(two)
    files.write_state(two, state | {"rng_state": {}})
    with pytest.raises(ValueError, match=r"does not fit its agent\.json: KeyError"):
        registry.load_agent(two)


@pytest.mark.parametrize("listed", [["../secret"], ["/etc/passwd"], [".previous/x"], "x", None, [3]])
def test_a_manifest_names_files_of_its_folder_only(listed: object, two: Path) -> None:
    shutil.rmtree(two / files.PREVIOUS)
    (two / files.MANIFEST).write_text(json.dumps({"files": listed}))
    with pytest.raises(ValueError, match=r"checkpoint\.json' must list files"):
        registry.load_agent(two)


class MyGRPO(GRPO):
    """With state of its own, in JSON and in a file."""

    number, note = 0, ""

    def extra_state(self) -> dict[str, Any]:
        return {"number": self.number}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self.number = state["number"]

    def save_extra(self, folder: Path) -> None:
        (folder / "note.txt").write_text(f"{self.number} in a file")

    def load_extra(self, folder: Path) -> None:
        self.note = (folder / "note.txt").read_text()


# -- versions ---------------------------------------------------------------------------------------------------------

QUIET: dict[str, Any] = {"progress_bar": False, "eval_every": 0, "eval_episodes": 8}


def test_a_checkpoint_of_0_1_goes_on_as_it_did_in_0_1(root: Path, tmp_path: Path) -> None:
    # tests/data/checkpoint-0.1 was written by 0.1.0: GRPO with the KL in the reward, on an environment of 8 rows that
    # was given with kl_coef=0.5 and kl_estimator="k3". 0.1 used the task's 0.02 and k1, and its config says 64 rows.
    # 0.1 then went on for 300 tokens: expected.safetensors.
    saved = root / "tests" / "data" / "checkpoint-0.1"
    agent = GRPO.load(saved, out=tmp_path)
    assert (agent.kl.coef, agent.kl.estimator) == (0.02, "k1")
    assert (agent.env.num_envs, agent.config.rollout_episodes, agent.config.group_size) == (8, 8, 4)
    assert agent.num_timesteps >= 300
    before = {name: p.detach().clone() for name, p in agent.policy.named_parameters()}
    agent.learn(300, reset_num_timesteps=False, **QUIET)
    expected = load_file(saved / "expected.safetensors")
    # A step of Adam at this learning rate moves a weight by about 0.01; machines differ in the last digits.
    for name, p in agent.policy.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name], atol=1e-3, rtol=0)
    assert max(float((expected[name] - before[name]).abs().max()) for name in before) > 0.01

    agent.save(tmp_path / "again")
    state = files.read_state(tmp_path / "again")
    assert state["version"] == "0.2"
    assert not state.keys() & {"memory", "streams"}
    assert GRPO.load(tmp_path / "again").num_timesteps == agent.num_timesteps


def test_a_checkpoint_of_another_version_is_refused(root: Path, tmp_path: Path) -> None:
    saved = root / "tests" / "data" / "checkpoint-0.1"
    files.write_state(tmp_path, files.read_state(saved) | {"version": "9.0"})
    with pytest.raises(ValueError, match=r"was written by version '9\.0' of checkpoints; this .* reads 0\.1 and 0\.2"):
        GRPO.load(tmp_path)


@pytest.mark.parametrize(("old", "new"), [("memory", "extra_state"), ("remember", "load_extra_state")])
def test_a_method_with_its_name_of_0_1_is_refused(old: str, new: str) -> None:
    with pytest.raises(TypeError, match=rf"Old\.{old}\(\) is called {new}\(\) since 0\.2: rename the method"):
        type("Old", (GRPO,), {old: lambda self: {}})
    type("Both", (GRPO,), {old: lambda self: {}, new: lambda self: {}})  # the old one is its own business then


def test_an_agents_own_state_and_files_are_saved(tmp_path: Path) -> None:
    agent = MyGRPO("CopyText-v0", rollout_episodes=16, out=tmp_path)
    agent.number = 7
    files.write_text(tmp_path / "unrelated", "kept")
    agent.save(tmp_path)
    state = files.read_state(tmp_path)
    assert state["extra_state"] == {"number": 7}
    again = agent.load(tmp_path, agent.env)
    assert (again.number, again.note) == (7, "7 in a file")


def test_a_checkpoint_of_another_kind_of_device_is_loaded(tmp_path: Path) -> None:
    """A CUDA generator's state has 16 bytes, one of the CPU 5,056: neither can take the other's."""
    agent = GRPO("CopyText-v0", seed=3, rollout_episodes=8, out=tmp_path)
    agent.learn(100, progress_bar=False, eval_every=0, eval_episodes=8)
    numbers, _ = agent.rng_state()
    drawn = []
    for _ in range(2):
        agent.load_rng_state(numbers, torch.zeros(16, dtype=torch.uint8))
        drawn.append(agent.collect().token_BT)
    assert torch.equal(*drawn)  # the same numbers at each loading, if not those of the run that was saved


# -- logs beside a checkpoint -----------------------------------------------------------------------------------------


def test_a_saved_folder_can_be_reported(tmp_path: Path) -> None:
    """agent.save(folder) makes what `report` and `evaluate` understand, and a run has no second run within it."""
    agent = GRPO("CopyText-v0", seed=0, out=tmp_path / "run", rollout_episodes=16, group_size=4)
    agent.learn(100, **QUIET)
    agent.save(tmp_path / "saved")
    agent.save(tmp_path / "run" / "inside")
    assert read_run(tmp_path / "saved").evaluations == read_run(tmp_path / "run").evaluations != []
    assert not (tmp_path / "run" / "inside" / "evaluations.jsonl").exists()
    assert main(["report", str(tmp_path / "saved")]) == 0
    assert (tmp_path / "saved" / "report.html").is_file()
    again = GRPO.load(tmp_path / "saved", out=tmp_path / "saved")
    again.learn(200, reset_num_timesteps=False, **QUIET)  # and may be gone on in
    assert read_run(tmp_path / "saved").evaluations[-1]["timesteps"] >= 300
