"""Run what is missing of many runs at once, in worker processes of this machine."""

import contextlib
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Sequence
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from signal import Signals
from typing import Any

import torch

from spem.reproduce.board import GridObserver, GridOutcome, Run, Tally
from spem.reproduce.worker import (
    Outcome,
    Task,
    Told,
    interrupts_blocked,
    plan_all,
    work,
)
from spem.training import RunConfig
from spem.training.signals import StopSignals, stop_signals

DEATHS = 3
"""So many processes may die in a run before it counts as failed."""
LOOK_SECONDS = 0.2
HELD_SECONDS = 2.0
"""Time until a run that another process holds is looked at again."""
RESERVE_SECONDS = 10.0
"""So long before the end of a budget (or a twentieth of it, if less) the runs are stopped."""


def run_grid(
    configs: Sequence[RunConfig],
    runs: Path,
    *,
    workers: int | None = None,
    per_gpu: int = 1,
    budget: float | None = None,
    retry_diverged: bool = False,
    observer: GridObserver,
) -> GridOutcome:
    """Train every run that has no result yet, in worker processes, and tell how it went.

    Several calls may share a folder: each run is claimed by one process at a time, and what another
    one holds is looked at again when nothing else is left, until that one has finished it or died.
    A run goes on from its checkpoint when its process dies. Ctrl-C, SIGTERM and the end of the
    budget stop all runs with a checkpoint; a second Ctrl-C does not wait for that.

    It starts processes, so a script that calls it needs the usual `if __name__ == "__main__":`.

    Args:
        configs: The runs, in the order in which to take them.
        runs: Folder of all runs.
        workers: Processes at a time; None is one for every CPU thread a run needs, or `per_gpu` for
            every GPU.
        per_gpu: Runs at a time on one GPU.
        budget: Seconds after which everything is stopped.
        retry_diverged: Train runs that diverged before once more, from their start.
        observer: Told what happens.

    Raises:
        ValueError: A number makes no sense.
    """
    require_positive(workers=workers, per_gpu=per_gpu, budget=budget)
    stop_at = stop_moment(budget)
    plan_all(configs, runs)
    tally = Tally(configs, runs, retry_diverged=retry_diverged)
    places = _places(configs, workers, per_gpu)
    tally.workers = len(places)
    with stop_signals() as stop:
        try:
            _Grid(tally, places, stop_at, stop, observer).run()
        finally:
            observer.close()
    return tally.outcome(stop.received)


def default_workers(configs: Sequence[RunConfig], per_gpu: int = 1) -> int:
    """How many runs this machine takes at a time unless told otherwise."""
    return len(_places(configs, None, per_gpu))


class _Worker:
    """A process that trains, and the run it has."""

    def __init__(self, place: str | None) -> None:
        self.place = place
        self.run: Run | None = None
        self.leaving = False
        """It is about to end, and gets no more runs."""
        self.channel, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        self.process: BaseProcess = context.Process(
            target=work, args=(theirs, place), name="spem-worker", daemon=True
        )
        with interrupts_blocked():
            self.process.start()
        theirs.close()

    def give(self, run: Run) -> None:
        self.run = run
        # A process that has just died is noticed by its sentinel.
        with contextlib.suppress(OSError):
            self.channel.send(Task(run.config, run.folder, run.retry))

    def stop(self) -> None:
        """Ask for a checkpoint and an end; without a step taken yet, end it at once."""
        if self.leaving or self.run is None:
            return
        self.leaving = True
        if self.run.status is None:
            self.process.kill()
        else:
            self.process.terminate()

    def messages(self) -> list[Told | Outcome]:
        """What the process has told since the last call."""
        found: list[Told | Outcome] = []
        with contextlib.suppress(EOFError, OSError):
            while self.channel.poll():
                found.append(self.channel.recv())
        return found

    def end(self, *, kill: bool = False) -> None:
        self.channel.close()
        if kill:
            self.process.kill()
        self.process.join()
        self.process.close()


