"""Running one run of a comparison again, to see whether it comes out the same."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from textrl_gym import files, processes, registry
from textrl_gym.experiments.compare import versions
from textrl_gym.experiments.launching import RunProcesses
from textrl_gym.experiments.results import LOG, MACHINE, PLAN, RESULT, SPEC, read_plan, read_spec, spec_env

TIMES = frozenset({"train_seconds"})
"""What is no result of a run."""


@dataclasses.dataclass(frozen=True)
class Reproduction:
    """A run and its repetition."""

    before: dict[str, Any]
    again: dict[str, Any]
    machine_before: dict[str, Any]
    machine_again: dict[str, Any]

    @property
    def differences(self) -> dict[str, tuple[Any, Any]]:
        """Numbers of the last evaluation that are not equal, bit for bit."""
        names = dict.fromkeys([*self.before, *self.again])
        pairs = {name: (self.before.get(name), self.again.get(name)) for name in names if name not in TIMES}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    @property
    def other_machine(self) -> dict[str, tuple[Any, Any]]:
        """What of the machine and the versions is not as it was, of what is known."""
        names = [name for name in self.machine_before if name in self.machine_again]
        pairs = {name: (self.machine_before[name], self.machine_again[name]) for name in names}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    def words(self) -> str:
        """What came out, in a sentence or two."""
        count = len({*self.before, *self.again} - TIMES)
        if not self.differences:
            return f"The same: all {count} numbers of the last evaluation, bit for bit."
        lines = [f"{name}: {before!r}, now {again!r}" for name, (before, again) in self.differences.items()]
        text = f"{len(lines)} of {count} numbers of the last evaluation differ. " + "; ".join(lines) + "."
        if self.other_machine:
            changes = (f"{name} {before!r}, now {again!r}" for name, (before, again) in self.other_machine.items())
            return f"{text} So does the machine, which rounds sums in its own way: {', '.join(changes)}."
        return f"{text} Machine and versions are the same as far as they were written down."


def reproduce(run: str | Path, out: str | Path | None = None, *, trust_code: bool = False) -> Reproduction:
    """Run a finished run of a comparison again, with its settings and its numbers of threads and processes.

    Args:
        run: the run's folder, COMPARISON/runs/NAME.
        out: where the repetition is kept; None: nowhere.
        trust_code: import what the folder names, though it is not part of textrl_gym; see Agent.load.

    Raises:
        ValueError: the folder holds no finished run of a comparison, or names code that is not trusted.
        RuntimeError: the repetition failed, with its reason.
    """
    run = Path(run)
    if not (run / SPEC).is_file() or not (run / RESULT).is_file():
        raise ValueError(f"{str(run)!r} holds no finished run of a comparison: name COMPARISON/runs/NAME")
    spec = read_spec(run)
    plan_file = run.parent.parent / PLAN
    if plan_file.is_file():
        with registry.named_by(plan_file, trust_code):
            registry.register_again(spec["environment"], read_plan(plan_file.parent).get("registered"))
    _import_named(run / SPEC, spec, trust_code)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(out or scratch)
        files.make_folder(folder)
        if any(folder.iterdir()):
            raise ValueError(f"{str(folder)!r} is not empty: name another folder")
        files.write_text(folder / SPEC, json.dumps(spec, indent=1) + "\n")
        before = _machine(run)
        trust = registry.trust_all or trust_code
        _run(folder, RunProcesses(before.get("threads"), before.get("processes", 1), trust_code=trust))
        return Reproduction(files.read_json(run / RESULT), files.read_json(folder / RESULT), before, _machine(folder))


def _import_named(file: Path, spec: dict[str, Any], trust_code: bool) -> None:
    """Import all code that a run names, as a file that may be somebody else's.

    The process of the run takes what it is asked for as the user's words.
    """
    from textrl_gym.judges.judge import load_scorer
    from textrl_gym.rewards import load_reward

    with registry.named_by(file, trust_code):
        registered = spec.get("registered") or {}
        registry.register_again(spec["environment"], registered or None)
        task = spec_env(spec).task(spec["environment"])
        if not Path(spec["agent"]).is_dir():  # the folder of a saved agent is read as a file's words anyway
            registry.load_agent_class(spec["agent"])
        for reward in (registered.get("reward"), spec_env(spec).reward and task.reward):
            if reward is not None:
                load_reward(reward, task=task)
        if spec.get("gold") is not None:
            load_scorer(spec["gold"], task=task)


def _run(folder: Path, how: RunProcesses) -> None:
    command = how.command(str(folder))
    done = subprocess.run(command, env=how.environment(), capture_output=True, text=True, check=False)
    files.write_text(folder / LOG, done.stdout + done.stderr)
    if done.returncode:
        last = (done.stderr.strip() or "it said nothing").splitlines()[-1]
        raise RuntimeError(f"the run ended with exit code {done.returncode}: {last}")


def _machine(run: Path) -> dict[str, Any]:
    """Threads, processor and versions of a run; empty where an earlier version did not write them down."""
    file = run / MACHINE
    return files.read_json(file) if file.is_file() else {}


def machine() -> Mapping[str, Any]:
    """What a run's numbers depend on beside its settings."""
    import platform

    import torch

    return {
        "threads": torch.get_num_threads(),
        "processes": processes.size(),
        "processor": _processor() or platform.machine(),
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
        **versions(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else ""
