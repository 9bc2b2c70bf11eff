"""HTTP client of a vLLM server: its RL endpoints, and many completions at a time."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from textrl_gym.extras import install

TransferName = Literal["nccl", "ipc", "disk"]
"""How weights get to a server (textrl_gym.rollouts.weight_transfer). nccl: between GPUs. ipc: on the policy's own GPU.
disk: as a file in the run's folder, on any device. It stands here, where settings can read it without torch."""
CONNECTIONS = 256
"""At a time: each is a file, of which a process may have 1,024 on most machines. The server batches what it has."""
ANSWER_SECONDS = 1_800.0
"""Without an answer, after which a request has failed: a completion of thousands of tokens behind a full queue, or a
large model's weights, take minutes in which no byte comes."""
MOST_WORDS = 600
"""Letters of a server's error that are shown."""


class ServerError(RuntimeError):
    """The server refuses, or cannot do, what it was asked; with its words."""


class Unreachable(ServerError):
    """The server gave no answer: it is gone, starting, or has dropped the connection."""


class Client:
    """Asks one server.

    Args:
        url: http://HOST:PORT.
        answer_seconds: without an answer, after which a request has failed.

    Raises:
        ImportError: without httpx2.
        ValueError: url is none.
    """

    def __init__(self, url: str, answer_seconds: float = ANSWER_SECONDS) -> None:
        if importlib.util.find_spec("httpx2") is None:
            raise ImportError(f"rollouts by a server need the package httpx2: {install('judge')}")
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"the server's url must be http(s)://HOST:PORT, got {url!r}")
        import httpx2

        self.url = url.rstrip("/").removesuffix("/v1")
        limits = httpx2.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS)
        # Only a connection is given up soon: no wait of this client's own for a free one may end in an error.
        timeout = httpx2.Timeout(answer_seconds, connect=10.0, pool=None)
        self._http = httpx2.Client(limits=limits, timeout=timeout)

    def close(self) -> None:
        """Close all connections; requests under way fail."""
        self._http.close()

    def get(self, path: str) -> dict[str, Any]:
        """The JSON object at a path; see `post` for errors."""
        return self._ask("GET", path, None)

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What the server answers to a JSON object; empty where it answers nothing.

        Raises:
            Unreachable: no answer.
            ServerError: an error, in the server's words.
        """
        return self._ask("POST", path, {} if body is None else body)

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        import httpx2

        where = f"{self.url}/{path}"
        try:
            response = self._http.request(method, where, json=body)
        except httpx2.TransportError as error:
            raise Unreachable(f"{where}: {type(error).__name__}: {error}") from error
        if response.status_code == 503:  # paused by someone else, or its engine is gone
            raise Unreachable(f"{where}: status 503: {_words(response.text)}")
        if response.status_code != 200:
            raise ServerError(f"{where}: status {response.status_code}: {_words(response.text)}")
        try:
            answer = json.loads(response.content) if response.content else {}
        except ValueError:
            raise ServerError(f"{where}: no JSON: {response.text[:MOST_WORDS]!r}") from None
        if not isinstance(answer, dict):
            raise ServerError(f"{where}: no object: {response.text[:MOST_WORDS]!r}")
        return answer

    def complete(self, requests: Sequence[Mapping[str, Any]]) -> list[dict[str, Any] | None]:
        """The completion of each request, all at a time; None of those that got no answer.

        Raises:
            ServerError: one was refused; the others are given up.
        """
        if not requests:
            return []
        pool = ThreadPoolExecutor(min(len(requests), CONNECTIONS))
        try:
            return list(pool.map(self._complete, requests))
        finally:
            # After an error, or Ctrl-C, nobody begins with a new one, and those under way are not waited for.
            pool.shutdown(wait=False, cancel_futures=True)

    def _complete(self, request: Mapping[str, Any]) -> dict[str, Any] | None:
        try:
            answer = self.post("v1/completions", request)
        except Unreachable:
            return None
        choices = answer.get("choices")
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise ServerError(f"{self.url}/v1/completions: no completion: {str(answer)[:MOST_WORDS]}")
        return choices[0]

    def wait(self, seconds: float, still: Callable[[], object] = lambda: None) -> None:
        """Wait until the server says that it is healthy.

        Args:
            still: called between two tries; it raises where waiting is no use.

        Raises:
            Unreachable: it has not after so many seconds.
        """
        end, delay = time.monotonic() + seconds, 0.05
        while True:
            try:
                self.get("health")
                return
            except Unreachable as error:
                if time.monotonic() > end:
                    raise Unreachable(f"no vLLM server within {seconds:g} s: {error}") from error
            still()
            time.sleep(delay)
            delay = min(2 * delay, 2.0)


def _words(text: str) -> str:
    """What an error says: vLLM has it under error.message, error or detail."""
    try:
        answer: Any = json.loads(text)
        error = answer.get("error", answer.get("detail", answer))
        words = error.get("message", error) if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        words = text
    return " ".join(str(words).split())[:MOST_WORDS]