class _Grid:
    """A call of `run_grid` under way."""

    def __init__(
        self,
        tally: Tally,
        places: list[str | None],
        stop_at: float | None,
        stop: StopSignals,
        observer: GridObserver,
    ) -> None:
        self.tally, self.stop, self.observer = tally, stop, observer
        self.free = deque(places)
        self.workers: list[_Worker] = []
        self.stopping = ""
        self.stop_at = stop_at

    def run(self) -> None:
        """Give out runs and listen until none is left or all are stopped."""
        kill = True
        try:
            while True:
                self._stop_if_due()
                if not self.stopping:
                    self._give_out()
                self.observer.show(self.tally.board(self.stopping))
                if not any(worker.run for worker in self.workers) and (
                    self.stopping or not self.tally.open
                ):
                    break
                self._listen()
            kill = False
        finally:
            for worker in self.workers:
                worker.end(kill=kill)

    def _stop_if_due(self) -> None:
        if self.stopping:
            return
        self.stopping = stopped_by(self.stop, self.stop_at)
        if self.stopping:
            for worker in self.workers:
                worker.stop()

    def _give_out(self) -> None:
        """Give every free worker a run, starting workers as long as there are places."""
        idle = [each for each in self.workers if each.run is None and not each.leaving]
        while idle or self.free:
            run = self.tally.next(HELD_SECONDS)
            if run is None:
                return
            if idle:
                worker = idle.pop()
            else:
                worker = _Worker(self.free.popleft())
                self.workers.append(worker)
            self._tell_event(self.tally.begin(run), run)
            worker.give(run)

    def _listen(self) -> None:
        """Take in what workers tell, and notice those that died."""
        by_channel: dict[Any, _Worker] = {}
        for worker in self.workers:
            by_channel[worker.channel] = worker
            by_channel[worker.process.sentinel] = worker
        if not by_channel:
            time.sleep(LOOK_SECONDS)
            return
        ready = connection.wait(list(by_channel), LOOK_SECONDS)
        for worker in {by_channel[each] for each in ready}:
            # Asked first: what it told before its end is in the channel by then.
            dead = not worker.process.is_alive()
            for message in worker.messages():
                self._take(worker, message)
            if dead:
                self._bury(worker)

    def _take(self, worker: _Worker, message: Told | Outcome) -> None:
        run = worker.run
        if run is None:
            return
        if isinstance(message, Told):
            self.tally.note(run, message)
            return
        worker.run = None
        worker.leaving |= message.spent or message.kind == "stopped"
        self._end(run, message)

    def _end(self, run: Run, outcome: Outcome) -> None:
        if outcome.kind == "stopped" and not self.stopping:
            # Somebody stopped this process alone; its run goes on in another one.
            self._died(run, "was stopped by a signal")
            return
        self._tell_event(self.tally.end(run, outcome), run, outcome.text)

    def _bury(self, worker: _Worker) -> None:
        run, code = worker.run, worker.process.exitcode
        self.workers.remove(worker)
        self.free.append(worker.place)
        worker.end()
        if run is None:
            return
        if self.stopping:
            self._end(run, Outcome("stopped", "stopped"))
        else:
            how = f"was ended by {Signals(-code).name}" if code and code < 0 else f"ended ({code})"
            self._died(run, how)

    def _died(self, run: Run, how: str) -> None:
        run.deaths += 1
        if run.deaths < DEATHS:
            self.tally.again(run)
            self._tell_event("died", run, f"its process {how}; it goes on from its checkpoint")
            return
        text = (
            f"its process {how}, after {DEATHS - 1} others. The last checkpoint is kept; give it "
            "more memory or fewer --workers, and run the same command again."
        )
        self._end(run, Outcome("failed", text))

    def _tell_event(self, kind: str, run: Run, text: str = "") -> None:
        if kind:
            self.observer.event(kind, run.config, text)


def _places(configs: Sequence[RunConfig], workers: int | None, per_gpu: int) -> list[str | None]:
    """A place for every worker: the GPU it may see, None where there is none."""
    on_cpu = any(config.runtime.device == "cpu" for config in configs)
    gpus = 0 if on_cpu or not torch.cuda.is_available() else torch.cuda.device_count()
    if gpus:
        given = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        names = given or [str(index) for index in range(gpus)]
        count = workers or per_gpu * gpus
        return [names[i % gpus] for i in range(count)]
    if workers is None:
        threads = max((config.runtime.threads or 1 for config in configs), default=1)
        workers = max(1, len(os.sched_getaffinity(0)) // threads)
    return [None] * workers


def stop_moment(budget: float | None) -> float | None:
    """When to stop runs, on the monotonic clock, for their checkpoints to be within the budget."""
    if budget is None:
        return None
    return time.monotonic() + budget - min(RESERVE_SECONDS, budget / 20)


def stopped_by(stop: StopSignals, stop_at: float | None) -> str:
    """What ends a grid now, in words; empty as long as nothing does."""
    if stop.received is not None:
        return "Ctrl-C" if stop.received.name == "SIGINT" else stop.received.name
    if stop_at is not None and time.monotonic() >= stop_at:
        return "the end of the budget"
    return ""


def require_positive(**values: float | None) -> None:
    """Refuse numbers of workers, shares or seconds that are not positive.

    Raises:
        ValueError: One is not.
    """
    for name, value in values.items():
        if value is not None and not value > 0:
            raise ValueError(f"reproduce: {name}={value} must be larger than 0.")
