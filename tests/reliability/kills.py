"""Kill trainings at random moments, start each again every time, and compare it with one that was never stopped.

    python tests/reliability/kills.py --kills 10 --folder /tmp/kills --work ppo sft

Prints a JSON object for each kind of work. A process that has imported everything forks the trainings, so that a start
costs milliseconds and not seconds; they run the command line's code, in a process of their own.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: forked threads would be lost

import torch
from safetensors.torch import load_file

from textrl_gym import registry
from textrl_gym.cli import main

TIMED = ("time/", "seconds/", "train_seconds", "timestamp")
"""What two runs of the same may differ in."""
AGENTS = ("ppo", "grpo", "dpo", "online_dpo", "nlpo", "reinforce", "raft", "sb3_ppo")
IMPORTED = ("textrl_gym.training.loop", "textrl_gym.pipeline.reward_ensemble", "torch.utils.tensorboard")
WORKS = (*AGENTS, "sft", "reward-model")


def command(work: str, folder: Path, size: float) -> list[str]:
    """The command of a kind of work; `size` times about a second."""
    often = ["--save-every", "2", "--save-every-minutes", "0"]
    if work in AGENTS:
        tokens = {"dpo": 900, "nlpo": 3_000, "ppo": 3_000, "sb3_ppo": 3_000}.get(work, 3_000)
        more = ["--num-pairs", "64"] if work == "dpo" else []
        more += ["--rollout-episodes", "16", "--eval-every", "7", "--eval-episodes", "4", "--show-samples", "0"]
        more += ["--on-bad-health", "warn", "--on-hacking", "off", "--device", "cpu", *often]
        return ["train", work, "CopyText-v0", "--total-timesteps", str(int(tokens * size)), *more]
    if work == "sft":
        shape = ["--hidden-size", "16", "--intermediate-size", "32", "--layers", "2", "--vocab-size", "300"]
        steps = ["--steps", str(int(150 * size)), "--copy-steps", "40", "--copy-run", "8", "--batch-size", "4"]
        budgets = ["--env.max-prompt-tokens", "8", "--env.max-new-tokens", "8", "--eval-rows", "4"]
        return ["sft", "CopyText-v0", *shape, *steps, *budgets, *often]
    pairs = folder / "pairs.jsonl"
    if not pairs.is_file():
        rng = random.Random(0)
        texts = [" ".join(rng.choices("abcd", k=2)) for _ in range(int(900 * size))]
        rows = [{"prompt": text, "chosen": text, "rejected": f"{text[2]} {text[2]}"} for text in texts]
        pairs.write_text("".join(json.dumps(row) + "\n" for row in rows if row["chosen"] != row["rejected"]))
    return ["reward-model", "CopyText-v0", "--dataset", str(pairs), "--batch-size", "4", "--eval-prompts", "64", *often]


def warm_up() -> None:
    """Import what the works would import each."""
    for name in AGENTS:
        registry.load_agent_class(name)
    for name in IMPORTED:
        importlib.import_module(name)
    torch.set_num_threads(1)


def start(argv: list[str], log: Path) -> int:
    """Run a command in a process of its own; its number."""
    sys.stdout.flush()
    number = os.fork()
    if number:
        return number
    code = 99
    try:
        with log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            code = main.main(argv)
    finally:
        os._exit(code)


def wait(number: int, seconds: float) -> int | None:
    """The exit code of a process that ends within so many seconds; None where it goes on."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(number, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def kill_at_random(argv: list[str], out: Path, kills: int, seconds: float, rng: random.Random) -> Iterator[Path]:
    """Kill a work so many times, each time at a random moment of its length; yields the folder of each that ended."""
    left, number = kills, 0
    while left or number == 0:
        number += 1
        folder = out.with_name(f"{out.name}-{number}")
        ended = False
        while not ended:
            process = start([*argv, "--out", str(folder)], folder.with_suffix(".log"))
            # Without kills left, as long as it needs.
            code = wait(process, rng.uniform(0, seconds) if left else 600)
            if code is None:
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
                left -= 1
                assert left >= 0, f"{folder} does not end"
            elif code:
                raise RuntimeError(f"{argv[:2]} ended with {code}: {folder.with_suffix('.log').read_text()[-2000:]}")
            ended = code == 0
        yield folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a run's newest checkpoint, or of a trained model."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.rglob("*.safetensors")):
        if ".previous" not in file.parts:
            found |= {f"{file.relative_to(folder)} {name}": value for name, value in load_file(file).items()}
    return found


def logged(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of a run's logs, without times."""
    logs = {"updates": sorted(folder.glob("progress*.json"), key=lambda file: (len(file.name), file.name))}
    logs |= {
        name: [folder / f"{name}.jsonl"] for name in ("evaluations", "samples") if (folder / f"{name}.jsonl").exists()
    }
    return {
        name: [
            {key: value for key, value in json.loads(line).items() if not key.startswith(TIMED)}
            for file in paths
            for line in file.read_text().splitlines()
        ]
        for name, paths in logs.items()
    }


def differences(whole: Path, parted: Path) -> list[str]:
    """What differs between a run that was never stopped and one that was."""
    first, second = tensors(whole), tensors(parted)
    wrong = [name for name, value in first.items() if name not in second or not torch.equal(value, second[name])]
    wrong += [f"{name} too much" for name in second if name not in first]
    rows, others = logged(whole), logged(parted)
    return wrong + [f"log of {name}" for name in rows if rows[name] != others.get(name)]


def prove(work: str, folder: Path, kills: int, size: float, rng: random.Random) -> dict[str, Any]:
    """Kill one kind of work so many times."""
    folder.mkdir(parents=True, exist_ok=True)
    argv = command(work, folder, size)
    whole = folder / f"{work}-whole"
    begin = time.monotonic()
    code = wait(start([*argv, "--out", str(whole)], folder / f"{work}-whole.log"), 600)
    seconds = time.monotonic() - begin
    if code:
        raise RuntimeError(f"{argv[:2]} ended with {code}: {(folder / f'{work}-whole.log').read_text()[-2000:]}")
    runs = list(kill_at_random(argv, folder / work, kills, seconds, rng))
    wrong = [f"{run.name}: {name}" for run in runs for name in differences(whole, run)]
    return {
        "work": work,
        "kills": kills,
        "runs": len(runs),
        "seconds of a whole run": round(seconds, 2),
        "tensors": len(tensors(whole)),
        "updates": len(logged(whole)["updates"]),
        "differences": wrong[:9],
        "different": len(wrong),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", nargs="+", choices=WORKS, default=WORKS)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--size", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse()
    warm_up()
    for one in arguments.work:
        chance = random.Random(f"{arguments.seed} {one}")
        record = prove(one, arguments.folder / one, arguments.kills, arguments.size, chance)
        print(json.dumps(record), flush=True)
