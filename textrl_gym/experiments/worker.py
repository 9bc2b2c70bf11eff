"""One run of a comparison, in a process of its own: an agent with a seed and a KL coefficient, trained and evaluated.

`python -m textrl_gym.experiments.worker FOLDER` reads FOLDER/cell.json, goes on from the last checkpoint where there is
one, and writes FOLDER/evaluation.json last: a run is finished when that file is there. Killed at any moment and started
again it ends with the same numbers as if it had never been stopped.

`python -m textrl_gym.experiments.worker --fork` forks a run for each folder that it reads, so that torch and
transformers are imported once, and not by each of many short runs.

With `--processes N` a run is trained by N processes (docs/distributed.md), which the run's own starts and waits for.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import select
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from textrl_gym import files, processes, registry
from textrl_gym.experiments.launching import FORK, STOPPED
from textrl_gym.experiments.reproduce import machine
from textrl_gym.experiments.results import CREDIT, EPISODES, ERROR, FLOPS, LOG, MACHINE, RESULT, SPEC, spec_env
from textrl_gym.mdp.env_settings import EnvSettings, make_env
from textrl_gym.mdp.task import load_env_task
from textrl_gym.persistence.signals import SIGNALS
from textrl_gym.training.config import make_config
from textrl_gym.training.run_folder import renamed

if TYPE_CHECKING:  # the names of files are needed by those who load no torch
    from multiprocessing.process import BaseProcess

    from gymnasium.vector import VectorEnv

    from textrl_gym.training.agent import Agent
    from textrl_gym.training.config import AgentConfig

OURS = frozenset({SPEC, LOG, ERROR, ".lock"})
"""What is kept of a folder when its run begins anew."""
GRACE_SECONDS = 30.0
"""How long the processes of a run may take to end when one of them has failed, before they are killed."""


def main(folder: Path, count: int = 1, shard: bool = False) -> int:
    """Run the cell; 0 when it is finished, 130 after Ctrl-C. An error ends the process, its traceback in the log.

    Args:
        count: processes that train it.
        shard: whether each of them holds a part of what is trained.
    """
    _end_with_parent()
    with _alone(folder):
        try:
            if count > 1:
                return run_together(folder, count, shard)
            run(folder, renamed(files.read_json(folder / SPEC)))
        except KeyboardInterrupt:  # of SIGTERM and SIGHUP too
            return STOPPED
    return 0


def run_together(folder: Path, count: int, shard: bool) -> int:
    """Run the cell by several processes; 0 when it is finished, 130 where it was stopped and has saved.

    Raises:
        ProcessRaisedException: one of them failed, with its traceback.
        RuntimeError: one of them was killed.
    """
    from torch.multiprocessing.spawn import ProcessExitedException, start_processes

    ranks: list[BaseProcess] = []
    stopped: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        stopped.append(number)
        for rank in ranks:
            if rank.is_alive() and rank.pid is not None:
                os.kill(rank.pid, number)

    before = {number: signal.signal(number, forward) for number in SIGNALS}
    try:
        with tempfile.TemporaryDirectory() as scratch:
            arguments = (folder, count, shard, f"file://{scratch}/store", registry.trust_all)
            # Spawned, as CUDA needs it. torchrun would end a run that saves after Ctrl-C, and call it a failure.
            context = start_processes(_rank, arguments, count, join=False)
            ranks += context.processes
            while not context.join(grace_period=GRACE_SECONDS):
                pass
    except ProcessExitedException as error:
        if not stopped:
            (folder / ERROR).unlink(missing_ok=True)  # what the others say after its end is not the cause
            raise RuntimeError(error.msg) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0 if (folder / RESULT).is_file() else STOPPED


def _rank(number: int, folder: Path, count: int, shard: bool, store: str, trust_code: bool) -> None:
    """One of the processes of a run; `store`: where they find each other."""
    # A terminal sends Ctrl-C to all processes of its group, and the one that has started these sends it on.
    os.setpgrp()
    _end_with_parent()
    registry.trust_all = trust_code
    spec = renamed(files.read_json(folder / SPEC))
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(count)}
    if spec["device"] == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # else each process would want a GPU of its own
    with contextlib.ExitStack() as stack:
        stack.enter_context(processes.join(store))
        if not processes.is_first():
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        try:
            run(folder, spec, shard)
        except Exception as error:
            # Before it leaves the others, which fail by that: the first to write has the cause.
            words = " ".join(f"{type(error).__name__}: {error} (process {number} of {count})".split())
            with contextlib.suppress(FileExistsError), (folder / ERROR).open("x", encoding="utf-8") as file:
                file.write(words + "\n")
            raise


def run(folder: Path, spec: dict[str, Any], shard: bool = False) -> None:
    """Train as far as the spec's total, and evaluate; one of the processes of the run, or its only one."""
    registry.register_again(spec["environment"], spec.get("registered"))
    from textrl_gym.evaluation import token_credit
    from textrl_gym.evaluation.evaluator import Evaluator
    from textrl_gym.experiments import play

    # What people and endpoints have played has no policy: that of the initial one says what it is compared with.
    played = play.is_played(spec["agent"])
    agent = initial_agent(spec) if played else train_or_load(folder, spec, shard)
    evaluator = Evaluator(agent.env, spec["eval_episodes"], seed=spec["eval_seed"], gold=spec.get("gold"))
    reference = agent.policy.reference
    if played:
        metrics, samples = play.evaluate_played(Path(spec["agent"]), evaluator, reference)
    else:
        metrics, samples = evaluator.run(agent)
    if reference is not None:  # what the win rate was against, beside each answer
        keys = ("completion", "tokens", "score", "gold", "stop_reason")
        for sample, start in zip(samples, evaluator.start(reference), strict=True):
            sample["start"] = {key: start[key] for key in keys if key in start}
        if not played:
            credit_lines = token_credit.lines(agent, evaluator.mdp, evaluator.indices, spec["eval_seed"])
            files.write_text(folder / CREDIT, "".join(line + "\n" for line in credit_lines))
    lines = "".join(json.dumps(sample) + "\n" for sample in samples)
    files.write_text(folder / EPISODES, lines)
    files.write_text(folder / MACHINE, json.dumps(dict(machine()), indent=1) + "\n")
    seconds = agent.seconds["collect"] + agent.seconds["update"]
    result = {"timesteps": agent.num_timesteps, "updates": agent.num_updates} | metrics | {"train_seconds": seconds}
    # Last of all: a run counts as finished when this file is there, and a reader may come at any time.
    files.write_text(folder / RESULT, json.dumps(result, indent=1) + "\n")


