"""Progress reports of training: messages, epochs, a live bar."""

from __future__ import annotations

import sys
import time
from typing import Any, Protocol, TextIO

from spem.extras import require


class Progress(Protocol):
    """Receives reports from `train`; subclass it to show them elsewhere."""

    def step(self, done: int, total: int, text: str) -> None:
        """Called after every step: steps done, steps in total, and a readable line."""

    def epoch(self, line: dict[str, Any], epochs: int) -> None:
        """An epoch is complete; `line` is its line of `metrics.jsonl`."""

    def message(self, text: str) -> None:
        """Something that deserves its own line."""

    def close(self) -> None:
        """The run has ended, whatever the outcome."""


class Silent(Progress):
    """No progress at all."""


class PlainLines(Progress):
    """A line per epoch and one every half minute, for logs and pipes."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream, self._printed = stream or sys.stderr, time.monotonic()

    def step(self, done: float, total: float, text: str) -> None:
        """Print the text if a line is due."""
        if time.monotonic() >= self._printed + 30.0:
            self.message(text)

    def epoch(self, line: dict[str, Any], epochs: int) -> None:
        """Print the epoch's figures."""
        self.message(
            f"epoch {line['epoch'] + 1}/{epochs}: rate {line['lr']:.3g}, loss {line['loss']:.4f}, "
            f"train {line['train_accuracy']:.2f} %, test {line['test_accuracy']:.2f} % "
            f"(best {line['best_test_accuracy']:.2f} %), {line['images_per_second']:.0f} images/s"
        )

    def message(self, text: str) -> None:
        """Print the text."""
        self._printed = time.monotonic()
        print(text, file=self._stream, flush=True)


class LiveBar(PlainLines):
    """A bar that moves in place, for terminals."""

    def __init__(self) -> None:
        super().__init__()
        console = require("rich.console", extra="train", purpose="live progress")
        bars = require("rich.progress", extra="train", purpose="live progress")
        columns = bars.BarColumn(24), bars.TaskProgressColumn(), "{task.description}"
        self._bar = bars.Progress(*columns, console=console.Console(stderr=True), transient=True)
        self._task = self._bar.add_task("starting", total=None)
        self._bar.start()

    def step(self, done: float, total: float, text: str) -> None:
        """Move the bar; rich draws it ten times a second."""
        self._bar.update(self._task, completed=done, total=total, description=text)

    def message(self, text: str) -> None:
        """Print the text above the bar."""
        self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Remove the bar."""
        self._bar.stop()


def choose_progress() -> LiveBar | PlainLines:
    """A live bar if standard error is a terminal, else plain lines."""
    return LiveBar() if sys.stderr.isatty() else PlainLines()
