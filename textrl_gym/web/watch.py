"""A comparison's page over HTTP while its runs go on.

There are two addresses: / is the page, made anew where a run has ended since, and /status a small JSON object with the
page's version and how far each run is. Nothing is written. Who may look is said in `web.server`.
"""

from __future__ import annotations

import fcntl
import hashlib
import math
import threading
from pathlib import Path
from typing import Any

from markupsafe import escape

from textrl_gym.charts.plotting import go
from textrl_gym.experiments.results import ERROR, PLAN, RESULT, RUNS, SPEC, progress, read_spec, state_of
from textrl_gym.reports.comparison_page import asset, live_page
from textrl_gym.web.server import LOOPBACK, PageServer, Reply, json_reply

# -- what is shown ----------------------------------------------------------------------------------------------------


def version(folder: Path) -> str:
    """Changes when a run has ended, in success or failure, is tried again, and when the plan does."""
    files = [folder / PLAN, *sorted((folder / RUNS).glob(f"*/{RESULT}"))]
    # By time and size and not by content: it is asked for every few seconds.
    stamps = [f"{file} {file.stat().st_mtime_ns} {file.stat().st_size}" for file in files]
    stamps += sorted(str(file) for file in (folder / RUNS).glob(f"*/{ERROR}"))  # gone when its run is tried again
    return hashlib.sha256("\n".join(stamps).encode()).hexdigest()[:16]


def status(folder: Path) -> dict[str, Any]:
    """The page's version, and of each run its state, tokens, score, KL and the seconds that are left."""
    runs = [_status_of(file.parent) for file in sorted((folder / RUNS).glob(f"*/{SPEC}"))]
    return {"version": version(folder), "runs": runs}


def _status_of(run: Path) -> dict[str, Any]:
    total = read_spec(run)["total_timesteps"]
    state, row = state_of(run, running(run)), progress(run)
    done = int(row.get("time/total_timesteps", 0))
    spent = sum(row.get(f"time/{phase}_seconds", 0.0) for phase in ("collect", "update", "evaluate"))
    # By the run's own seconds and not by the clock: it may have been stopped in between.
    left = max(total - done, 0) * spent / done if state == "running" and done else None
    score, kl = (_finite(row.get(f"rollout/{name}")) for name in ("score", "kl_sequence"))
    return {"run": run.name, "state": state, "done": done, "total": total, "score": score, "kl": kl, "left": left}


def _finite(x: float | None) -> float | None:
    return x if x is not None and math.isfinite(x) else None


def running(run: Path) -> bool:
    """Whether a process works on the run: it holds the folder's lock then."""
    try:
        with (run / ".lock").open(encoding="utf-8") as lock:
            # A shared lock that does not wait; it is let go at once, so that a worker that begins just now is not kept
            # out.
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


class Pages:
    """The page of a folder, made when it is asked for and a run has ended since it was made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._made = ("", b"")

    def __call__(self) -> bytes:
        # Several browsers ask at the same time, and the page takes seconds to make.
        with self._lock:
            now = version(self.folder)
            if self._made[0] != now:
                self._made = (now, self._make(now).encode())
            return self._made[1]

    def _make(self, now: str) -> str:
        if not any((self.folder / RUNS).glob(f"*/{RESULT}")):
            # The page asks again by itself, so that it may be opened as soon as a comparison starts.
            return waiting_page(now, "No run has finished yet. The page comes with the first.")
        try:
            return live_page(self.folder, now)
        except ValueError as error:  # a broken file, say: the others may be whole by the next time
            return waiting_page(now, str(error))


def waiting_page(now: str, words: str) -> str:
    """What is shown while there is nothing to compare."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Comparison</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>\n{asset('page.css')}</style></head>\n<body><header><h1>Comparison</h1><p>{escape(words)}</p></header>"
        f'<main><div id="live" data-version="{now}"></div></main><script>\n{asset("live.js")}</script></body></html>\n'
    )


# -- the server -------------------------------------------------------------------------------------------------------


class WatchServer(PageServer):
    """Serves one folder."""

    def __init__(self, folder: Path, host: str, port: int) -> None:
        self.pages = Pages(folder)
        super().__init__(
            host,
            port,
            {"/": lambda: Reply(self.pages(), "text/html"), "/status": lambda: json_reply(status(folder))},
        )


def make_server(folder: Path, host: str = LOOPBACK, port: int = 0) -> WatchServer:
    """A server that is bound and not yet serving.

    Raises:
        ValueError: the folder holds no comparison, or the port is out of range.
        OSError: the port is taken, or the host is no address of this machine.
        ImportError: plotly is not installed.
    """
    if not (folder / PLAN).is_file():
        raise ValueError(
            f"{str(folder)!r} holds no comparison: no {PLAN}; of a single run `textrl-gym report` makes a page"
        )
    go()  # before the first request
    return WatchServer(folder, host, port)
