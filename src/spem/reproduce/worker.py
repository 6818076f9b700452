"""One try at a run of a grid, and the process that makes one after the other."""

import contextlib
import errno
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Generator, Iterable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from spem.training import Interrupted, Progress, RunConfig, read_config, train
from spem.training.claim import HeldError, claimed
from spem.training.diverged import DIVERGED, read_diverged
from spem.training.log import Status
from spem.training.memory import keep_freed_memory
from spem.training.runs import CHECKPOINT, finished, plan_run
from spem.training.sets import images_kept

TOLD_SECONDS = 0.5
"""Time between two messages on where a run stands."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Outcome:
    """What one try at a run ended in.

    Args:
        kind: `stopped` left a checkpoint, `held` means that another living process has the run.
        text: One line on it.
        spent: The process may be damaged (a failed GPU, lack of memory) and is to be replaced.
    """

    kind: Literal["finished", "diverged", "failed", "held", "stopped"]
    text: str
    spent: bool = False


class Task(NamedTuple):
    """What a worker is told to do."""

    config: RunConfig
    folder: Path
    retry: bool


class Told(NamedTuple):
    """What a worker tells while it trains: where the run stands, or an epoch's figures."""

    status: Status | None = None
    accuracy: float | None = None


def plan(config: RunConfig, folder: Path) -> RunConfig:
    """Write down how a run of a grid is carried out, unless that has been done before.

    Threads, implementation and step can change the last bits, so no later command, engine or
    machine chooses them again. What is left open becomes one thread and, on a CPU, eager steps:
    measuring which step is faster would let the load of the machine choose.

    Raises:
        HeldError: Another process trains in the folder.
        ValueError: A file of the folder is damaged, or the device cannot be had.
    """
    if (folder / CHECKPOINT).exists() or read_config(folder) is not None:
        return config
    runtime = config.runtime
    on_cpu = runtime.device == "cpu" or (runtime.device == "auto" and not torch.cuda.is_available())
    step = "eager" if runtime.step == "auto" and on_cpu else runtime.step
    planned = replace(config, runtime=replace(runtime, step=step, threads=runtime.threads or 1))
    with claimed(folder):
        return plan_run(planned, folder, lambda text: None)


def plan_all(configs: Iterable[RunConfig], runs: Path) -> None:
    """Plan all runs at once, so that the machine that begins a grid decides for all of it."""
    for config in configs:
        # What is wrong with a run is told when it is tried, without stopping the others.
        with contextlib.suppress(HeldError, ValueError, OSError):
            plan(config, config.folder(runs))


def attempt(
    config: RunConfig, folder: Path, progress: Progress, *, retry_diverged: bool = False
) -> Outcome:
    """Train a run unless it is finished or known to diverge; every fault becomes one sentence.

    Args:
        config: The run.
        folder: Its folder.
        progress: What is told about it.
        retry_diverged: Train a run that diverged before anew, from its start.
    """
    try:
        return _attempt(config, folder, progress, retry_diverged=retry_diverged)
    except HeldError as error:
        return Outcome("held", str(error))
    except Interrupted as stopped:
        return Outcome("stopped", str(stopped))
    except Exception as error:  # noqa: BLE001 - told to the caller; other runs must go on
        ours = isinstance(error, (OSError, ValueError, ImportError))
        return Outcome("failed", _sentence(error, folder), spent=not ours)


def work(channel: Connection, visible: str | None) -> None:
    """Train the runs that come through a channel, until it closes or a signal stops one.

    Args:
        channel: Brings tasks and takes what is told about them.
        visible: The GPUs that this process may see; None changes nothing.
    """
    # Ctrl-C reaches every process of a terminal. A run handles it; without one the parent tells.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    if visible is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
    threading.Thread(target=_end_with_parent, name="parent-watch", daemon=True).start()
    keep_freed_memory()
    with images_kept(), contextlib.suppress(EOFError, OSError):
        while True:
            task = channel.recv()
            if not isinstance(task, Task):
                return
            progress = _Telling(channel)
            outcome = attempt(task.config, task.folder, progress, retry_diverged=task.retry)
            channel.send(outcome)
            if outcome.kind == "stopped" or outcome.spent:
                return


@contextlib.contextmanager
def interrupts_blocked() -> Generator[None]:
    """Keep Ctrl-C from a process until it is ready for it (`work` unblocks it)."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Telling:
    """The progress of a run, sent through a channel."""

    def __init__(self, channel: Connection) -> None:
        self._channel = channel
        self._next = 0.0

    def due(self) -> bool:
        return time.monotonic() >= self._next

    def step(self, status: Status) -> None:
        self._next = time.monotonic() + TOLD_SECONDS
        self._send(Told(status=status))

    def epoch(self, line: dict[str, Any], epochs: int) -> None:
        self._send(Told(accuracy=line["test_accuracy"]))

    def message(self, text: str) -> None:
        """Nothing: the run's `log.txt` has it."""

    def close(self) -> None:
        """Nothing to do."""

    def _send(self, told: Told) -> None:
        # Without a parent nobody listens, and the run is about to be stopped.
        with contextlib.suppress(OSError):
            self._channel.send(told)


def _attempt(
    config: RunConfig, folder: Path, progress: Progress, *, retry_diverged: bool
) -> Outcome:
    if finished(config, folder) is None:
        if retry_diverged and (folder / DIVERGED).exists():
            with claimed(folder):
                # From the start: a checkpoint of before leads to the same loss again.
                (folder / CHECKPOINT).unlink(missing_ok=True)
                (folder / DIVERGED).unlink(missing_ok=True)
        known = read_diverged(config, folder)
        if known is not None:
            return Outcome("diverged", known.message)
    try:
        result = train(plan(config, folder), folder, progress=progress)
    except FloatingPointError as error:
        return Outcome("diverged", str(error))
    return Outcome("finished", f"{result.accuracy:.2f} %")


def _sentence(error: Exception, folder: Path) -> str:
    """One line for people on an error that ended a run."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return (
            f"{folder}: {os.strerror(error.errno)}. Make room and run the same command again; "
            "what is finished is kept."
        )
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}."
    lines = str(error).strip().splitlines() or [""]
    if isinstance(error, (OSError, ValueError, ImportError)):
        return " ".join(lines)
    return f"{type(error).__name__}: {lines[0]}"


def _end_with_parent() -> None:
    """Stop like by SIGTERM, with a checkpoint, when the process that started this one is gone."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
