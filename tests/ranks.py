"""Trainings by several processes, and the same by one: what tests of both compare.

    python tests/ranks.py FOLDER --processes 2 --work grpo ppo --updates 3

A process that has imported everything forks the others, which find each other by a file in FOLDER. Each writes what it
ends with to FOLDER/WORK-RANK.safetensors, and the metrics of its updates beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: forked threads would be lost

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from textrl_gym import processes
from textrl_gym.registry import load_agent_class
from textrl_gym.training.agent import Agent

SETTINGS: dict[str, dict[str, Any]] = {
    "ppo": {"kl_target": 0.5, "kl_horizon": 100},
    "dpo": {"num_pairs": 24},
    "filtered_bc": {"num_trajectories": 32},
    "awr": {},
}
"""Of some agents, beside those of all."""
ENV = "CopyText-v0"
QUIET: dict[str, Any] = {"progress_bar": False, "eval_every": 2, "eval_episodes": 6, "on_hacking": "off"}


def make(name: str, out: Path, **settings: Any) -> Agent:
    """An agent of few rows, whose minibatches have several parts of ragged lengths."""
    batch: dict[str, Any] = {"rollout_episodes": 16, "micro_batch_tokens": 120, "device": "cpu"}
    cls = load_agent_class(name)
    batch |= {"group_size": 4} if cls.Config().group_size > 1 or cls.needs_groups else {}
    return cls(ENV, seed=5, out=out, **(batch | SETTINGS.get(name, {}) | settings))


class Record:
    """What the updates of an agent did, by its hooks."""

    def __init__(self, agent: Agent, updates: int) -> None:
        self.agent, self.updates = agent, updates
        self.gradient = torch.zeros(0)
        self.metrics: list[dict[str, float]] = []
        agent.optimizer.register_step_pre_hook(self._see_gradient)
        update = agent.update

        def seen(rollout: Any) -> dict[str, float]:
            metrics = update(rollout)
            self.metrics.append({**metrics, "tokens": rollout.num_tokens, "score": float(rollout.score_B.sum())})
            return metrics

        agent.update = seen  # type: ignore[method-assign]

    def _see_gradient(self, *_: object) -> None:
        gradients = [p.grad.flatten() for p in self.agent.policy.parameters() if p.grad is not None]
        self.gradient = torch.cat([getattr(g, "full_tensor", lambda g=g: g)() for g in gradients])

    def go_on(self, *_: object) -> bool:
        """As a callback: False after so many updates."""
        return len(self.metrics) < self.updates


def full_weights(agent: Agent) -> Tensor:
    parameters = [p.detach() for p in agent.policy.parameters()]
    return torch.cat([getattr(p, "full_tensor", lambda p=p: p)().flatten() for p in parameters])


def work(name: str, folder: Path, updates: int, **options: Any) -> None:
    """Train an agent for so many updates, and write down what it comes to."""
    agent = make(name, folder / f"run-{name}")
    record = Record(agent, updates)
    agent.learn(10**9, callback=record.go_on, **(QUIET | options))
    state = {"weights": full_weights(agent), "gradient": record.gradient, "kl_coef": torch.tensor(agent.kl.coef)}
    file = folder / f"{name}-{processes.rank()}"
    save_file(state, file.with_suffix(".safetensors"))
    file.with_suffix(".json").write_text(json.dumps(record.metrics))


def outcome(folder: Path, name: str, rank: int = 0) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """What `work` has written: tensors, and the metrics of each update."""
    file = folder / f"{name}-{rank}"
    return load_file(file.with_suffix(".safetensors")), json.loads(file.with_suffix(".json").read_text())


# -- several processes ------------------------------------------------------------------------------------------------


def fork(number: int, size: int, folder: Path, job: Any) -> int:
    """Run a job as one of several processes; its process number."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    code = 99
    try:
        os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(size)}
        with processes.join(f"file://{folder.resolve()}/store"):
            job()
        code = 0
    except BaseException:  # noqa: BLE001 - shown, and said by the exit code
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def run(size: int, folder: Path, job: Any, seconds: float = 120) -> None:
    """Run a job in so many processes, and wait for all; when one fails the others are ended, as torchrun does it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "store").unlink(missing_ok=True)
    left = {fork(number, size, folder, job) for number in range(size)}
    end = time.monotonic() + seconds
    failed: list[int] = []
    while left:
        for process in sorted(left):
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                left.discard(process)
                if status:
                    failed.append(os.waitstatus_to_exitcode(status))
        if failed or time.monotonic() > end:
            for process in left:
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
            raise SystemExit(f"failed with {failed}" if failed else f"not done after {seconds} seconds")
        time.sleep(0.005)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--work", nargs="+", required=True)
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=120)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for size in args.processes:
        folder = args.folder / str(size)
        run(size, folder, lambda folder=folder: [work(name, folder, args.updates) for name in args.work], args.seconds)


if __name__ == "__main__":
    main()
