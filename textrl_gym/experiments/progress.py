"""How far the runs of a comparison are: read from their folders, and shown as a live table."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from textrl_gym.console import plain
from textrl_gym.experiments.results import ERROR, progress, state_of

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text


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

    def __enter__(self) -> LiveTable:
        self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def __call__(self, running: set[str]) -> None:
        """Show the state of things, at most once a second."""
        # Called five times a second by the scheduler, and each time reads a file for each run.
        if running and time.monotonic() - self.shown_at < 1:
            return
        self.shown_at = time.monotonic()
        if not self.console.is_terminal:
            self._tell_changes(running)
        self.live.update(self._table(running), refresh=True)

    def _tell_changes(self, running: set[str]) -> None:
        for name, folder in self.folders.items():
            state, row = state_of(folder, name in running), progress(folder)
            if state == self.states[name]:
                continue
            self.states[name] = state
            score = f", score {row['rollout/score']:.3f}" if state == "done" and "rollout/score" in row else ""
            self.console.print(plain(f"{time.strftime('%H:%M:%S')} {name}: {state}{score}"), highlight=False)

    def _table(self, running: set[str]) -> Table:
        from rich.table import Table

        table = Table("run", "state", "tokens", "score", "KL nats/seq", "left")
        for name, folder in self.folders.items():
            state, row = state_of(folder, name in running), progress(folder)
            done = int(row.get("time/total_timesteps", 0))
            numbers = [f"{row[key]:.3f}" if key in row else "" for key in ("rollout/score", "rollout/kl_sequence")]
            tokens = f"{min(done / self.total, 1):4.0%}" if done else ""
            table.add_row(plain(name), self._coloured(state, folder), tokens, *numbers, self._left(name, state, done))
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
