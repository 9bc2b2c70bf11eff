"""Phases of training as contexts that others can listen to: for timers and counters, without patching any method."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Literal

Phase = Literal["collect", "rollout", "scoring", "reference", "values", "update", "evaluate"]
"""collect, update and evaluate are the training loop's; the others are parts of collect."""
Listener = Callable[[Phase], AbstractContextManager[object]]
"""Gives the context to run a phase in."""

# A context variable, and not an argument: collect() may be anyone's, also of an agent that overrides it.
_listener: ContextVar[Listener | None] = ContextVar("phase_listener", default=None)


@contextlib.contextmanager
def phase(name: Phase) -> Iterator[None]:
    """Run a phase in the context that the listener gives, if there is one."""
    listener = _listener.get()
    with contextlib.nullcontext() if listener is None else listener(name):
        yield


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Inside, the listener hears of every phase, and so do those outside."""
    outer = _listener.get()

    @contextlib.contextmanager
    def both(name: Phase) -> Iterator[None]:
        with contextlib.nullcontext() if outer is None else outer(name), listener(name):
            yield

    token = _listener.set(both)
    try:
        yield
    finally:
        _listener.reset(token)
