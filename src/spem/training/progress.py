"""What a run reports while it trains: messages, epochs, live progress."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Any, Protocol, TextIO

from spem.extras import require

PLAIN_SECONDS = 30.0
LIVE_SECONDS = 0.2


@dataclass(frozen=True)
class Status:
    """Where a run stands within an epoch; epochs and steps count what is complete."""

    epoch: int
    epochs: int
    step: int
    steps: int
    images_per_second: float
    seconds_left: float
    last: dict[str, Any] | None
    """Metrics of the epoch before, None in the first one."""

    @property
    def text(self) -> str:
        """One line for people."""
        parts = [f"epoch {self.epoch + 1}/{self.epochs}", f"step {self.step}/{self.steps}"]
        if self.last is not None:
            parts += [
                f"loss {self.last['loss']:.3f}",
                f"accuracy {self.last['test_accuracy']:.2f} %",
            ]
        parts += [f"{self.images_per_second:.0f} images/s", f"{duration(self.seconds_left)} left"]
        return ", ".join(parts)


class Progress(Protocol):
    """What `train` reports to its caller; pass one to show it elsewhere."""

    def due(self) -> bool:
        """Whether it is time for another `step`."""
        ...

    def step(self, status: Status) -> None:
        """Progress within an epoch."""
        ...

    def epoch(self, line: dict[str, Any], epochs: int) -> None:
        """An epoch is complete; `line` is its line of `metrics.jsonl`."""
        ...

    def message(self, text: str) -> None:
        """Something worth a line of its own."""
        ...

    def close(self) -> None:
        """The run has ended, in whatever way."""
        ...


class Silent:
    """No progress at all."""

    def due(self) -> bool:
        """Never."""
        return False

    def step(self, status: Status) -> None:
        """Nothing."""

    def epoch(self, line: dict[str, Any], epochs: int) -> None:
        """Nothing."""

    def message(self, text: str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class PlainLines:
    """A line an epoch and one every half minute, for logs and pipes."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._next = time.monotonic() + PLAIN_SECONDS

    def due(self) -> bool:
        """Every half minute."""
        return time.monotonic() >= self._next

    def step(self, status: Status) -> None:
        """Print the status."""
        self.show(status.epoch, status.epochs, status.text)

    def show(self, done: float, total: float, text: str) -> None:
        """Print the text; the next one is due half a minute later."""
        self._next = time.monotonic() + PLAIN_SECONDS
        self.message(text)

    def epoch(self, line: dict[str, Any], epochs: int) -> None:
        """Print the epoch's figures."""
        self._next = time.monotonic() + PLAIN_SECONDS
        self.message(epoch_text(line, epochs))

    def message(self, text: str) -> None:
        """Print the text."""
        self._stream.write(text + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Nothing to do."""


class LiveBar:
    """A bar that moves in place, for terminals."""

    def __init__(self) -> None:
        console = require("rich.console", extra="train", purpose="live progress").Console(
            stderr=True
        )
        bars = require("rich.progress", extra="train", purpose="live progress")
        self._bar = bars.Progress(
            bars.BarColumn(bar_width=24),
            bars.TaskProgressColumn(),
            bars.TextColumn("{task.description}"),
            console=console,
            transient=True,
        )
        self._task = self._bar.add_task("starting", total=None)
        self._bar.start()
        self._next = 0.0

    def due(self) -> bool:
        """Five times a second."""
        return time.monotonic() >= self._next

    def step(self, status: Status) -> None:
        """Move the bar."""
        done, total = status.epoch * status.steps + status.step, status.epochs * status.steps
        self.show(done, total, status.text)

    def show(self, done: float, total: float, text: str) -> None:
        """Move the bar to `done` of `total`, with a text beside it."""
        self._next = time.monotonic() + LIVE_SECONDS
        self._bar.update(self._task, completed=done, total=total, description=text)

    def epoch(self, line: dict[str, Any], epochs: int) -> None:
        """Print the epoch's figures above the bar."""
        self.message(epoch_text(line, epochs))

    def message(self, text: str) -> None:
        """Print the text above the bar."""
        self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Take the bar away."""
        self._bar.stop()


def choose_progress() -> LiveBar | PlainLines:
    """A live bar where standard error is a terminal, plain lines otherwise."""
    return LiveBar() if sys.stderr.isatty() else PlainLines()


def epoch_text(line: dict[str, Any], epochs: int) -> str:
    """One line for people on a finished epoch."""
    return (
        f"epoch {line['epoch'] + 1}/{epochs}: rate {line['lr']:.3g}, loss {line['loss']:.4f}, "
        f"train {line['train_accuracy']:.2f} %, test {line['test_accuracy']:.2f} % "
        f"(best {line['best_test_accuracy']:.2f} %), {line['images_per_second']:.0f} images/s"
    )


def duration(seconds: float) -> str:
    """12 s, 3:05, 1:02:03."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
