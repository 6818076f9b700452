"""What a run tells while it trains: metrics as JSON lines, messages, live progress.

`metrics.jsonl` is the record. TensorBoard, if asked for, is fed from the same lines.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

from spem.extras import require
from spem.training.checkpoint import write_atomic

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
    """What `train` tells its caller; pass one to show it elsewhere."""

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
        self._next = time.monotonic() + PLAIN_SECONDS
        self.message(status.text)

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
        self._next = time.monotonic() + LIVE_SECONDS
        done, total = status.epoch * status.steps + status.step, status.epochs * status.steps
        self._bar.update(self._task, completed=done, total=total, description=status.text)

    def epoch(self, line: dict[str, Any], epochs: int) -> None:
        """Print the epoch's figures above the bar."""
        self.message(epoch_text(line, epochs))

    def message(self, text: str) -> None:
        """Print the text above the bar."""
        self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Take the bar away."""
        self._bar.stop()


def choose_progress() -> Progress:
    """A live bar where standard error is a terminal, plain lines otherwise."""
    return LiveBar() if sys.stderr.isatty() else PlainLines()


METRICS = "metrics.jsonl"


class RunLog:
    """The log files of a run folder, and the progress they are told alongside."""

    def __init__(self, folder: Path, progress: Progress) -> None:
        self.progress = progress
        self._metrics = folder / METRICS
        self._messages = folder / "log.txt"
        self._board_folder = folder / "tensorboard"
        self._board: Any = None

    def open_board(self, first_epoch: int) -> None:
        """Start the TensorBoard copy; a resumed run replaces what lies from `first_epoch` on."""
        require("tensorboard", extra="train", purpose="runtime.tensorboard")
        board = require("torch.utils.tensorboard", extra="train", purpose="runtime.tensorboard")
        self._board = board.SummaryWriter(str(self._board_folder), purge_step=first_epoch)

    def message(self, text: str) -> None:
        """Write a line into `log.txt` and show it."""
        with self._messages.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S%z')} {text}\n")
        self.progress.message(text)

    def restart(self, history: list[dict[str, Any]]) -> None:
        """Write `metrics.jsonl` anew from a checkpoint's history: its last line may be torn."""
        write_atomic(self._metrics, "".join(_json_line(line) for line in history).encode())

    def epoch(self, line: dict[str, Any], epochs: int) -> None:
        """Append an epoch to `metrics.jsonl`, to TensorBoard if open, and show it."""
        with self._metrics.open("a", encoding="utf-8") as file:
            file.write(_json_line(line))
            file.flush()
            os.fsync(file.fileno())
        if self._board is not None:
            for tag, value in scalars(line):
                self._board.add_scalar(tag, value, line["epoch"])
        self.progress.epoch(line, epochs)

    def close(self) -> None:
        """Finish TensorBoard's file and the progress display."""
        if self._board is not None:
            self._board.close()
        self.progress.close()


class NoLog(RunLog):
    """The log of a process that leaves the telling to another one."""

    def __init__(self) -> None:
        super().__init__(Path(), Silent())

    def open_board(self, first_epoch: int) -> None:
        """Nothing."""

    def message(self, text: str) -> None:
        """Nothing."""

    def restart(self, history: list[dict[str, Any]]) -> None:
        """Nothing."""

    def epoch(self, line: dict[str, Any], epochs: int) -> None:
        """Nothing."""


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read the epochs of a run folder; a torn last line, of a killed run, is left out."""
    path = folder / METRICS
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    epochs: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            epochs.append(json.loads(line))
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(
                f"metrics: line {number} of {path} is damaged ({error}). Resume the run, which "
                "writes the file anew from its checkpoint, or delete the line."
            ) from error
    return epochs


def scalars(line: dict[str, Any]) -> list[tuple[str, float]]:
    """The numbers of a metrics line, with the mixes' as "mix/<name>/<number>"."""
    flat = [(k, float(v)) for k, v in line.items() if isinstance(v, (int, float))]
    mixes: dict[str, dict[str, float]] = line["mixes"]
    flat += [(f"mix/{name}/{k}", v) for name, mix in mixes.items() for k, v in mix.items()]
    return flat


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


def _json_line(line: dict[str, Any]) -> str:
    return json.dumps(line, allow_nan=False) + "\n"
