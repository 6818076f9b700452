"""Progress over several runs: which one trains, how many are done, how much time is left."""

import sys
import time
from typing import TYPE_CHECKING, Any

from spem.extras import require

if TYPE_CHECKING:
    from spem.training.log import Status

PLAIN_SECONDS = 30.0
LIVE_SECONDS = 0.2


class SeveralRuns:
    """The progress of one run after the other, as `spem.training.train` reports it.

    On a terminal two bars move in place, one for the runs and one for the current run; elsewhere
    there is a line for each run and one every half minute. All goes to standard error.

    Args:
        total: How many runs there are in all.
        done: How many of them were finished before.
    """

    def __init__(self, total: int, done: int = 0) -> None:
        self._total = total
        self._done = done
        self._took: list[float] = []
        self._name = ""
        self._started = self._told = time.monotonic()
        self._bars: Any = None
        if sys.stderr.isatty():
            self._open_bars()

    def start(self, name: str) -> None:
        """A run begins (or goes on)."""
        self._name = name
        self._started = self._told = time.monotonic()
        if self._bars is None:
            self.message(f"run {self._done + 1}/{self._total}: {name}")
        else:
            self._bars.reset(self._run, description=name)

    def finish(self, text: str) -> None:
        """The run is finished; `text` is its result."""
        self._took.append(time.monotonic() - self._started)
        self._done += 1
        self.message(f"run {self._done}/{self._total} done: {self._name}: {text}")
        self._overall(0.0)

    def stop(self) -> None:
        """No more runs: take the bars away."""
        if self._bars is not None:
            self._bars.stop()

    def due(self) -> bool:
        """Whether it is time for another `step`."""
        return time.monotonic() - self._told >= (
            PLAIN_SECONDS if self._bars is None else LIVE_SECONDS
        )

    def step(self, status: "Status") -> None:
        """Progress within an epoch."""
        self._told = time.monotonic()
        if self._bars is None:
            self.message(
                f"{self._name}: {status.text}; {self._left(status.seconds_left)} left in all"
            )
            return
        done, total = status.epoch * status.steps + status.step, status.epochs * status.steps
        text = f"{self._name}: {status.text}"
        self._bars.update(self._run, completed=done, total=total, description=text)
        self._overall(status.seconds_left, done / total)

    def epoch(self, line: dict[str, Any], epochs: int) -> None:
        """An epoch is complete: nothing, the run's own `metrics.jsonl` tells it."""

    def message(self, text: str) -> None:
        """Something worth a line of its own."""
        if self._bars is None:
            print(text, file=sys.stderr, flush=True)
        else:
            self._bars.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """One run has ended; the bars stay for the next."""

    def _open_bars(self) -> None:
        console = require("rich.console", extra="train", purpose="live progress").Console(
            stderr=True
        )
        bars = require("rich.progress", extra="train", purpose="live progress")
        columns = (bars.BarColumn(bar_width=24), bars.TaskProgressColumn())
        text = bars.TextColumn("{task.description}", markup=False)
        self._bars = bars.Progress(*columns, text, console=console, transient=True)
        self._all = self._bars.add_task("", total=self._total, completed=self._done)
        self._run = self._bars.add_task("starting", total=None)
        self._overall(0.0)
        self._bars.start()

    def _overall(self, seconds_left: float, fraction: float = 0.0) -> None:
        if self._bars is None:
            return
        text = f"{self._done} of {self._total} runs done"
        if self._took or fraction:
            text += f", {self._left(seconds_left)} left"
        self._bars.update(self._all, completed=self._done + fraction, description=text)

    def _left(self, seconds_left: float) -> str:
        """Time for the rest of this run and for those to come, each like the mean so far."""
        from spem.training.log import duration

        running = time.monotonic() - self._started + seconds_left
        each = sum(self._took) / len(self._took) if self._took else running
        within = 1 if seconds_left else 0  # the current run is counted by its own estimate
        return duration(seconds_left + each * (self._total - self._done - within))
