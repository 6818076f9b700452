"""Train missing runs: one after the other in this process, or several at a time on Ray.

A Ray cluster executes whatever reaches its ports, so use it on trusted networks only. One started
here listens on the loopback address only.
"""

from __future__ import annotations

import _thread
import contextlib
import math
import os
import platform
import signal
import tempfile
import threading
import time
import timeit
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol

from spem.extras import first_line, require
from spem.reproduce.tables import DIVERGED, FAILED, FINISHED
from spem.training import (
    HeldError,
    Interrupted,
    ModelConfig,
    Progress,
    RunConfig,
    RuntimeConfig,
    Silent,
    read_metrics,
    read_run,
    train,
)
from spem.training.folder import held
from spem.training.signals import stop_signals

HELD, STOPPED = "held", "stopped"
AGAIN = "Run the command again to resume."
RETRIES = 2  # how often Ray restarts a run whose process died; it resumes from its checkpoint
LOOK_SECONDS = 0.5  # between looks at tasks
HELD_SECONDS = 2.0  # until a run that another process trains is checked again
RESERVE_SECONDS = 10.0  # before the end of a budget, or a twentieth of it, the runs are stopped


@dataclass(frozen=True)
class Ended:
    """How a run ended: `status` is "finished", "diverged", "failed", "held" or "stopped"."""

    config: RunConfig
    status: str
    error: str = ""


class Observer(Progress, Protocol):
    """Receives reports on many runs, in addition to those of each run."""

    def start(self, config: RunConfig) -> None:
        """A run starts or resumes."""

    def running(self, done: dict[RunConfig, float]) -> None:
        """Runs in progress elsewhere, and the fraction of each that is done."""

    def finish(self, ended: Ended) -> None:
        """A run has ended."""


def missing(configs: Iterable[RunConfig], runs: Path) -> list[RunConfig]:
    """The runs that have no result yet; divergence is a result too."""
    return [config for config in configs if not (config.folder(runs) / "result.json").exists()]


def require_weights(configs: Iterable[RunConfig]) -> None:
    """Raise FileNotFoundError if weights that runs start from are not there."""
    for name in dict.fromkeys(config.model.weights for config in configs):
        if name is not None and not Path(name).is_file():
            raise FileNotFoundError(
                f"the runs start from the weights {name}, which are not in {Path.cwd()}. They are "
                "part of the repository, not of the installed package: clone it, and start the "
                "command in its folder."
            )


def forget_diverged(configs: Iterable[RunConfig], runs: Path) -> None:
    """Remove the results and checkpoints of diverged runs, so that they start again."""
    for folder in (config.folder(runs) for config in configs):
        if not folder.is_dir():
            continue
        # A folder that another process holds is being trained again already.
        with contextlib.suppress(OSError, ValueError, HeldError), held(folder):
            if read_run(folder).error is not None:
                for name in ("checkpoint.pt", "metrics.jsonl", "result.json"):
                    (folder / name).unlink(missing_ok=True)


