"""Long proofs of training by several processes: 20 updates, four processes, killed ranks, other numbers of processes.

python -m pytest -m slow tests/reliability/test_process_proofs.py
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks import outcome
from safetensors.torch import load_file

from textrl_gym import files
from textrl_gym.pipeline.trainer import CHECKPOINT, STATE_FILE

pytestmark = pytest.mark.slow

RANKS = str(Path(__file__).parents[1] / "ranks.py")
SUPERVISED = ("sft", "reward-model", "sft+shard", "reward-model+shard")
WORKS = ("ppo", "grpo", "dpo", "ppo+shard", "grpo+shard", "dpo+shard", *SUPERVISED)
SECONDS = 3000  # of the longest part, on two cores that others use too
KEY_BIASES = ("k_proj.bias", "c_attn.bias")
"""Their gradients are 0 but for rounding, of which Adam with its usual epsilon makes whole steps; see
tests/test_processes.py."""


def ranks(folder: Path, *arguments: str) -> None:
    command = [sys.executable, RANKS, str(folder), "--seconds", str(SECONDS), *arguments]
    done = subprocess.run(command, timeout=3 * SECONDS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def assert_close(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor], names: tuple[str, ...]) -> None:
    for name in names:
        torch.testing.assert_close(two[name], one[name], atol=1e-6, rtol=0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    ranks(folder, "--processes", "1", "2", "4", "--updates", "20", "--work", *WORKS)
    return folder


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", WORKS)
def test_twenty_updates_are_those_of_one_process(name: str, size: int, trained: Path) -> None:
    one, logged = outcome(trained / "1", name)
    for rank in range(size):
        two, logged_by_two = outcome(trained / str(size), name, rank)
        assert len(logged) == len(logged_by_two) >= 20
        if name in SUPERVISED:
            assert_close(one, two, tuple(key for key in one if not key.endswith(KEY_BIASES)))
        else:
            assert_close(one, two, ("weights", "gradient", "kl_coef"))


@pytest.mark.parametrize("name", ["ppo", "ppo+shard", "grpo", "dpo"])
def test_four_then_two_then_one_process(name: str, tmp_path: Path) -> None:
    ranks(tmp_path, "--processes", "4", "2", "1", "--chain", "--updates", "3", "--work", name)
    ranks(tmp_path / "whole", "--processes", "1", "--updates", "9", "--work", name)
    one, _ = outcome(tmp_path / "whole" / "1", name)
    assert_close(one, outcome(tmp_path / "1", name)[0], ("weights", "gradient", "kl_coef"))


@pytest.mark.parametrize("name", SUPERVISED)
def test_supervised_training_goes_on_by_fewer_processes(name: str, tmp_path: Path) -> None:
    ranks(tmp_path, "--processes", "4", "2", "1", "--chain", "--updates", "12", "--work", name)
    ranks(tmp_path / "whole", "--processes", "1", "--updates", "12", "--work", name)
    folders = [tmp_path / "4", tmp_path / "2", tmp_path / "1", tmp_path / "whole" / "1"]
    *steps, of_one = (json.loads((folder / f"{name}-0-held.json").read_text())["steps"] for folder in folders)
    assert steps == [4, 4, of_one - 8] and steps[2] > 0  # several were stopped on their way
    one, chained = outcome(tmp_path / "whole" / "1", name)[0], outcome(tmp_path / "chain", name)[0]
    assert_close(one, chained, tuple(key for key in one if not key.endswith(KEY_BIASES)))


@pytest.mark.parametrize(("name", "updates"), [("sft+failing", 6), ("sft+shard+failing", 5)])
def test_what_is_left_of_a_rank_that_fails_alone(name: str, updates: int, tmp_path: Path) -> None:
    # After 3 updates of copying and 3 of rows; a checkpoint is written every 5 updates.
    chain = ["--chain", "--updates", "4", "--work", name]
    command = [sys.executable, RANKS, str(tmp_path), "--processes", "2", *chain]
    done = subprocess.run(command, timeout=SECONDS, capture_output=True, text=True)
    assert done.returncode != 0 and "the rows are away" in done.stderr
    # Moments that are sharded are gone with the others; the checkpoint before stays.
    state = files.read_json(tmp_path / "chain" / f"run-{name}" / CHECKPOINT / STATE_FILE)
    assert state["updates"] == updates
    ranks(tmp_path, "--processes", "1", *chain)
    ranks(tmp_path / "whole", "--processes", "1", *chain)
    one, gone_on = outcome(tmp_path / "whole" / "chain", name)[0], outcome(tmp_path / "chain", name)[0]
    assert_close(one, gone_on, tuple(key for key in one if not key.endswith(KEY_BIASES)))


# -- torchrun ---------------------------------------------------------------------------------------------------------


def train(out: Path, processes: int = 0, *more: str) -> list[str]:
    """The command of a short run; processes 0: without torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes else []
    run = ["train", "grpo", "CopyText-v0", "--total-timesteps", "3000", "--rollout-episodes", "16", "--eval-every", "0"]
    run += ["--eval-episodes", "4", "--show-samples", "0", "--save-every", "2", "--device", "cpu", "--out", str(out)]
    return [sys.executable, *launcher, "-m", "textrl_gym", *run, *more]


