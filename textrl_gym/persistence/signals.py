"""Signals of a training run: a request to stop is heard between two updates, so that the one under way is finished."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from textrl_gym import processes


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP, after the checkpoint was saved; as Ctrl-C for all who catch that."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Stop:
    """Whether a signal has asked to stop, and which."""

    def __init__(self) -> None:
        self.number = 0
        self.together = processes.size() == 1
        """Whether all processes of the run stop, or one would, at the same place."""

    def check(self) -> None:
        """Raise KeyboardInterrupt, or Terminated for another signal than Ctrl-C's, if one was heard by any process."""
        # One that stops an update before the others would leave them waiting for it: so by what all have heard, and not
        # by a signal that has come while they told each other. That one is for the next time.
        heard = processes.most(self.number)
        if heard:
            self.number, self.together = heard, True
            self.stop()

    def stop(self) -> None:
        """As `check`, of the signal that this process has heard, and at once."""
        if self.number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.number:
            raise Terminated(self.number)


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Of Ctrl-C, of schedulers and containers that end a job, and of a terminal that is closed."""


@contextlib.contextmanager
def hearing_signals() -> Iterator[Stop]:
    """A signal is noted, so that the update under way is finished and its checkpoint whole; twice stops at once."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # signals reach only the main thread
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.number:  # for those who do not want to wait
            stop.stop()
        stop.number = number

    # One that is ignored stays so: nohup ignores SIGHUP, a shell SIGINT for what it starts in the background.
    before = {number: old for number in SIGNALS if (old := signal.getsignal(number)) is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, old in before.items():
            signal.signal(number, old)
