"""Where the runs of a grid stand: the account that every engine keeps and shows."""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from typing import Protocol

from spem.reproduce.worker import Outcome, Told
from spem.training import RunConfig
from spem.training.diverged import DIVERGED, read_diverged
from spem.training.log import Status
from spem.training.runs import finished

FULL_SET = 50_000
"""Training images assumed where a config sets no limit; for estimates of time only."""


class GridObserver(Protocol):
    """What a grid tells its caller."""

    def event(self, kind: str, config: RunConfig, text: str) -> None:
        """Something happened to a run.

        Args:
            kind: start, finished, diverged, failed, held, stopped or died (it will go on).
            config: The run.
            text: Its accuracy, or what went wrong.
        """
        ...

    def show(self, board: "Board") -> None:
        """How things stand; called several times a second."""
        ...

    def close(self) -> None:
        """The grid has ended, in whatever way."""
        ...


@dataclass(frozen=True)
class GridOutcome:
    """What became of the runs of a grid.

    Args:
        finished: Runs with a result, those of before included.
        diverged: Runs whose loss became infinite or NaN, with the reason.
        failed: Runs that could not be trained, with the reason.
        held: Runs that other processes are training.
        left: Runs not begun, or stopped with a checkpoint.
        stopped_by: The signal that ended the grid, if one did.
    """

    finished: tuple[RunConfig, ...]
    diverged: tuple[tuple[RunConfig, str], ...]
    failed: tuple[tuple[RunConfig, str], ...]
    held: tuple[RunConfig, ...]
    left: tuple[RunConfig, ...]
    stopped_by: Signals | None = None


@dataclass
class Run:
    """A run that is not finished yet."""

    config: RunConfig
    folder: Path
    retry: bool = False
    deaths: int = 0
    look_at: float = 0.0
    """When to try again a run that somebody holds."""
    status: Status | None = None
    accuracy: float | None = None
    begun: float = 0.0
    begun_at: float | None = None
    """How much of it was done when this try first told of itself; see `done`."""
    looked_again: bool = False

    @property
    def done(self) -> float:
        """The part of it that is done, from 0 to 1, as far as is known."""
        status = self.status
        if status is None:
            return 0.0
        return (status.epoch + status.step / status.steps) / status.epochs

    @property
    def weight(self) -> float:
        """Roughly how much work it is, to compare runs of one grid."""
        config = self.config
        return config.model.depth * config.optim.epochs * (config.data.limit or FULL_SET)


@dataclass(frozen=True)
class Board:
    """How a grid stands.

    Args:
        total: All runs.
        finished: How many have a result.
        diverged: How many diverged.
        failed: How many could not be trained.
        held: How many other processes have.
        waiting: How many are to come.
        running: Those in progress here.
        seconds_left: Estimate for all of it; None where there is nothing to estimate from.
        stopping: What ends the grid, while it waits for checkpoints; else empty.
    """

    total: int
    finished: int
    diverged: int
    failed: int
    held: int
    waiting: int
    running: tuple[Run, ...]
    seconds_left: float | None
    stopping: str