def train_or_load(folder: Path, spec: dict[str, Any], shard: bool) -> Agent:
    """The agent of a saved folder, or the one that training ends with."""
    if Path(spec["agent"]).is_dir():
        return saved_agent(spec)
    agent_class = registry.load_agent_class(spec["agent"])
    # A kill while a checkpoint was moved into place leaves it whole under another name.
    files.finish_folder(folder)
    # What the comparison names was named by the user, and a checkpoint may name it too.
    load_env_task(spec["environment"])
    spec_env(spec).import_code()
    # By the first process alone: a later one would find what the first has begun to write.
    goes_on = processes.from_first(lambda: (folder / files.STATE_FILE).is_file() and agent_class.resumes)
    if goes_on:
        agent = registry.load_agent(folder, device=spec["device"], out=folder)
    else:
        processes.from_first(lambda: begin_anew(folder))
        settings = dict(spec["settings"])
        if spec["kl_coef"] is not None:
            settings["kl_coef"] = spec["kl_coef"]
        # The agent makes its environment from the id; with settings of the comparison's it is made here, as the agent
        # would.
        env = environment(spec, make_config(agent_class.Config, settings, spec["agent"]))
        agent = agent_class(env, spec["model"], seed=spec["seed"], device=spec["device"], out=folder, **settings)
    with counted_flops(agent, folder / FLOPS):
        agent.learn(
            max(0, spec["total_timesteps"] - agent.num_timesteps),
            reset_num_timesteps=not goes_on,
            progress_bar=False,
            eval_every=spec["eval_every"],
            save_every=spec["save_every"],
            on_bad_health=spec.get("on_bad_health", "stop"),  # nor this
            shard=shard and agent.trains,
            gold=spec.get("gold"),  # a comparison of an earlier version names none
        )
    return agent


def initial_agent(spec: dict[str, Any]) -> Agent:
    """The policy that the runs of the comparison start from."""
    load_env_task(spec["environment"])
    spec_env(spec).import_code()
    agent_class = registry.load_agent_class("reference")
    env = environment(spec, make_config(agent_class.Config, {}, "reference"))
    agent: Agent = agent_class(env, spec["model"], seed=spec["seed"], device=spec["device"])
    return agent


def saved_agent(spec: dict[str, Any]) -> Agent:
    """A saved agent, in the comparison's environment where that has settings of its own."""
    settings, folder = spec_env(spec), Path(spec["agent"])
    agent: Agent = registry.load_agent(folder, device=spec["device"])
    if settings == EnvSettings():
        return agent
    load_env_task(spec["environment"])
    settings.import_code()
    config = {"rollout_episodes": agent.env.num_envs, "group_size": agent.env.group_size}
    # Of the agent's tokenizer: the environment's may have other tokens for the same ids.
    model = str(files.whole_checkpoint(folder) / "model")
    env = make_env(spec["environment"], settings, model, spec["device"], config)
    return registry.load_agent(folder, env, device=spec["device"])


