"""HTTP server of a few pages to this machine or, with a secret in the address, to others; the standard library alone.

A server has pages, which are read (GET), and actions, which take a JSON object and answer one (POST). Each has a fixed
path: nothing is read by a path that a client names.

Who may use it: on a loopback address whoever can reach it, if the Host header is this server's own, so that a page of
another site that points its name here (DNS rebinding) learns nothing. On any other address who knows the secret token
in the printed address; without TLS it can be read on the way. An action is refused to a page of another site (Origin),
and takes JSON alone, which a form of another site cannot send.
"""

from __future__ import annotations

import dataclasses
import errno
import gzip
import ipaddress
import json
import secrets
import socket
import sys
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

# Completions are of a model and may hold anything: nothing may be fetched, framed, cached or told to another site.
HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
}
LOOPBACK = "127.0.0.1"
MOST_BYTES = 1 << 20
"""Of a request's body."""
WORTH_PACKING = 1 << 16
"""Bytes of a page from which on it is sent by gzip to who takes that."""


def content_security_policy(scripts: str, styles: str) -> str:
    """A page's Content-Security-Policy: what it holds itself, and its own server; nothing else."""
    return (
        f"default-src 'none'; script-src {scripts}; style-src {styles}; img-src data: blob:; "
        "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    )


INLINE = content_security_policy("'unsafe-inline'", "'unsafe-inline'")
"""For pages that a library draws on, which writes scripts and styles of its own."""


@dataclasses.dataclass(frozen=True)
class Reply:
    """What a request is answered with."""

    content: bytes
    kind: str = "application/json"
    """Its media type."""
    code: HTTPStatus = HTTPStatus.OK


Page = Callable[[], Reply]
Action = Callable[[dict[str, Any]], Reply]
"""From the request's object; a ValueError is the client's mistake, and is answered with its words."""


def json_reply(value: object) -> Reply:
    """A value as JSON."""
    return Reply(json.dumps(value, allow_nan=False).encode())


class PageServer(ThreadingHTTPServer):
    """Serves pages and actions; see the head of this file.

    Args:
        host: the address to listen at.
        port: 0 for a free one.
        pages: path -> what is read there.
        actions: path -> what is done there.
        policy: the Content-Security-Policy of all answers.

    Raises:
        ValueError: the port is out of range.
        OSError: the port is taken, or the host is no address of this machine.
    """

    def __init__(
        self,
        host: str,
        port: int,
        pages: Mapping[str, Page],
        actions: Mapping[str, Action] | None = None,
        policy: str = INLINE,
    ) -> None:
        if not 0 <= port <= 65535:
            raise ValueError(f"port must lie in [0, 65535], got {port}")
        self.host, self.routes, self.actions, self.policy = host, dict(pages), dict(actions or {}), policy
        # On an address that others reach, the token is the only guard.
        self.token = "" if is_loopback(host) else secrets.token_urlsafe(24)
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise OSError(f"port {port} of {host} is taken: name another --port, or 0 for a free one") from error
            raise OSError(f"cannot listen at --host {host} --port {port}: {error.strerror or error}") from error

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
        names = (LOOPBACK, "localhost", "[::1]", self.host)
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


class _Handler(BaseHTTPRequestHandler):
    """One request."""

    server: PageServer
    server_version, sys_version = "textrl-gym", ""
    # A client that sends half a request would hold its thread for ever.
    timeout = 30

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_POST(self) -> None:
        asked = urlsplit(self.path)
        action = self.server.actions.get(asked.path)
        if action is None:
            self._refuse()
        elif not self._may_use(asked.query):
            self._send(_words(HTTPStatus.FORBIDDEN, "forbidden"))
        else:
            self._send(self._act(action))

    def _refuse(self) -> None:
        self.send_response(HTTPStatus.METHOD_NOT_ALLOWED)
        self.send_header("Allow", "POST" if urlsplit(self.path).path in self.server.actions else "GET, HEAD")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _refuse

    def _answer(self, body: bool) -> None:
        try:
            self._send(self._read(), body)
        except (ValueError, OSError) as error:  # a file that a page is made from is damaged, or cannot be read
            if isinstance(error, ConnectionError | TimeoutError):  # the browser has left
                raise
            self._send(_words(HTTPStatus.INTERNAL_SERVER_ERROR, str(error)), body)

    def _read(self) -> Reply:
        asked = urlsplit(self.path)
        if not self._may_use(asked.query):
            return _words(HTTPStatus.FORBIDDEN, "forbidden")
        page = self.server.routes.get(asked.path)
        return _words(HTTPStatus.NOT_FOUND, "not found") if page is None else page()

    def _act(self, action: Action) -> Reply:
        if self._foreign_origin():
            return _words(HTTPStatus.FORBIDDEN, "forbidden")
        if self.headers.get_content_type() != "application/json":
            return _words(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send application/json")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            return _words(HTTPStatus.LENGTH_REQUIRED, "send a Content-Length")
        if int(length) > MOST_BYTES:
            return _words(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"at most {MOST_BYTES:,} bytes")
        try:
            asked = json.loads(self.rfile.read(int(length)))
            if not isinstance(asked, dict):
                raise ValueError(f"send an object, not {type(asked).__name__}")
            return action(asked)
        except (ValueError, RecursionError) as error:
            return _words(HTTPStatus.BAD_REQUEST, str(error))
        except OSError as error:  # a disk that is full, say
            if isinstance(error, ConnectionError | TimeoutError):
                raise
            return _words(HTTPStatus.INTERNAL_SERVER_ERROR, str(error))

    def _may_use(self, query: str) -> bool:
        if self.server.token:
            scheme, _, bearer = self.headers.get("Authorization", "").partition(" ")
            token = bearer if scheme == "Bearer" else parse_qs(query).get("token", [""])[0]
            # In constant time: how long a comparison takes would tell how much of a guess is right.
            return secrets.compare_digest(token.encode(), self.server.token.encode())
        return self.headers.get("Host", "").lower() in self.server.own_names

    def _foreign_origin(self) -> bool:
        """Whether a page of another site asks. Programs send no Origin; browsers send one with every POST."""
        origin = self.headers.get("Origin")
        # By the name alone: behind a proxy with TLS the scheme is another.
        return origin is not None and urlsplit(origin).netloc.lower() != self.headers.get("Host", "").lower()

    def _send(self, reply: Reply, body: bool = True) -> None:
        content = reply.content
        self.send_response(reply.code)
        self.send_header("Content-Type", f"{reply.kind}; charset=utf-8")
        # Over a phone's connection a page with its charts is a third of the bytes; what is small is sent as it is.
        if len(content) > WORTH_PACKING and "gzip" in self.headers.get("Accept-Encoding", ""):
            content = gzip.compress(content, compresslevel=5, mtime=0)
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def end_headers(self) -> None:
        self.send_header("Content-Security-Policy", self.server.policy)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: requests come every few seconds."""


def _words(code: HTTPStatus, words: str) -> Reply:
    return Reply(f"{words}\n".encode(errors="replace"), "text/plain", code)
