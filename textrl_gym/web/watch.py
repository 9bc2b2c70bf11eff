"""A page over HTTP while runs go on: of a comparison, of one over tasks, of single runs, or of what is to come.

Addresses: / is the page, made anew where there is something new for it; /status a small JSON object with the page's
version and how far each run is; /curves the learning curves of the runs under way, from the first update on; and of a
comparison over tasks /ENV/report.html. Nothing is written. Who may look is said in `web.server`.
"""

from __future__ import annotations

import functools
import threading
from pathlib import Path

from markupsafe import escape

from textrl_gym.charts.plotting import go
from textrl_gym.experiments.results import RESULT
from textrl_gym.experiments.suite import read_suite
from textrl_gym.reports.comparison_page import asset, live_page
from textrl_gym.reports.run_page import CHART_STYLE, PAGE_SECURITY_POLICY, run_html
from textrl_gym.reports.suite_page import suite_html
from textrl_gym.training.run_folder import read_run
from textrl_gym.web.server import LOOPBACK, Page, PageServer, Reply, json_reply
from textrl_gym.web.watched import Watched, look

# -- what is shown ----------------------------------------------------------------------------------------------------


class Pages:
    """The page of a folder, made when it is asked for and there is something new since it was made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._made = ("", b"")

    def __call__(self) -> bytes:
        # Several browsers ask at the same time, and the page takes seconds to make.
        with self._lock:
            watched = look(self.folder)
            if self._made[0] != watched.version:
                self._made = (watched.version, self._make(watched).encode())
            return self._made[1]

    def _make(self, watched: Watched) -> str:
        # The page asks again by itself, so that it may be opened before anything has begun.
        if watched.kind == "nothing":
            where = "holds no run yet" if self.folder.is_dir() else "is not there yet"
            return waiting_page(watched.version, f"{self.folder} {where}. This page fills itself when a run begins.")
        finished = any((run / RESULT).is_file() for run in watched.runs.values())
        if watched.kind != "runs" and not finished:
            return waiting_page(watched.version, "No run has finished yet. The page comes with the first.")
        try:
            if watched.kind == "comparison":
                return live_page(self.folder, watched.version)
            if watched.kind == "suite":
                return served(suite_html(read_suite(self.folder)), watched.version)
            return served(run_html([read_run(run) for run in watched.runs.values()]), watched.version)
        except ValueError as error:  # a broken file, or a task without a finished run: it may be there the next time
            return waiting_page(watched.version, str(error))


def served(page: str, version: str) -> str:
    """A hand-written page that asks its server whether there is a newer one."""
    policy = PAGE_SECURITY_POLICY.replace("style-src", "script-src 'unsafe-inline'; connect-src 'self'; style-src")
    live = f'<div id="live" data-version="{version}"></div>'
    page = page.replace(PAGE_SECURITY_POLICY, policy, 1).replace("<main>", f"<main>{live}", 1)
    # Texts of a run are escaped, so that these two are the page's own.
    return page.replace("</body>", f"<script>\n{asset('live.js')}</script></body>", 1)


def waiting_page(version: str, words: str) -> str:
    """What is shown while there is nothing to compare."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>textrl-gym watch</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>\n{asset('page.css')}{CHART_STYLE}</style></head>\n<body><header><h1>Runs under way</h1>"
        f'<p>{escape(words)}</p></header><main><div id="live" data-version="{version}"></div></main>'
        f"<script>\n{asset('live.js')}</script></body></html>\n"
    )


# -- the server -------------------------------------------------------------------------------------------------------


class WatchServer(PageServer):
    """Serves one folder."""

    def __init__(self, folder: Path, host: str, port: int) -> None:
        self.folder, self.pages = folder, Pages(folder)
        pages: dict[str, Page] = {
            "/": lambda: Reply(self.pages(), "text/html"),
            "/status": self._status,
            "/curves": lambda: Reply(look(folder).curves_html().encode(), "text/html"),
        }
        super().__init__(host, port, pages)

    def _status(self) -> Reply:
        watched = look(self.folder)
        # Paths are still fixed, by the plan and not by who asks; the plan may come after the server.
        for task in watched.tasks if watched.kind == "suite" else ():
            self.routes.setdefault(f"/{task}/report.html", functools.partial(self._page_of, task))
        return json_reply(watched.status())

    def _page_of(self, task: str) -> Reply:
        return Reply(live_page(self.folder / task, look(self.folder).version).encode(), "text/html")


def make_server(folder: Path, host: str = LOOPBACK, port: int = 0) -> WatchServer:
    """A server that is bound and not yet serving; the folder may come later.

    Raises:
        ValueError: the path is no folder, or the port is out of range.
        OSError: the port is taken, or the host is no address of this machine.
        ImportError: plotly is not installed.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is no folder: name that of a comparison or of a run")
    go()  # before the first request
    return WatchServer(folder, host, port)
