"""A client of OpenAI-compatible chat endpoints: it tries again, waits as it is asked to, and keeps its key to itself.

Judges and players ask by it. The client is httpx2, which huggingface_hub brings along. The official openai package was
not taken: its waits between tries cannot be set, it ignores a Retry-After of over a minute, and it does not try again
after a broken body.
"""

from __future__ import annotations

import asyncio
import dataclasses
import email.utils
import importlib.util
import json
import math
import os
import random
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Annotated, Any, NamedTuple

from annotated_types import Ge, Gt

from textrl_gym.bounds import check_settings
from textrl_gym.core import Message
from textrl_gym.extras import install
from textrl_gym.llm.questions import Reply, Token

MAX_REPLY_BYTES = 1_000_000
"""A reply is some words in some JSON; an endpoint that sends more is broken, or means harm."""

LONGEST_REPLY_BYTES = 16 * MAX_REPLY_BYTES
"""The same of a reply that gives reasons: some hundred tokens, each with its alternatives."""
TOP_LOGPROBS = (20, 5, 0)
"""Alternatives at each token that are asked for: what an endpoint refuses is asked for in the next form, or not."""

_TRY_AGAIN = frozenset({408, 409, 429})  # timeout, conflict, too many requests; each 5xx is tried again too


@dataclasses.dataclass(frozen=True)
class ClientConfig:
    """Which model is asked, and how."""

    model: str = ""
    """The model's name at the endpoint, which must be given."""
    url: str = "https://api.openai.com/v1"
    """The endpoint, to which /chat/completions is added."""
    key_variable: str = "OPENAI_API_KEY"
    """The environment variable that holds the API key; where it is not set none is sent."""
    max_answer_tokens: Annotated[int, Ge(0)] = 0
    """Sent as max_tokens; 0: not sent, for models that refuse it or that think before they answer."""
    timeout_seconds: Annotated[float, Gt(0)] = 60.0
    """Without a byte from the endpoint, after which a request has failed."""
    total_seconds: Annotated[float, Gt(0)] = 600.0
    """From a request to the end of its reply, after which it has failed."""
    retries: Annotated[int, Ge(0)] = 6
    """Tries after the first where a request has failed: no connection, a broken answer, statuses 408, 409, 429, 5xx."""
    backoff_seconds: Annotated[float, Gt(0)] = 1.0
    """Wait before the first of these, doubled for each further one; a Retry-After that is longer is kept to."""
    max_wait_seconds: Annotated[float, Gt(0)] = 120.0
    """The longest wait. An endpoint that wants a longer one is given up."""
    concurrency: Annotated[int, Ge(1)] = 4
    """Requests at a time."""

    def __post_init__(self) -> None:
        check_settings(self)
        if not re.fullmatch(r"https?://[^/?#\s@]+(/[^?#\s]*)?", self.url):
            shown = re.sub(r"//.*@", "//...@", self.url)  # errors name the url, so that no password may be in it
            raise ValueError(f"the endpoint's url must be http(s)://HOST/PATH and no more, got {shown!r}")


class EndpointError(RuntimeError):
    """The endpoint gave no answer; says which endpoint, and why."""


class Response(NamedTuple):
    """What an endpoint sent."""

    status: int
    retry_after: str
    body: bytes