@contextlib.contextmanager
def counted_flops(agent: Agent, file: Path) -> Iterator[None]:
    """Inside, the agent's first rollout and update are counted, once in a run, and written down.

    PyTorch sees no operations inside CUDA graphs, so with them nothing is counted.
    """
    from textrl_gym.models import flops
    from textrl_gym.rollouts.phases import Phase, listening

    if agent.num_updates or not agent.trains or agent.config.cuda_graphs:
        yield
        return
    counted: dict[Phase, int] = {}
    begun_at = agent.num_timesteps

    @contextlib.contextmanager
    def count(phase: Phase) -> Iterator[None]:
        # Once: the counter handles each operation in Python, which would slow the whole run down.
        if phase not in ("collect", "update") or phase in counted:
            yield
            return
        with flops.counter() as counter:
            yield
        counted[phase] = counter.get_total_flops()
        if phase == "update":
            tokens = agent.num_timesteps - begun_at
            flop = sum(processes.gather(sum(counted.values())))
            files.write_text(file, json.dumps({"flop": flop, "tokens": tokens}) + "\n")

    with listening(count):
        yield


def environment(spec: dict[str, Any], config: AgentConfig) -> str | VectorEnv[Any, Any, Any]:
    """The environment's id or, where the comparison has settings of it, the environment with them."""
    settings = spec_env(spec)
    if settings == EnvSettings():
        return spec["environment"]
    return make_env(spec["environment"], settings, spec["model"], spec["device"], dataclasses.asdict(config))


def begin_anew(folder: Path) -> None:
    """Empty a folder but for what the comparison keeps there."""
    for item in folder.iterdir():
        if item.name not in OURS:
            shutil.rmtree(item) if item.is_dir() else item.unlink()


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Only one process at a time works in a folder; a second waits for the end of the first."""
    with (folder / ".lock").open("w", encoding="utf-8") as lock:
        # The system lets go of the lock when the process ends, however it ends; a file with a process id would stay.
        files.lock(lock.fileno())
        yield


def _end_with_parent() -> None:
    """Without the process that shows and schedules it, a run ends too, so that it is never run twice."""
    # A scheduler that is killed cannot end its runs, and the next one would start them again in the same folders.
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        # Not sys.exit, which ends this thread alone; nothing needs tidying up, since files are moved into place whole.
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def import_all() -> None:
    """Import torch, transformers and what else every run needs."""
    from textrl_gym.evaluation import token_credit  # noqa: F401
    from textrl_gym.training import agent  # noqa: F401


def fork_runs(count: int = 1, shard: bool = False) -> int:
    """Fork a run of so many processes for each folder on standard input, a JSON string a line.

    At a run's end it prints [folder, exit code]. It ends when its input and all runs have ended, or without the process
    that started it.
    """
    # Ctrl-C is for the runs, which save and end.
    heard = signal.signal(signal.SIGINT, signal.SIG_IGN)
    import_all()
    parent, ended, rest = os.getppid(), False, b""
    running: dict[int, str] = {}
    while (not ended or running) and os.getppid() == parent:
        # Not readline: a line in Python's own buffer would not wake select.
        if not ended and select.select([sys.stdin.fileno()], [], [], 0.05)[0]:
            read = os.read(sys.stdin.fileno(), 1 << 16)
            ended = not read
            *lines, rest = (rest + read).split(b"\n")
            for folder in map(json.loads, lines):
                if (child := os.fork()) == 0:
                    signal.signal(signal.SIGINT, heard)
                    _run_and_exit(Path(folder), count, shard)
                running[child] = folder
        elif ended:
            time.sleep(0.05)
        while running and (end := os.waitpid(-1, os.WNOHANG))[0]:
            code = os.waitstatus_to_exitcode(end[1])
            print(json.dumps([running.pop(end[0]), code]), flush=True)
    return 0


def _run_and_exit(folder: Path, count: int, shard: bool) -> None:
    """In a forked process: run the folder's cell with its log as the output, and end the process."""
    code = 1
    try:
        with (folder / LOG).open("ab") as log, open(os.devnull, "rb") as nothing:
            os.dup2(nothing.fileno(), 0)
            for output in (1, 2):
                os.dup2(log.fileno(), output)
        code = main(folder, count, shard)
    finally:  # whatever was raised: this process must not go on in its parent's loop
        if sys.exc_info()[0] is not None:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument(FORK, action="store_true")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--shard", action="store_true")
    parser.add_argument("--trust-code", action="store_true")
    given = parser.parse_args()
    registry.trust_all = given.trust_code
    sys.exit((fork_runs if given.fork else functools.partial(main, given.folder))(given.processes, given.shard))
