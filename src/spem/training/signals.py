"""SIGTERM and Ctrl-C end a run after the current step, with a checkpoint."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Generator
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """Training was stopped by a signal; its checkpoint is written.

    `code` is the exit status for the process: 130 for Ctrl-C, 143 for SIGTERM.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class StopSignals:
    """Which stop signal was received, if any."""

    received: signal.Signals | None = None

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Remember the first signal; a second Ctrl-C stops without finishing the step."""
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)

    def interruption(self, where: str, then: str) -> Interrupted:
        """Build the exception that says what happened and how to resume."""
        assert self.received is not None
        name = "Ctrl-C" if self.received == signal.SIGINT else self.received.name
        return Interrupted(f"Training stopped by {name} {where}. {then}", 128 + self.received)


@contextlib.contextmanager
def stop_signals() -> Generator[StopSignals]:
    """Catch SIGTERM and SIGINT in a `with` block, if in the main thread: only it gets signals."""
    stop = StopSignals()
    main = threading.current_thread() is threading.main_thread()
    caught = (signal.SIGTERM, signal.SIGINT) if main else ()
    before = [signal.signal(number, stop.receive) for number in caught]
    try:
        yield stop
    finally:
        for number, handler in zip(caught, before, strict=True):
            signal.signal(number, handler)