def start(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def wait_for_updates(out: Path, updates: int, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 600
    while len(files.read_json_lines(out / "progress.json")) < updates:
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < end, "no updates"
        time.sleep(0.02)


def process_of_rank(rank: int, out: Path) -> int:
    """The process of a rank of the run in a folder, by what the system knows of all processes."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                variables, command = ((folder / name).read_bytes().split(b"\0") for name in ("environ", "cmdline"))
            except OSError:  # it has ended, or is another user's
                continue
            if f"RANK={rank}".encode() in variables and str(out).encode() in command:
                return int(folder.name)
    raise AssertionError(f"no process of rank {rank}")


@pytest.mark.parametrize("more", [(), ("--shard",)])
def test_killed_rank_ends_all_and_the_same_command_goes_on(more: tuple[str, ...], tmp_path: Path) -> None:
    subprocess.run(train(tmp_path / "whole"), check=True, timeout=SECONDS, capture_output=True)
    out = tmp_path / "killed"
    process = start(train(out, 2, *more))
    wait_for_updates(out, 5, process)
    os.kill(process_of_rank(1, out), signal.SIGKILL)
    _, error = process.communicate(timeout=SECONDS)
    assert process.returncode != 0 and "Signal 9" in error
    assert len(files.read_json_lines(out / "progress.json")) < 20  # it had not ended before it was killed
    subprocess.run(train(out, 2, *more), check=True, timeout=SECONDS, capture_output=True)
    whole, killed = (load_file(folder / "model" / "model.safetensors") for folder in (tmp_path / "whole", out))
    assert_close(whole, killed, tuple(whole))


def test_ctrl_c_saves_and_one_process_goes_on(tmp_path: Path) -> None:
    subprocess.run(train(tmp_path / "whole"), check=True, timeout=SECONDS, capture_output=True)
    out = tmp_path / "stopped"
    process = start(train(out, 2, "--save-every", "0", "--shard"))
    wait_for_updates(out, 5, process)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=SECONDS)
    updates = len(files.read_json_lines(out / "progress.json"))
    # The terminal's lines end where it is 80 columns wide.
    assert f"interrupted: saved the checkpoint of update {updates} in {out}" in " ".join(error.split())
    resume = [sys.executable, "-m", "textrl_gym", "train", "--resume", str(out), "--device", "cpu"]
    subprocess.run(resume, check=True, timeout=SECONDS, capture_output=True)
    whole, stopped = (load_file(folder / "model" / "model.safetensors") for folder in (tmp_path / "whole", out))
    assert_close(whole, stopped, tuple(whole))


def test_error_of_one_rank_is_said_and_ends_all(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(
        "import os\n\n\ndef reward(prompts, completions, **columns):\n"
        "    if os.environ['RANK'] == '1':\n        raise ConnectionError('the scoring service is away')\n"
        "    return [0.1 * len(c) for c in completions]\n"
    )
    command = train(tmp_path / "out", 2, "--env.reward", "broken:reward")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(command, timeout=SECONDS, capture_output=True, text=True, env=environment)
    assert done.returncode != 0
    assert "process 1 of 2: error" in done.stderr and "the scoring service is away" in done.stderr
