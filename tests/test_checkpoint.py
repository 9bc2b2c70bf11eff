"""Checkpoints: killed at any moment, the folder holds the old one or the new one whole; and those of older versions."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from textrl_gym import files
from textrl_gym.agents import GRPO

NAMES = ("model", "agent.json", "training")


def fill(number: int) -> Any:
    def into(folder: Path) -> None:
        for name in NAMES:
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
    return {state, json.loads((folder / "training").read_text())["number"]} | parts


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    plain, seen = os.replace, set()
    for moment in range(6):
        folder = tmp_path / str(moment) / "run"
        folder.mkdir(parents=True)
        (folder / "progress.json").write_text("kept")
        files.write_folder(folder, fill(1))
        calls = 0

        def replace(source: Any, target: Any, moment: int = moment) -> None:
            nonlocal calls
            if calls == moment:
                raise Killed
            calls += 1
            plain(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            with contextlib.suppress(Killed):
                files.write_folder(folder, fill(2))
        found = number_of(folder)
        seen |= found
        assert len(found) == 1, f"killed at move {moment}: parts of checkpoints {found}"
        assert (folder / "progress.json").read_text() == "kept"
        files.write_folder(folder, fill(3))  # and it goes on
        assert number_of(folder) == {3}
        assert [path.name for path in folder.parent.iterdir() if path.name.endswith(".whole")] == []
    assert seen == {1, 2}


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
