"""How far the runs of a comparison are: read from their folders, and shown as a live table."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from textrl_gym.console import plain
from textrl_gym.experiments.results import ERROR, progress, state_of

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text


MOST = 30
"""Runs of a table that shows all; of more it shows those that are going on or have failed, and counts the others."""


class LiveTable:
    """A line a run: its state, how far it is, score, KL and the time that is left.

    Where nobody watches (a pipe, a log) a line is printed whenever a run begins or ends, and the table at the end.
    """

    def __init__(self, folders: Mapping[str, Path], total: int, enabled: bool = True) -> None:
        from rich.console import Console
        from rich.live import Live

        self.folders, self.total = folders, total
        self.began: dict[str, tuple[float, int]] = {}
        self.shown_at = 0.0
        self.console = Console(stderr=True, quiet=not enabled)
        self.live = Live(console=self.console, auto_refresh=False)
        self.states = {name: state_of(folder, running=False) for name, folder in folders.items()}
        self.running = set(folders)  # the first call looks at all: what failed before may be waiting now

    def __enter__(self) -> LiveTable:
        self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._changes(set())
        self.live.update(self._table())
        self.live.stop()
        if not self.console.is_terminal:  # only there Live ends its last line itself
            self.console.line()

    def __call__(self, running: set[str]) -> None:
        """Show the state of things, at most once a second."""
        # Called five times a second by the scheduler.
        if running and time.monotonic() - self.shown_at < 1:
            return
        self.shown_at = time.monotonic()
        changes = self._changes(running)
        if self.console.is_terminal:
            self.live.update(self._table(), refresh=True)
            return
        for name in changes:
            row = progress(self.folders[name])
            score = f", score {row['rollout/score']:.3f}" if "rollout/score" in row else ""
            words = self.states[name] + (score if self.states[name] == "done" else "")
            self.console.print(plain(f"{time.strftime('%H:%M:%S')} {name}: {words}"), highlight=False)

    def _changes(self, running: set[str]) -> list[str]:
        """The runs whose state is another one now; only those that went on or go on can be."""
        names = [name for name in self.folders if name in running | self.running]
        states = {name: state_of(self.folders[name], name in running) for name in names}
        # A run that failed before and is tried again has not changed yet.
        forgotten = {name for name, state in states.items() if (self.states[name], state) == ("failed", "waiting")}
        changes = [name for name, state in states.items() if state != self.states[name] and name not in forgotten]
        self.states |= states
        self.running = set(running)
        return changes

    def _table(self) -> Table:
        from rich.table import Table

        table = Table("run", "state", "tokens", "score", "KL nats/seq", "left")
        whole = len(self.folders) <= MOST
        for name, folder in self.folders.items():
            state = self.states[name]
            if not whole and state in ("done", "waiting"):
                continue
            row = progress(folder)
            done = int(row.get("time/total_timesteps", 0))
            numbers = [f"{row[key]:.3f}" if key in row else "" for key in ("rollout/score", "rollout/kl_sequence")]
            tokens = f"{min(done / self.total, 1):4.0%}" if done else ""
            table.add_row(plain(name), self._coloured(state, folder), tokens, *numbers, self._left(name, state, done))
        if not whole:
            counts = Counter(self.states.values())
            table.caption = f"{counts['done']} of {len(self.folders)} runs done, {counts['waiting']} waiting"
        return table

    def _coloured(self, state: str, folder: Path) -> Text:
        if state == "failed":
            return plain(f"failed: {(folder / ERROR).read_text(encoding='utf-8').strip()[:80]}", style="red")
        return plain(state, style={"done": "green", "running": "bold", "waiting": "dim"}[state])

    def _left(self, name: str, state: str, done: int) -> str:
        if state != "running":
            self.began.pop(name, None)
            return ""
        # From this call on: the time before a stop says nothing of the speed now.
        since, before = self.began.setdefault(name, (time.monotonic(), done))
        if done <= before:
            return ""
        seconds = (time.monotonic() - since) * (self.total - done) / (done - before)
        return f"{max(seconds, 0):,.0f} s"