class Tally:
    """The runs of a grid by where they stand.

    Args:
        configs: The runs, in the order in which to take them; one named twice counts once.
        runs: Folder of all runs.
        retry_diverged: Whether those that diverged before are to be tried again.
    """

    def __init__(self, configs: Sequence[RunConfig], runs: Path, *, retry_diverged: bool) -> None:
        by_folder = {config.folder(runs): config for config in configs}
        self.total = len(by_folder)
        self.workers = 1
        self.finished: list[RunConfig] = []
        self.diverged: list[tuple[RunConfig, str]] = []
        self.failed: list[tuple[RunConfig, str]] = []
        self.waiting: deque[Run] = deque()
        self.held: list[Run] = []
        self.running: list[Run] = []
        self.stopped: list[RunConfig] = []
        self._work = self._seconds = 0.0
        for folder, config in by_folder.items():
            self._sort_in(Run(config, folder), retry_diverged)

    def _sort_in(self, run: Run, retry_diverged: bool) -> None:
        try:
            if finished(run.config, run.folder) is not None:
                self.finished.append(run.config)
                return
            if retry_diverged:
                run.retry = (run.folder / DIVERGED).exists()
            elif (known := read_diverged(run.config, run.folder)) is not None:
                self.diverged.append((run.config, known.message))
                return
        except (ValueError, OSError):
            pass  # a damaged file is told when the run is tried
        self.waiting.append(run)

    @property
    def open(self) -> bool:
        """Whether any run may still be given out."""
        return bool(self.waiting or self.held)

    def next(self, patience: float) -> Run | None:
        """The next run to try: one that waits or, when none does, one that somebody held.

        Args:
            patience: Seconds between two looks at one that is held.
        """
        if self.waiting:
            return self.waiting.popleft()
        now = time.monotonic()
        for run in self.held:
            if now >= run.look_at:
                run.look_at = now + patience
                self.held.remove(run)
                run.looked_again = True
                return run
        return None

    def begin(self, run: Run) -> str:
        """A try at the run begins; returns the kind of event, empty for another look."""
        run.begun, run.begun_at, run.status = time.monotonic(), None, None
        self.running.append(run)
        return "" if run.looked_again else "start"

    def note(self, run: Run, told: Told) -> None:
        """Take in what a run in progress tells."""
        if told.status is not None:
            run.status = told.status
            run.begun_at = run.done if run.begun_at is None else run.begun_at
        if told.accuracy is not None:
            run.accuracy = told.accuracy

    def again(self, run: Run) -> None:
        """The try failed through no fault of the run: it comes next."""
        self.running.remove(run)
        self.waiting.appendleft(run)

    def end(self, run: Run, outcome: Outcome) -> str:
        """A try has ended; returns the kind of event, empty if nothing has changed for people."""
        self.running.remove(run)
        kind = outcome.kind
        if kind == "stopped" and self._is_finished(run):
            kind = "finished"
        if kind == "held":
            first = run.look_at == 0.0
            run.retry = False
            run.look_at = run.look_at or time.monotonic()
            self.held.append(run)
            return "held" if first else ""
        if kind == "finished":
            self.finished.append(run.config)
            if run.begun_at is not None:  # else another process has finished it
                self._work += run.weight * (1 - run.begun_at)
                self._seconds += time.monotonic() - run.begun
        elif kind == "stopped":
            self.stopped.append(run.config)
        else:
            into = self.diverged if kind == "diverged" else self.failed
            into.append((run.config, outcome.text))
        return kind

    def _is_finished(self, run: Run) -> bool:
        try:
            return finished(run.config, run.folder) is not None
        except (ValueError, OSError):
            return False

    def board(self, stopping: str = "") -> Board:
        """How things stand now."""
        return Board(
            self.total,
            len(self.finished),
            len(self.diverged),
            len(self.failed),
            len(self.held),
            len(self.waiting),
            tuple(self.running),
            self._seconds_left(),
            stopping,
        )

    def _seconds_left(self) -> float | None:
        """Work that is left, at the pace of the runs so far, divided among the workers."""
        work, seconds, now = self._work, self._seconds, time.monotonic()
        for run in self.running:
            if run.begun_at is not None:
                work += run.weight * (run.done - run.begun_at)
                seconds += now - run.begun
        if not work:
            return None
        left = sum(run.weight for run in self.waiting)
        left += sum(run.weight * (1 - run.done) for run in self.running)
        return (
            left * seconds / work / min(self.workers, max(1, len(self.waiting) + len(self.running)))
        )

    def outcome(self, stopped_by: Signals | None) -> GridOutcome:
        """What has become of all runs."""
        left = [*self.stopped, *(run.config for run in [*self.running, *self.waiting])]
        return GridOutcome(
            tuple(self.finished),
            tuple(self.diverged),
            tuple(self.failed),
            tuple(run.config for run in self.held),
            tuple(left),
            stopped_by,
        )