class Client:
    """Asks a model behind an endpoint.

    Args:
        config: which model, and how often and how long it is tried.
        who: asks, for errors.

    Raises:
        ValueError: no model is named, or the environment variable holds no key.
        ImportError: without httpx2.
    """

    def __init__(self, config: ClientConfig, who: str) -> None:
        if importlib.util.find_spec("httpx2") is None:
            raise ImportError(f"{who} needs the package httpx2: {install('judge')}")
        if not config.model:
            raise ValueError(f"{who} needs the name of its model: --endpoint.model NAME")
        import httpx2

        self.config = config
        self.top_logprobs = 0
        """Alternatives that are asked for at each token, with log-probabilities; fewer once the endpoint refuses."""
        self.most_bytes = MAX_REPLY_BYTES
        """Of a reply."""
        self._tls = httpx2.create_ssl_context()  # reading the certificates takes longer than a request
        self._secret = _read_key(config.key_variable)
        self.url = config.url.rstrip("/") + "/chat/completions"

    def ask(self, messages: Sequence[Message], temperature: float, stop: threading.Event | None = None) -> Reply:
        """The model's reply to a conversation, tried for as often as the settings allow.

        Its tokens have the log-probabilities of `top_logprobs` alternatives, where the endpoint gives them.

        Args:
            stop: set by another thread, it ends the waits between tries.

        Raises:
            EndpointError: there is none.
        """
        config, number, stop = self.config, 0, stop or threading.Event()
        while True:
            reply, reason, delay = self._try(messages, temperature)
            number += 1
            if reply is not None:
                return reply
            if delay > config.max_wait_seconds:
                reason += f", to be tried again after {delay:g} s, over max_wait_seconds={config.max_wait_seconds:g}"
                raise EndpointError(f"{self.url}: {reason}")
            # Requests that failed together are not all tried again at the same moment.
            backoff = min(config.backoff_seconds * 2 ** (number - 1), config.max_wait_seconds) * random.uniform(0.5, 1)
            if number > config.retries or stop.wait(max(delay, backoff)):
                raise EndpointError(f"{self.url}: {reason} ({number} tries)")

    def _try(self, messages: Sequence[Message], temperature: float) -> tuple[Reply | None, str, float]:
        """One request: the reply, or None, why there is none, and the wait that the endpoint asks for, in seconds.

        Raises:
            EndpointError: it would be no use to try again.
        """
        import httpx2

        asked = self.top_logprobs
        try:
            response = asyncio.run(self._post(messages, temperature, asked))
        except TimeoutError:
            return None, f"no whole reply within total_seconds={self.config.total_seconds:g}", 0.0
        except (httpx2.UnsupportedProtocol, httpx2.LocalProtocolError, httpx2.InvalidURL) as error:
            raise EndpointError(f"{self.url}: {self._told(_describe(error))}") from error
        except httpx2.RequestError as error:
            return None, self._told(_describe(error)), 0.0
        text = self._told(response.body.decode(errors="replace"))
        if response.status != 200:
            # The key is taken out before the text is cut: of a key cut in two the rest would stay.
            reason = f"status {response.status}: {' '.join(text.split())[:300]}"
            if asked and "logprob" in text.lower():
                fewer = max(number for number in TOP_LOGPROBS if number < asked)
                self.top_logprobs = min(self.top_logprobs, fewer)  # another thread may have been refused meanwhile
                return self._try(messages, temperature)
            if response.status in _TRY_AGAIN or response.status >= 500:
                return None, reason, retry_after(response.retry_after)
            if response.status in (401, 403):
                reason += f" (the key is read from the environment variable {self.config.key_variable})"
            raise EndpointError(f"{self.url}: {reason}")
        if len(response.body) > self.most_bytes:
            return None, f"a reply of over {self.most_bytes:,} bytes", 0.0
        try:
            choice = json.loads(response.body)["choices"][0]
            content = choice["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError):  # the last of brackets, many thousands deep
            return None, f"not an answer of a chat: {text[:200]!r}", 0.0
        return Reply(content, read_tokens(choice) if asked else ()) if isinstance(content, str) else Reply(""), "", 0.0

    async def _post(self, messages: Sequence[Message], temperature: float, top_logprobs: int) -> Response:
        """Send a conversation and read the reply, within its time and as far as its size may be.

        Asynchronous, since only so one time limit holds for all of it: a client's own counts from byte to byte, and an
        endpoint that sends a byte a second would never end.
        """
        import httpx2

        config = self.config
        # No compression: a small reply could hold a huge one.
        headers = {"Accept-Encoding": "identity"}
        if self._secret:
            headers["Authorization"] = f"Bearer {self._secret}"
        request: dict[str, object] = {"model": config.model, "messages": list(messages), "temperature": temperature}
        if top_logprobs:
            request |= {"logprobs": True, "top_logprobs": top_logprobs}
        if config.max_answer_tokens:
            request["max_tokens"] = config.max_answer_tokens
        body = bytearray()
        async with (
            asyncio.timeout(config.total_seconds),
            httpx2.AsyncClient(timeout=config.timeout_seconds, verify=self._tls) as client,
            client.stream("POST", self.url, json=request, headers=headers) as response,
        ):
            async for part in response.aiter_raw():
                body += part
                if len(body) > self.most_bytes:
                    break
        return Response(response.status_code, response.headers.get("retry-after", ""), bytes(body))

    def _told(self, text: str) -> str:
        """Words for an error, without the key, which some servers say back."""
        return text.replace(self._secret, "(the key)") if self._secret else text


def ask_together(
    questions: Sequence[Callable[[threading.Event], None]], threads: int, advance: Callable[[], object]
) -> None:
    """Ask several questions at a time. After a failure, or Ctrl-C, nobody begins with a new one.

    Args:
        questions: each asks one and keeps the answer; it is given the event that ends its waits.
        advance: called after each, by this thread.

    Raises:
        EndpointError: of the first that failed, when those that were under way are done.
    """
    stop = threading.Event()

    def ask(question: Callable[[threading.Event], None]) -> None:
        if stop.is_set():
            return
        try:
            question(stop)
        except BaseException:
            # Here and not where the future is read: another worker took one more question in between.
            stop.set()
            raise

    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(ask, question) for question in questions]
        try:
            for future in as_completed(futures):
                future.result()
                advance()
        except BaseException:  # Ctrl-C too: threads that wait for a retry would keep the process alive
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def read_tokens(choice: Mapping[str, object]) -> tuple[Token, ...]:
    """The tokens of a reply with their alternatives; none where the endpoint gave none, or not in OpenAI's form."""
    tokens = []
    try:
        content: Any = choice["logprobs"]
        for entry in content["content"]:
            listed = [entry, *(entry.get("top_logprobs") or ())]
            alternatives = {str(one["token"]): float(one["logprob"]) for one in listed}
            # Not < 0: rounding gives certain tokens a little more than log 1. It is false for nan.
            if not all(logp < 1e-3 for logp in alternatives.values()):
                return ()
            tokens.append(Token(str(entry["token"]), alternatives))
    except (LookupError, TypeError, ValueError, AttributeError):  # a field that endpoints fill as they like
        return ()
    return tuple(tokens)


def retry_after(header: str) -> float:
    """The seconds of a Retry-After, which is a number or a date; 0 where it is neither."""
    try:
        seconds = float(header)
    except ValueError:  # RFC 9110 allows a date in its place
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except ValueError:
            return 0.0
    # A date may have passed, and float() takes "inf" and "nan".
    return max(seconds, 0.0) if math.isfinite(seconds) else 0.0


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _read_key(variable: str) -> str | None:
    key = os.environ.get(variable, "").strip()
    # A client that refuses a header says so with the header in it, escaped: _told would not find the key there.
    if not (key.isascii() and key.isprintable()) or set(key) & set(" \"'\\"):
        raise ValueError(f"the environment variable {variable} holds no key: a key is printable ASCII without blanks")
    return key or None