def run_missing(
    configs: Sequence[RunConfig],
    runs: Path,
    observer: Observer,
    *,
    workers: int = 1,
    address: str | None = None,
    per_gpu: int = 1,
    budget: float | None = None,
    prepare: Callable[[], object] = bool,
) -> list[Ended]:
    """Train runs, resuming from checkpoints; a failure does not stop the others.

    Ctrl-C, SIGTERM and the end of the budget (in seconds) stop the runs with a checkpoint, or
    before they start. A run that another process trains is checked again until that one has
    finished it or is gone. One worker is a loop in this process, more are tasks of Ray: on the
    cluster at `address`, whose machines have this package and see the folder `runs` at the same
    path, or on one started here. Each task calls `prepare` first.

    Raises:
        ImportError: Ray is not installed.
        Interrupted: A signal stopped the runs.
    """
    end, runs = math.inf, runs.absolute()
    if budget is not None:
        end = time.monotonic() + budget - min(RESERVE_SECONDS, budget / 20)
    if not configs or (workers == 1 and address is None):
        return _here(configs, runs, observer, end)
    threads = max(config.runtime.threads or 1 for config in configs)
    todo, ended = deque(configs), list[Ended]()
    pending: dict[Any, RunConfig] = {}
    stopping = False
    runs.mkdir(parents=True, exist_ok=True)
    with (
        _connected(address, workers * threads) as ray,
        tempfile.NamedTemporaryFile(dir=runs, prefix=".shared-") as probe,
        stop_signals() as stop,
    ):
        gpus = ray.cluster_resources().get("GPU", 0) > 0
        while pending or (todo and not stopping):
            if not stopping and (stop.received or time.monotonic() >= end):
                stopping = True
                for reference in pending:  # as by Ctrl-C: a run ends with a checkpoint
                    ray.cancel(reference)
            while todo and len(pending) < workers and not stopping:
                config = todo.popleft()
                observer.start(config)
                share = 1 / per_gpu if gpus and config.runtime.device != "cpu" else 0
                task = ray.remote(max_retries=RETRIES, num_cpus=threads, num_gpus=share)(_task)
                place = str(runs), probe.name, str(Path.cwd())
                pending[task.remote(config, *place, prepare)] = config
            observer.running({config: _share_done(config, runs) for config in pending.values()})
            ready, _ = ray.wait(list(pending), num_returns=1, timeout=LOOK_SECONDS)
            for reference in ready:
                one = _result(ray, reference, pending.pop(reference), stopping=stopping)
                if one.status in (STOPPED, HELD) and not stopping:
                    todo.append(one.config)  # somebody else has it, or stopped that process alone
                    time.sleep(HELD_SECONDS if one.status == HELD else 0)
                    continue
                ended.append(one)
                if one.status != STOPPED:
                    observer.finish(one)
        if stop.received:
            left = len(todo) + sum(one.status == STOPPED for one in ended)
            raise stop.interruption(f"with {left} run{'s' * (left != 1)} left", AGAIN)
    return [*ended, *(Ended(config, STOPPED) for config in todo)]


def attempt(config: RunConfig, folder: Path, progress: Progress) -> Ended:
    """Train one run, and return a failure instead of raising it; only `Interrupted` is raised."""
    try:
        result = train(config, folder, progress=progress)
    except HeldError as error:
        return Ended(config, HELD, str(error))
    except FloatingPointError as error:
        return Ended(config, DIVERGED, str(error))
    except Exception as error:  # noqa: BLE001 - whatever it is, the other runs continue
        text = str(error) or type(error).__name__
        readable = isinstance(error, (ValueError, OSError, ImportError))
        return Ended(config, FAILED, text if readable else f"{type(error).__name__}: {text}")
    return Ended(config, FINISHED, f"{result.accuracy:.2f} %")


def _here(configs: Sequence[RunConfig], runs: Path, observer: Observer, end: float) -> list[Ended]:
    """One run after the other in this process."""
    todo, ended, held = deque(configs), list[Ended](), set[RunConfig]()
    with stop_signals() as stop, _signal_at(end):
        while todo and stop.received is None:
            config = todo.popleft()
            observer.start(config)
            try:
                one = attempt(config, config.folder(runs), observer)
            except Interrupted:
                if time.monotonic() < end:
                    raise
                todo.appendleft(config)
                break
            if one.status == HELD:  # the others come first
                observer.message(f"{one.error} Looking at it again later.")
                todo.append(config)
                held.add(config)
                if held.issuperset(todo):
                    time.sleep(HELD_SECONDS)
            else:
                ended.append(one)
                observer.finish(one)
        if stop.received and time.monotonic() < end:
            left = len(todo)
            raise stop.interruption(f"with {left} run{'s' * (left != 1)} left", AGAIN)
    return [*ended, *(Ended(config, STOPPED) for config in todo)]


