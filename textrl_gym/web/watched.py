"""What a watched folder holds: a comparison, one over tasks, single runs or nothing yet; and how far its runs are."""

from __future__ import annotations

import fcntl
import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from textrl_gym import files
from textrl_gym.experiments.results import ERROR, PLAN, RESULT, RUNS, SPEC, progress, read_plan, read_spec, state_of
from textrl_gym.experiments.suite import SUITE
from textrl_gym.persistence.run_lock import LOCK
from textrl_gym.reports.run_page import curves
from textrl_gym.training.run_folder import EVALUATIONS, Run, find_runs, read_evaluations, read_rollouts


@dataclass(frozen=True)
class Watched:
    """A folder as it is now."""

    folder: Path
    kind: Literal["comparison", "suite", "runs", "nothing"]
    runs: dict[str, Path]
    """By name, finished or not."""

    @property
    def tasks(self) -> list[str]:
        """The environments of a comparison over tasks, each a folder."""
        plan = files.read_json(self.folder / SUITE)
        files.check_fields(plan, self.folder / SUITE, {"environments": (list,)})
        return [str(name) for name in plan["environments"]]

    @property
    def version(self) -> str:
        """Changes when there is something new for the page.

        Of comparisons that a run has ended or is tried again, or another plan; of single runs an evaluation.
        """
        logs = [self.folder / PLAN, self.folder / SUITE]
        logs += [run / (EVALUATIONS if self.kind == "runs" else RESULT) for run in self.runs.values()]
        gone = [str(run) for run in self.runs.values() if (run / ERROR).exists()]  # none when it is tried again
        return _stamp(logs, [self.kind, str(self.folder.is_dir()), *gone])

    def status(self) -> dict[str, Any]:
        """The versions of page and curves, and of each run its state, tokens, score, KL and the seconds left."""
        logs = [log for run in self.shown.values() for log in (*run.glob("progress*.json"), run / EVALUATIONS)]
        runs = [self._status_of(name, run) for name, run in self.runs.items()]
        return {"version": self.version, "curves": _stamp(logs, self.shown), "runs": runs}

    def _status_of(self, name: str, run: Path) -> dict[str, Any]:
        state, row, total = self._state(run), progress(run), self._total(run)
        done = int(row.get("time/total_timesteps", 0))
        spent = sum(row.get(f"time/{phase}_seconds", 0.0) for phase in ("collect", "update", "evaluate"))
        # By the run's own seconds and not by the clock: it may have been stopped in between.
        left = max(total - done, 0) * spent / done if state == "running" and done and total else None
        score, kl = (_finite(row.get(f"rollout/{key}")) for key in ("score", "kl_sequence"))
        return {"run": name, "state": state, "done": done, "total": total, "score": score, "kl": kl, "left": left}

    def _state(self, run: Path) -> str:
        if self.kind != "runs":
            return state_of(run, is_locked(run / ".lock"))
        if is_locked(run / LOCK):
            return "running"
        return "done" if self._saved(run).get("finished") else "stopped"

    def _total(self, run: Path) -> int | None:
        total = self._saved(run).get("total_timesteps") if self.kind == "runs" else read_spec(run)["total_timesteps"]
        return total if isinstance(total, int) else None

    @staticmethod
    def _saved(run: Path) -> dict[str, Any]:
        return files.read_json(run / files.STATE_FILE) if (run / files.STATE_FILE).is_file() else {}

    @property
    def shown(self) -> dict[str, Path]:
        """Runs whose curves are drawn: of a comparison those under way, since the page has the others'."""
        going = {name: run for name, run in self.runs.items() if self.kind == "runs" or not (run / RESULT).is_file()}
        return {name: run for name, run in going.items() if (run / EVALUATIONS).is_file() or progress(run)}

    def curves_html(self) -> str:
        """The curves of these runs, an SVG each; nothing where there are none."""
        runs = [
            Run(name, [e.row for e in read_evaluations(run)], read_rollouts(run), [], {})
            for name, run in self.shown.items()
        ]
        return curves(runs, self._colors(list(self.shown))) if runs else ""

    def _colors(self, names: list[str]) -> list[int]:
        """A colour for each agent, as the comparison's page has it; of single runs for each run."""
        if self.kind != "comparison":
            return [list(self.runs).index(name) for name in names]
        agents = read_plan(self.folder)["config"]["agents"]
        of_runs = [read_spec(self.runs[name])["agent"] for name in names]
        return [agents.index(agent) if agent in agents else len(agents) for agent in of_runs]


def look(folder: Path) -> Watched:
    """What the folder holds now; it need not be there.

    Raises:
        ValueError: its plan is broken.
    """
    if (folder / PLAN).is_file():
        return Watched(folder, "comparison", _runs_of(folder))
    if (folder / SUITE).is_file():
        tasks = Watched(folder, "suite", {}).tasks
        runs = {f"{task}/{name}": run for task in tasks for name, run in _runs_of(folder / task).items()}
        return Watched(folder, "suite", runs)
    try:
        single = find_runs(folder)
    except ValueError:
        return Watched(folder, "nothing", {})
    return Watched(folder, "runs", {run.resolve().name: run for run in single})


def _runs_of(comparison: Path) -> dict[str, Path]:
    return {file.parent.name: file.parent for file in sorted((comparison / RUNS).glob(f"*/{SPEC}"))}


def _stamp(logs: Iterable[Path], more: Iterable[str]) -> str:
    # By time and size and not by content: it is asked for every few seconds.
    stamps = [f"{log} {log.stat().st_mtime_ns} {log.stat().st_size}" for log in logs if log.exists()]
    return hashlib.sha256("\n".join([*stamps, *more]).encode()).hexdigest()[:16]


def _finite(x: float | None) -> float | None:
    return x if x is not None and math.isfinite(x) else None


def is_locked(lock: Path) -> bool:
    """Whether a process holds the lock: it works on the run then."""
    try:
        with lock.open(encoding="utf-8") as opened:
            # A shared lock that does not wait; it is let go at once, so that a worker that begins just now is not kept
            # out.
            fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
