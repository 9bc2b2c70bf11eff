"""A comparison's page over HTTP while its runs go on, by the standard library alone.

There are two addresses: / is the page, made anew where a run has ended since, and /status a small JSON object with the
page's version and how far each run is. Nothing is read by a path that a client names, and nothing is written.

Who may look: on a loopback address whoever can reach it, if the Host header is this server's own, so that a page of
another site that points its name here (DNS rebinding) learns nothing. On any other address who knows the secret token
in the printed address; without TLS it can be read on the way.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import ipaddress
import json
import math
import secrets
import socket
import sys
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from markupsafe import escape

from textrl_gym.experiments.results import ERROR, PLAN, RESULT, RUNS, SPEC, progress, read_spec, state_of
from textrl_gym.reports.comparison_page import asset, live_page
from textrl_gym.reports.plotting import go

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
# Completions are of a model and may hold anything: nothing may be fetched, framed, cached or told to another site.
HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
}


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


class WatchServer(ThreadingHTTPServer):
    """Serves one folder; see the head of this file."""

    def __init__(self, folder: Path, host: str, port: int) -> None:
        self.pages, self.host = Pages(folder), host
        # On an address that others reach, the token is the only guard.
        self.token = "" if is_loopback(host) else secrets.token_urlsafe(24)
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Handler)

    def handle_error(self, request: socket.socket | tuple[bytes, socket.socket], client_address: object) -> None:
        """A browser that has left is no error."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)

    @property
    def port(self) -> int:
        """Where it listens."""
        return self.server_address[1]

    @property
    def address(self) -> str:
        """What to open in a browser."""
        # 0.0.0.0 is no address to open; another machine needs this one's name.
        everywhere = self.host in ("0.0.0.0", "::", "")
        name = socket.gethostname() if everywhere else f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{name}:{self.port}/" + (f"?token={self.token}" if self.token else "")

    @property
    def own_names(self) -> frozenset[str]:
        """What the Host header may say on a loopback address."""
        names = ("127.0.0.1", "localhost", "[::1]", self.host)
        with_port = [f"{name}:{self.port}" for name in names]
        # Browsers leave out the port where it is 80.
        return frozenset([*with_port, *names] if self.port == 80 else with_port)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # another name


def make_server(folder: Path, host: str = "127.0.0.1", port: int = 0) -> WatchServer:
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
    if not 0 <= port <= 65535:
        raise ValueError(f"port must lie in [0, 65535], got {port}")
    go()  # before the first request
    try:
        return WatchServer(folder, host, port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise OSError(f"port {port} of {host} is taken: name another --port, or 0 for a free one") from error
        raise OSError(f"cannot listen at --host {host} --port {port}: {error.strerror or error}") from error


class _Handler(BaseHTTPRequestHandler):
    """One request."""

    server: WatchServer
    server_version, sys_version = "textrl-gym", ""
    # A client that sends half a request would hold its thread for ever.
    timeout = 30

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _refuse(self) -> None:
        self.send_response(HTTPStatus.METHOD_NOT_ALLOWED)
        self.send_header("Allow", "GET, HEAD")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _refuse

    def _answer(self, body: bool) -> None:
        try:
            self._respond(body)
        except (ValueError, OSError) as error:  # a file of the comparison is damaged, or cannot be read
            if isinstance(error, ConnectionError | TimeoutError):  # the browser has left
                raise
            self._send(HTTPStatus.INTERNAL_SERVER_ERROR, "text/plain", f"{error}\n".encode(errors="replace"), body)

    def _respond(self, body: bool) -> None:
        asked = urlsplit(self.path)
        if not self._may_look(parse_qs(asked.query).get("token", [""])[0]):
            self._send(HTTPStatus.FORBIDDEN, "text/plain", b"forbidden\n", body)
        elif asked.path == "/":
            self._send(HTTPStatus.OK, "text/html", self.server.pages(), body)
        elif asked.path == "/status":
            payload = json.dumps(status(self.server.pages.folder), allow_nan=False).encode()
            self._send(HTTPStatus.OK, "application/json", payload, body)
        else:
            self._send(HTTPStatus.NOT_FOUND, "text/plain", b"not found\n", body)

    def _may_look(self, token: str) -> bool:
        if self.server.token:
            # In constant time: how long a comparison takes would tell how much of a guess is right.
            return secrets.compare_digest(token.encode(), self.server.token.encode())
        return self.headers.get("Host", "").lower() in self.server.own_names

    def _send(self, code: HTTPStatus, kind: str, content: bytes, body: bool) -> None:
        self.send_response(code)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: requests come every few seconds."""