@contextlib.contextmanager
def _signal_at(end: float) -> Generator[None]:
    """Stop training with a checkpoint when time is up, as SIGTERM does."""
    left = min(max(0.0, end - time.monotonic()), threading.TIMEOUT_MAX)
    timer = threading.Timer(left, _thread.interrupt_main, (signal.SIGTERM,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


def _task(
    config: RunConfig, runs: str, probe: str, folder: str, prepare: Callable[[], object]
) -> Ended:
    """Executed by a cluster: one run, in the folder that all machines share."""
    if not Path(probe).exists():
        raise FileNotFoundError(
            f"{platform.node()} does not see the folder {runs}. Use a --results folder that "
            "every machine of the cluster has under the same path."
        )
    with contextlib.suppress(OSError):
        os.chdir(folder)  # names of data and weights may be relative to where the command was given
    prepare()
    try:
        return attempt(config, config.folder(Path(runs)), Silent())
    except Interrupted as error:  # a BaseException would be taken for the death of the process
        return Ended(config, STOPPED, str(error))


def _result(ray: Any, reference: Any, config: RunConfig, *, stopping: bool) -> Ended:
    try:
        return ray.get(reference)
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", error)  # what a task raised; else its process died
        if stopping or isinstance(cause, ray.exceptions.TaskCancelledError):
            return Ended(config, STOPPED)
        if cause is error:
            cause = f"Ray gave it up after {RETRIES + 1} tries ({first_line(error)})"
        return Ended(config, FAILED, str(cause))


def _share_done(config: RunConfig, runs: Path) -> float:
    """The fraction of a run's epochs that are done, read from its folder."""
    with contextlib.suppress(OSError, ValueError):
        return len(read_metrics(config.folder(runs))) / config.optim.epochs
    return 0.0


@contextlib.contextmanager
def _connected(address: str | None, cpus: int) -> Generator[Any]:
    """Ray, connected to a cluster or to one started here that only this machine can reach."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Without it Ray forwards the output of every process.
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        # Ray takes the address of a network interface, even if given 127.0.0.1, unless it believes
        # that no cluster can be built; then all its servers listen on loopback.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        options |= {"num_cpus": cpus, "include_dashboard": False}
    ray = require("ray", extra="cluster", purpose="training on Ray (--workers, --address)")
    ray.init(address=address or "local", **options)
    try:
        found = str(ray.get_runtime_context().gcs_address)
        if address is None and not found.startswith("127."):
            raise RuntimeError(
                f"Ray does not keep to this machine (it listens at {found}; was it imported "
                "before?). Start a cluster on a trusted network, and name it with --address."
            )
        yield ray
    finally:
        ray.shutdown()


_CIFAR = (50_000, 10_000, 32)  # training images, test images and their side
SIZES = {"digits": (1437, 360, 16), "cifar10": _CIFAR, "cifar100": _CIFAR}
MEASURED_IMAGES = 32
ATTENTION_SHARE = 1.2  # about how much longer a step takes with attention
SMALL = {"bottleneck": 11, "basic": 8}  # depth of the network that is measured


def estimate_seconds(configs: Iterable[RunConfig]) -> float | None:
    """How long runs take, from a few steps of a small network; None for unknown images."""
    total = 0.0
    for config in configs:
        model, data = config.model, config.data
        if data.name not in SIZES:
            return None
        train, test, side = SIZES[data.name]
        train, test = min(train - data.val, data.limit or train), min(test, data.test_limit or test)
        seconds = _seconds_an_image(model.block, config.runtime, data.size or side)
        seconds *= (model.depth - 2) / (SMALL[model.block] - 2)
        seconds *= 1 if model.attention == "none" else ATTENTION_SHARE
        # An evaluated image is a forward pass, about a third of a step.
        total += config.optim.epochs * (train + (test + data.val) / 3) * seconds
    return total


@cache
def _seconds_an_image(
    block: Literal["bottleneck", "basic"], runtime: RuntimeConfig, side: int
) -> float:
    """Seconds of a step per image: the fastest of a few, since others may use the machine."""
    import torch

    from spem.training.folder import build_network
    from spem.training.loop import resolved
    from spem.training.step import execution, make_optimizer, make_step, map_dtype

    small = RunConfig(ModelConfig(depth=SMALL[block], attention="none", block=block))
    runtime = resolved(replace(runtime, step="eager"), 1, attention=False)
    form = torch.channels_last if runtime.channels_last else torch.contiguous_format
    with execution(runtime) as place:
        network = build_network(small, classes=10).train()
        network = network.to(place, memory_format=form)  # pyright: ignore[reportCallIssue]
        step = make_step(network, make_optimizer(network, small.optim), small.optim, runtime)
        shape, dtype = (MEASURED_IMAGES, 3, side, side), map_dtype(runtime)
        images = torch.randn(shape, device=place).to(dtype, memory_format=form)
        labels = torch.arange(MEASURED_IMAGES, device=place) % 10
        seconds = timeit.repeat(lambda: float(step(images, labels).loss), repeat=5, number=1)
    return min(seconds) / MEASURED_IMAGES
