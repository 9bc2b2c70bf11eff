"""Disks that are full or read-only, two processes, clocks that go back, files that are damaged: an error, or the
checkpoint before, and never a mix of two."""

from __future__ import annotations

import itertools
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from textrl_gym import files
from textrl_gym.agents import GRPO, PPO
from textrl_gym.persistence import run_lock
from textrl_gym.persistence.save_schedule import SaveOptions
from textrl_gym.pipeline import sft, trainer
from textrl_gym.pipeline.trainer import CHECKPOINT, Trainer
from textrl_gym.registry import load_agent
from textrl_gym.training.agent import Agent

QUIET: dict[str, Any] = {"progress_bar": False, "eval_every": 0, "eval_episodes": 4, "show_samples": 0}
SFT = sft.SFTConfig(
    steps=8, copy_steps=0, batch_size=2, hidden_size=16, intermediate_size=32, layers=2, vocab_size=300, eval_rows=2
)
EACH = SaveOptions(save_every=1)
TOTAL = 300


def agent_in(folder: Path, cls: type[Agent] = GRPO) -> Agent:
    return cls("CopyText-v0", rollout_episodes=8, seed=0, out=folder)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")) + sorted(folder.glob("model/*.safetensors")):
        tensors |= {f"{file.relative_to(folder)} {name}": value for name, value in load_file(file).items()}
    return tensors


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert list(a) == list(b)
    assert all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An agent, and a model, that were trained without trouble."""
    folder = tmp_path_factory.mktemp("whole")
    agent_in(folder / "agent").learn(TOTAL, **QUIET)
    sft.sft("CopyText-v0", SFT, folder / "sft")
    return folder


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    folder = tmp_path / "volume"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount here")
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Leave nothing free; the file that takes the room."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            return filler
    raise AssertionError("the volume has no end")


# -- the disk ---------------------------------------------------------------------------------------------------------


def test_a_full_disk_keeps_the_last_checkpoint(volume: Path, whole: Path) -> None:
    agent = agent_in(volume / "run")

    def full(*_: object) -> bool:
        if agent.num_updates == 4:
            fill(volume)
        return True

    with pytest.raises(OSError, match="No space left"):
        agent.learn(TOTAL, callback=full, save_every=1, **QUIET)
    assert files.read_state(volume / "run")["num_updates"] == 4
    (volume / "filler").unlink()
    again = load_agent(volume / "run", out=volume / "run")
    again.learn(TOTAL - again.num_timesteps, reset_num_timesteps=False, **QUIET)
    assert_same(weights(volume / "run"), weights(whole / "agent"))


def test_a_full_disk_of_supervised_training(volume: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = Trainer._log

    def full(run: Trainer, *args: Any) -> None:
        log(run, *args)
        if run.place.updates == 5:
            fill(volume)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_log", full)
        with pytest.raises(OSError, match="No space left"):
            sft.sft("CopyText-v0", SFT, volume / "run", None, EACH)
    assert files.read_json(volume / "run" / CHECKPOINT / trainer.STATE_FILE)["updates"] == 4
    (volume / "filler").unlink()
    sft.sft("CopyText-v0", SFT, volume / "run", None, EACH)
    assert_same(weights(volume / "run"), weights(whole / "sft"))


def test_files_that_may_not_grow(tmp_path: Path, whole: Path) -> None:
    """As by `ulimit -f`, or a quota: the model does not fit, which is found out before the first update."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    heard = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the signal of it ends a process, the error does not
    agent = agent_in(tmp_path / "run")
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
        with pytest.raises(OSError, match=r"cannot be written: .*File too large"):
            agent.learn(TOTAL, **QUIET)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, heard)
    assert agent.num_updates == 0
    agent_in(tmp_path / "run").learn(TOTAL, **QUIET)
    assert_same(weights(tmp_path / "run"), weights(whole / "agent"))


def test_a_volume_that_is_read_only(volume: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(volume)], check=True)
    agent = agent_in(volume / "run")
    for work in (lambda: agent.learn(TOTAL, **QUIET), lambda: sft.sft("CopyText-v0", SFT, volume / "sft")):
        with pytest.raises(ValueError, match="cannot be written: Read-only file system"):
            work()
    assert agent.num_timesteps == 0


def test_two_processes(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    hold = "import fcntl, sys, time; f = open(sys.argv[1], 'a'); fcntl.flock(f, 2); print(flush=True); time.sleep(99)"
    other = subprocess.Popen([sys.executable, "-c", hold, folder / run_lock.LOCK], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        other.stdout.readline()
        for work in (lambda: agent_in(folder).learn(20, **QUIET), lambda: sft.sft("CopyText-v0", SFT, folder)):
            with pytest.raises(ValueError, match="another process or agent trains in"):
                work()
    finally:
        other.kill()
        other.communicate()
    agent_in(folder).learn(20, **QUIET)  # a lock ends with its process, however that ends


def test_a_clock_that_goes_back(tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = itertools.count(2e9, -3_600)
    monkeypatch.setattr(time, "time", lambda: next(now))
    agent = agent_in(tmp_path / "run")
    agent.learn(TOTAL // 2, save_every_minutes=1e-9, **QUIET)
    again = load_agent(tmp_path / "run", out=tmp_path / "run")
    again.learn(20, reset_num_timesteps=False, save_every_minutes=1e-9, **QUIET)
    sft.sft("CopyText-v0", SFT, tmp_path / "sft", None, SaveOptions(save_every_minutes=1e-9))
    assert_same(weights(tmp_path / "sft"), weights(whole / "sft"))


# -- damage -----------------------------------------------------------------------------------------------------------


def cut(file: Path, share: float) -> None:
    size = file.stat().st_size
    os.truncate(file, min(size - 1, int(size * share)))


HARMS = {"gone": Path.unlink, "empty": lambda file: cut(file, 0.0), "half": lambda file: cut(file, 0.5),
         "last byte": lambda file: cut(file, 1.0)}  # fmt: skip


def parts(folder: Path) -> list[str]:
    listed: list[str] = files.read_json(folder / files.MANIFEST)["files"]
    return listed


@pytest.mark.slow
@pytest.mark.parametrize("cls", [PPO, GRPO])
def test_every_part_of_a_checkpoint_damaged(cls: type[Agent], tmp_path: Path) -> None:
    agent = agent_in(tmp_path / "run", cls)

    def stop(*_: object) -> bool:
        if agent.num_updates == 3:
            raise KeyboardInterrupt
        return True

    with pytest.raises(KeyboardInterrupt):
        agent.learn(TOTAL, callback=stop, save_every=1, **QUIET)
    newest, before = weights(tmp_path / "run"), weights(tmp_path / "run" / files.PREVIOUS)
    updates = agent.num_updates
    assert any(not torch.equal(value, before[name]) for name, value in newest.items())
    for number, (name, harm) in enumerate(itertools.product(parts(tmp_path / "run"), HARMS)):
        folder = shutil.copytree(tmp_path / "run", tmp_path / str(number))
        HARMS[harm](folder / name)
        loaded = load_agent(folder)
        # A text that lacks its last byte, a line end, is whole; a checkpoint without its list is of an earlier version.
        assert loaded.num_updates in (updates, updates - 1) if harm == "last byte" or "json" in name else (updates - 1,)
        loaded.save(tmp_path / "again")
        one = newest if loaded.num_updates == updates else before
        assert_same(weights(tmp_path / "again"), one)
        # The one before damaged too: an error that names the file, or the newest where only the other is.
        HARMS[harm](folder / files.PREVIOUS / name)
        said = ""
        try:
            loaded = load_agent(folder)
        except ValueError as error:
            said = str(error)
        if said:
            assert Path(name).name in said or "agent.json" in said, (name, harm, said)
        else:
            loaded.save(tmp_path / "again")
            assert_same(weights(tmp_path / "again"), newest if loaded.num_updates == updates else before)
        shutil.rmtree(folder)


@pytest.mark.slow
def test_every_part_of_a_supervised_checkpoint_damaged(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = Trainer._log

    def stop(run: Trainer, *args: Any) -> None:
        log(run, *args)
        if run.place.updates == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_log", stop)
        with pytest.raises(KeyboardInterrupt):
            sft.sft("CopyText-v0", SFT, tmp_path / "run", None, EACH)
    for number, (name, harm) in enumerate(itertools.product(parts(tmp_path / "run" / CHECKPOINT), HARMS)):
        folder = shutil.copytree(tmp_path / "run", tmp_path / str(number))
        HARMS[harm](folder / CHECKPOINT / name)
        sft.sft("CopyText-v0", SFT, folder, None, EACH)
        assert_same(weights(folder), weights(whole / "sft"))
        shutil.rmtree(folder)
        folder = shutil.copytree(tmp_path / "run", tmp_path / str(number))
        for place in (folder / CHECKPOINT, folder / CHECKPOINT / files.PREVIOUS):
            HARMS[harm](place / name)
        said = ""
        try:
            sft.sft("CopyText-v0", SFT, folder, None, EACH)
        except ValueError as error:
            said = str(error)
        if said:
            assert "damaged" in said or Path(name).name in said, (name, harm, said)
        else:  # what was damaged says nothing, as the line end of a text
            assert_same(weights(folder), weights(whole / "sft"))
        shutil.rmtree(folder)
