"""Trainings by several processes, and the same by one: what tests of both compare.

    python tests/ranks.py FOLDER --processes 2 --work grpo ppo --updates 3

A process that has imported everything forks the others, which find each other by a file in FOLDER. Each writes what it
ends with to FOLDER/WORK-RANK.safetensors, and the metrics of its updates beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: forked threads would be lost

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from textrl_gym import files, processes
from textrl_gym.experiments import compare, worker
from textrl_gym.mdp.env_settings import EnvSettings
from textrl_gym.persistence.save_schedule import SaveOptions
from textrl_gym.pipeline import reward_model, sft
from textrl_gym.pipeline.reward_data import RewardModelConfig
from textrl_gym.registry import load_agent_class
from textrl_gym.training import run_folder
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
    """An agent of few rows, whose minibatches have several parts of ragged lengths; the one that is saved in out."""
    if processes.from_first(lambda: run_folder.holds_run(out)):
        return load_agent_class(name).load(out, out=out, device="cpu")
    batch: dict[str, Any] = {"rollout_episodes": 16, "micro_batch_tokens": 120, "device": "cpu"}
    cls = load_agent_class(name)
    batch |= {"group_size": 4} if cls.Config().group_size > 1 or cls.needs_groups else {}
    return cls(ENV, seed=5, out=out, **(batch | SETTINGS.get(name, {}) | settings))


class Record:
    """What the updates of an agent did, by its hooks."""

    def __init__(self, agent: Agent, updates: int) -> None:
        self.agent, self.updates = agent, updates
        self.gradient = torch.zeros(0)
        self.reference = 0  # numbers of it that this process holds during an update
        self.metrics: list[dict[str, float]] = []
        update = agent.update

        def seen(rollout: Any) -> dict[str, float]:
            hook = agent.optimizer.register_step_pre_hook(self._see_gradient)  # sharding makes another optimizer
            metrics = update(rollout)
            hook.remove()
            self.metrics.append({**metrics, "tokens": rollout.num_tokens, "score": float(rollout.score_B.sum())})
            return metrics

        agent.update = seen  # type: ignore[method-assign]

    def _see_gradient(self, *_: object) -> None:
        gradients = [p.grad for p in self.agent.policy.parameters() if p.grad is not None]
        reference = self.agent.policy.reference
        self.reference = 0 if reference is None else sum(p.numel() for p in reference.parameters())
        self.gradient = torch.cat([processes.whole(gradient).flatten() for gradient in gradients])

    def go_on(self, *_: object) -> bool:
        """As a callback: False after so many updates."""
        return len(self.metrics) < self.updates

    def interrupt(self, *_: object) -> bool:
        """As a callback: Ctrl-C after so many updates, which the last process alone hears."""
        if len(self.metrics) == self.updates and processes.rank() == processes.size() - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return True


def full_weights(agent: Agent) -> Tensor:
    return torch.cat([processes.whole(p.detach()).flatten() for p in agent.policy.parameters()])


def is_supervised(name: str) -> bool:
    """Whether a work is of sft or reward-model."""
    return name.partition("+")[0] in ("sft", "reward-model")


def supervised(name: str, folder: Path, updates: int) -> None:
    """Supervised training by so many updates, in FOLDER/run-NAME."""
    command, *more = name.split("+")
    out, env = folder / f"run-{name}", EnvSettings(max_prompt_tokens=8, max_new_tokens=8)
    same: dict[str, Any] = {"device": "cpu", "micro_batch_tokens": 40, "shard": "shard" in more}
    same |= {"gradient_checkpointing": "checkpointed" in more, "lora_rank": 2 if "lora" in more else 0}
    if command == "sft":
        shape: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "layers": 2, "vocab_size": 300}
        rows: dict[str, Any] = {"batch_size": 6, "copy_steps": 3, "copy_run": 8, "eval_rows": 4}
        save = SaveOptions(save_every=5 if "failing" in more else 0)
        sft.sft(ENV, sft.SFTConfig(steps=updates, **shape, **rows, **same), out, env, save)
        return
    pairs = processes.from_first(lambda: write_pairs(folder / "pairs.jsonl", 6 * updates))
    reward_model.train_reward_model(ENV, RewardModelConfig(dataset=(str(pairs),), batch_size=5, **same), out)


def write_pairs(file: Path, number: int) -> Path:
    """A data set of so many preferences; its file."""
    file.parent.mkdir(exist_ok=True)
    rng = random.Random(0)
    texts = [" ".join(rng.choices("abcd", k=rng.randint(1, 3))) for _ in range(number)]
    rows = [{"prompt": text, "chosen": text, "rejected": f"{text[-1]} {text[-1]} a"} for text in texts]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


class Steps:
    """What optimizers of supervised training do, by a hook behind their steps."""

    def __init__(self, stop_after: int | None = None) -> None:
        """stop_after: Ctrl-C behind so many steps, which the last process alone hears; None: never."""
        self.stop_after, self.number = stop_after, 0
        self.held = self.moments = 0  # numbers of moments: those of this process, and all

    def __call__(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        moments = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
        self.held = sum(processes.local(value).numel() for value in moments)
        self.moments = sum(value.numel() for value in moments)
        self.number += 1
        if self.number == self.stop_after and processes.rank() == processes.size() - 1:
            os.kill(os.getpid(), signal.SIGINT)


def supervised_work(name: str, folder: Path, updates: int, chain: Path | None) -> None:
    """Train, and write what a process holds; of a chain several processes stop after 4 updates, one goes to the end."""
    stops = chain is not None and processes.size() > 1 and "failing" not in name
    steps = Steps(4 if stops else None)
    hook = register_optimizer_step_post_hook(steps)
    if "failing" in name and processes.size() > 1 and processes.rank() == 0:
        losses = sft.Supervised.losses

        def failing(phase: sft.Supervised, step: int) -> Iterator[Tensor]:
            if step == 3:
                raise ConnectionError("the rows are away")
            return losses(phase, step)

        sft.Supervised.losses = failing  # type: ignore[method-assign, assignment]
    try:
        with contextlib.suppress(KeyboardInterrupt):
            supervised(name, chain or folder, updates)
    finally:
        hook.remove()
    answers = {"held": steps.held, "moments": steps.moments, "steps": steps.number}
    (folder / f"{name}-{processes.rank()}-held.json").write_text(json.dumps(answers))


def primitives(folder: Path) -> None:
    """What textrl_gym.processes gives to each process, into primitives-RANK.json."""
    rank = processes.rank()
    one, two, unused = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
    parts = processes.deal([1.0, 2.0, 4.0])
    one.grad = torch.full((2,), sum(parts))
    if rank == 0:  # a process whose parts do not use a parameter
        two.grad = torch.ones(2)
    processes.add_gradients([one, two, unused])
    processes.add_gradients([one, two, unused])  # nothing was dealt since
    difference = ""
    try:
        processes.require_equal("the weight", rank)
    except RuntimeError as error:
        difference = str(error)
    blocks = [processes.share(units) for units in (1, 5)]
    answers = {
        "blocks": [[block.start, block.stop] for block in blocks],
        "parts": list(parts),
        "gradients": [one.grad.tolist(), two.grad.tolist() if two.grad is not None else None, unused.grad],
        "total": processes.total(torch.tensor([1.0, float(rank)])).tolist(),
        "total_of": processes.total_of({"both": 1.0, f"of {rank}": 2.0}),
        "gather": processes.gather(f"I am {rank}"),
        "from_first": processes.from_first(lambda: rank + 10),
        "most": processes.most(rank),
        "difference": difference,
    }
    (folder / f"primitives-{rank}.json").write_text(json.dumps(answers))


def compared(folder: Path) -> None:
    """A run of a comparison: FOLDER/compared/runs/grpo-0."""
    sizes: dict[str, Any] = {"total_timesteps": 120, "eval_episodes": 8, "save_every": 1, "device": "cpu"}
    config = compare.CompareConfig(agents=("grpo",), set=("grpo.rollout_episodes=16",), seeds=1, **sizes)
    (run,) = processes.from_first(lambda: compare.prepare(folder / "compared", ENV, config)).values()
    worker.run(run, files.read_json(run / "cell.json"))


def work(name: str, folder: Path, updates: int, chain: Path | None = None, vllm_url: str | None = None) -> None:
    """Train for so many updates, and write down what it comes to.

    Args:
        chain: a folder with runs to go on with, or to begin, which end by Ctrl-C; None: they begin in `folder`.
        vllm_url: of the server that samples the rollouts; None: the processes do.
    """
    if name in ("primitives", "compared"):
        (primitives if name == "primitives" else compared)(folder)
        return
    if is_supervised(name):
        supervised_work(name, folder, updates, chain)
        return
    cls, *more = name.split("+")
    agent = make(cls, (chain or folder) / f"run-{name}", **({"lora_rank": 2} if "lora" in more else {}))
    goes_on, record = agent.num_updates > 0, Record(agent, updates)
    settings = QUIET | {"shard": "shard" in more, "reset_num_timesteps": not goes_on}
    settings |= {} if vllm_url is None else {"vllm_url": vllm_url, "vllm_transfer": "disk"}
    with contextlib.suppress(KeyboardInterrupt):
        agent.learn(10**9, callback=record.interrupt if chain else record.go_on, **settings)
    state = {"weights": full_weights(agent), "gradient": record.gradient, "kl_coef": torch.tensor(agent.kl.coef)}
    trained = [p for group in agent.optimizer.param_groups for p in group["params"]]
    state["reference"] = torch.tensor(record.reference)
    state["held"] = torch.tensor(sum(processes.local(p).numel() for p in trained))
    state["trained"] = torch.tensor(sum(p.numel() for p in trained))
    file = folder / f"{name}-{processes.rank()}"
    save_file(state, file.with_suffix(".safetensors"))
    file.with_suffix(".json").write_text(json.dumps(record.metrics))


def works(names: list[str], folder: Path, updates: int, chain: Path | None, vllm_url: str | None) -> None:
    for name in names:
        work(name, folder, updates, chain, vllm_url)


def outcome(folder: Path, name: str, rank: int = 0) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """What `work` has written: tensors, and the metrics of each update."""
    if is_supervised(name):  # only the first process has written
        return load_file(folder / f"run-{name}" / "model.safetensors"), files.read_json_lines(
            folder / f"run-{name}" / "progress.json"
        )
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
    # Behind the name of an agent, of sft or of reward-model: +shard, updates are sharded; +lora, a LoRA is trained; and
    # of these two +checkpointed, gradients are; sft+failing, the first of several fails alone in the 7th update
    parser.add_argument("--work", nargs="+", required=True)
    parser.add_argument("--chain", action="store_true", help="each number of processes goes on where the last ended")
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--vllm-url")
    parser.add_argument("--seconds", type=float, default=120)
    args = parser.parse_args()
    torch.set_num_threads(1)
    chain = args.folder / "chain" if args.chain else None
    for size in args.processes:
        folder = args.folder / str(size)
        run(size, folder, functools.partial(works, args.work, folder, args.updates, chain, args.vllm_url), args.seconds)


if __name__ == "__main__":
    main()
