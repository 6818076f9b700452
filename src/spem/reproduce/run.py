"""Run what is missing: in this process one run after the other, or several at a time on Ray.

A Ray cluster executes whatever reaches its ports: it is for trusted networks. One that is started
here listens on this machine's loopback address only.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import platform
import signal
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from spem.extras import require
from spem.reproduce.tables import DIVERGED, FAILED, FINISHED
from spem.training import (
    HeldError,
    Interrupted,
    Progress,
    RunConfig,
    Silent,
    read_metrics,
    read_run,
    train,
)
from spem.training.signals import stop_signals

HELD, STOPPED = "held", "stopped"
RETRIES = 2
"""How often Ray restarts a run whose process died; it goes on from its checkpoint."""
LOOK_SECONDS = 0.5
HELD_SECONDS = 2.0
"""Time until a run that another process trains is checked again."""
RESERVE_SECONDS = 10.0
"""How long before the end of a budget (or a twentieth of it, if less) the runs are stopped."""


@dataclass(frozen=True)
class Ended:
    """How one run ended: `status` is "finished", "diverged", "failed", "held" or "stopped"."""

    config: RunConfig
    status: str
    error: str = ""


class Observer(Progress, Protocol):
    """Receives reports on many runs, besides those of each run."""

    def start(self, config: RunConfig) -> None:
        """A run begins, or goes on."""
        ...

    def running(self, done: dict[RunConfig, float]) -> None:
        """Runs that are under way elsewhere, and the share that each has done."""
        ...

    def finish(self, ended: Ended) -> None:
        """A run has ended."""
        ...


def missing(configs: Iterable[RunConfig], runs: Path) -> list[RunConfig]:
    """Those runs that have no result yet; that a run diverged is a result too."""
    return [config for config in configs if not (config.folder(runs) / "result.json").exists()]


def require_weights(configs: Iterable[RunConfig]) -> None:
    """Make sure that the weights that runs start from are here, before the first run.

    Raises:
        FileNotFoundError: They are not.
    """
    for name in dict.fromkeys(config.model.weights for config in configs):
        if name is not None and not Path(name).is_file():
            raise FileNotFoundError(
                f"the runs start from the weights {name}, which are not in {Path.cwd()}. They are "
                "part of the repository, not of the installed package: clone it, and start the "
                "command in its folder."
            )


def forget_diverged(configs: Iterable[RunConfig], runs: Path) -> None:
    """Remove the results and checkpoints of diverged runs, so that they start again."""
    for config in configs:
        folder = config.folder(runs)
        with contextlib.suppress(OSError, ValueError):
            if read_run(folder).error is not None:
                (folder / "checkpoint.pt").unlink(missing_ok=True)
                (folder / "metrics.jsonl").unlink(missing_ok=True)
                (folder / "result.json").unlink()


def run_missing(
    configs: Sequence[RunConfig],
    runs: Path,
    observer: Observer,
    *,
    workers: int = 1,
    address: str | None = None,
    per_gpu: int = 1,
    budget: float | None = None,
) -> list[Ended]:
    """Train runs; what has begun goes on from its checkpoint, what fails does not stop the others.

    Ctrl-C, SIGTERM and the end of the budget stop the runs with a checkpoint. A run that another
    process trains is checked again until that one has finished it or is gone.

    Args:
        configs: The runs, in the order in which to take them.
        runs: Folder of all runs.
        observer: Receives reports.
        workers: Runs at a time: one is a loop in this process, more are tasks of Ray.
        address: Of a Ray cluster whose machines have this package and see `runs` under this path;
            None starts one here where several workers are asked for.
        per_gpu: Runs at a time on one GPU.
        budget: Seconds after which everything is stopped.

    Returns:
        How each run ended; those that were stopped or not begun are "stopped".

    Raises:
        ImportError: Ray is not installed.
        ValueError: A number makes no sense.
        Interrupted: A signal stopped the runs.
    """
    for name, value in (("workers", workers), ("per-gpu", per_gpu), ("budget", budget)):
        if value is not None and not value > 0:
            raise ValueError(f"--{name} {value} must be larger than 0.")
    if not configs:
        return []
    runs = runs.absolute()
    reserve = 0.0 if budget is None else min(RESERVE_SECONDS, budget / 20)
    end = None if budget is None else time.monotonic() + budget - reserve
    if workers == 1 and address is None:
        return _here(configs, runs, observer, end)
    return _on_ray(configs, runs, observer, workers, address, per_gpu, end)


SIZES = {"digits": (1437, 360), "cifar10": (50_000, 10_000), "cifar100": (50_000, 10_000)}
"""Training and test images of the named data sets."""
MEASURED_IMAGES, MEASURED_SECONDS = 32, 0.5
ATTENTION_SHARE = 1.2
"""About how much longer a step takes with attention."""


def estimate_seconds(configs: Iterable[RunConfig]) -> float | None:
    """Roughly how long runs take one after the other: from a few steps of a small network.

    None where it is not known how many images there are.
    """
    speeds: dict[Any, float] = {}
    total = 0.0
    for config in configs:
        if config.data.name not in SIZES:
            return None
        train, test = SIZES[config.data.name]
        train = min(train - config.data.val, config.data.limit or train)
        test = min(test, config.data.test_limit or test) + config.data.val
        small = replace(config.model, depth=8 + 3 * (config.model.block == "bottleneck"))
        small = replace(small, attention="none", branch_start=None)
        side = config.data.size or (16 if config.data.name == "digits" else 32)
        key = (small, config.runtime, side, min(config.optim.batch, MEASURED_IMAGES))
        if key not in speeds:
            speeds[key] = _seconds_an_image(replace(config, model=small), side)
        deeper = (config.model.depth - 2) / (small.depth - 2)
        deeper *= 1 if config.model.attention == "none" else ATTENTION_SHARE
        # An evaluated image is a forward pass, about a third of a step.
        total += config.optim.epochs * (train + test / 3) * speeds[key] * deeper
    return total


def _seconds_an_image(config: RunConfig, side: int) -> float:
    """Of the step that trains, after one that warms up."""
    import torch

    from spem.seeding import initialise
    from spem.training.folder import build_network
    from spem.training.step import execution, make_optimizer, make_step

    device = config.runtime.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    threads = config.runtime.threads or torch.get_num_threads()
    runtime = replace(config.runtime, device=device, step="eager", threads=threads)
    batch = min(config.optim.batch, MEASURED_IMAGES)
    with execution(runtime) as place:
        model = build_network(config, classes=10)
        initialise(model, 0)
        form = torch.channels_last if runtime.channels_last else torch.contiguous_format
        model = model.to(place, memory_format=form).train()  # pyright: ignore[reportCallIssue]
        step = make_step(model, make_optimizer(model, config.optim), config.optim, runtime)
        dtype = torch.bfloat16 if runtime.precision == "bf16" else torch.float32
        images = torch.randn(batch, 3, side, side, device=place, dtype=dtype)
        images = images.contiguous(memory_format=form)
        labels = torch.arange(batch, device=place) % 10
        float(step(images, labels).loss)
        started, steps = time.monotonic(), 0
        while time.monotonic() - started < MEASURED_SECONDS:
            float(step(images, labels).loss)
            steps += 1
    return (time.monotonic() - started) / (steps * batch)


def attempt(config: RunConfig, folder: Path, progress: Progress) -> Ended:
    """Train one run, and return a failure instead of raising it; only a stop is raised.

    Raises:
        Interrupted: A signal stopped it, with a checkpoint.
    """
    try:
        result = train(config, folder, progress=progress)
    except HeldError as error:
        return Ended(config, HELD, str(error))
    except FloatingPointError as error:
        return Ended(config, DIVERGED, str(error))
    except Exception as error:  # noqa: BLE001 - whatever it is, the other runs go on
        text = str(error) or type(error).__name__
        readable = isinstance(error, (ValueError, OSError, ImportError))
        return Ended(config, FAILED, text if readable else f"{type(error).__name__}: {text}")
    return Ended(config, FINISHED, f"{result.accuracy:.2f} %")


def _here(
    configs: Sequence[RunConfig], runs: Path, observer: Observer, end: float | None
) -> list[Ended]:
    """One run after the other in this process."""
    todo, ended, held = deque(configs), list[Ended](), 0
    with stop_signals() as stop, _signal_at(end):
        while todo and stop.received is None:
            config = todo.popleft()
            observer.start(config)
            try:
                one = attempt(config, config.folder(runs), observer)
            except Interrupted:
                if end is None or time.monotonic() < end:
                    raise
                todo.appendleft(config)
                break
            if one.status == HELD:
                todo.append(config)
                held += 1
                if held == 1:
                    observer.message(f"{one.error} Looking at it again later.")
                if held >= len(todo):  # nothing else is left
                    time.sleep(HELD_SECONDS)
                continue
            held = 0
            ended.append(one)
            observer.finish(one)
        if stop.received and (end is None or time.monotonic() < end):
            raise stop.interruption(
                f"with {len(todo)} runs left", "Run the command again to go on."
            )
    return [*ended, *(Ended(config, STOPPED) for config in todo)]


@contextlib.contextmanager
def _signal_at(end: float | None) -> Generator[None]:
    """Stop a training with a checkpoint when the time is over, as SIGTERM does."""
    done = threading.Event()

    def stop() -> None:
        if not done.is_set():
            _thread.interrupt_main(signal.SIGTERM)

    timer = threading.Timer(0 if end is None else max(0.0, end - time.monotonic()), stop)
    timer.daemon = True
    if end is not None:
        timer.start()
    try:
        yield
    finally:
        done.set()
        timer.cancel()


def _on_ray(
    configs: Sequence[RunConfig],
    runs: Path,
    observer: Observer,
    workers: int,
    address: str | None,
    per_gpu: int,
    end: float | None,
) -> list[Ended]:
    """Each run as a Ray task, so many at a time."""
    threads = max(config.runtime.threads or 1 for config in configs)
    todo, ended = deque(configs), list[Ended]()
    pending: dict[Any, RunConfig] = {}
    stopping = False
    with (
        _connected(address, workers * threads) as ray,
        _probe(runs) as probe,
        stop_signals() as stop,
    ):
        gpus = ray.cluster_resources().get("GPU", 0) > 0
        task = ray.remote(_task)
        while pending or (todo and not stopping):
            if not stopping and (stop.received or (end is not None and time.monotonic() >= end)):
                stopping = True
                for reference in pending:  # as by Ctrl-C: a run ends with a checkpoint
                    ray.cancel(reference)
            while todo and len(pending) < workers and not stopping:
                config = _for_cluster(todo.popleft(), gpus=gpus)
                share = 1 / per_gpu if config.runtime.device.startswith("cuda") else 0
                observer.start(config)
                kind = task.options(max_retries=RETRIES, num_cpus=threads, num_gpus=share)
                reference = kind.remote(config, str(runs), str(probe))
                pending[reference] = config
            observer.running({c: _share_done(c, runs) for c in pending.values()})
            ready, _ = ray.wait(list(pending), num_returns=1, timeout=LOOK_SECONDS)
            for reference in ready:
                config = pending.pop(reference)
                one = _result(ray, reference, config, stopping=stopping)
                if one.status == STOPPED and not stopping:
                    todo.append(config)  # somebody stopped this process alone
                elif one.status == HELD and not stopping:
                    todo.append(config)
                    time.sleep(HELD_SECONDS)
                else:
                    ended.append(one)
                    if one.status != STOPPED:
                        observer.finish(one)
        if stop.received:
            left = len(todo) + sum(one.status == STOPPED for one in ended)
            raise stop.interruption(f"with {left} runs left", "Their checkpoints are written.")
    return [*ended, *(Ended(config, STOPPED) for config in todo)]


def _task(config: RunConfig, runs: str, probe: str) -> Ended:
    """What a cluster executes: one run, in the folder that all machines share."""
    if not Path(probe).exists():
        raise FileNotFoundError(
            f"{platform.node()} does not see the folder {runs}. Use a --results folder that "
            "every machine of the cluster has under the same path."
        )
    try:
        return attempt(config, config.folder(Path(runs)), Silent())
    except Interrupted as error:  # a BaseException would be taken for the death of the process
        return Ended(config, STOPPED, str(error))


def _result(ray: Any, reference: Any, config: RunConfig, *, stopping: bool) -> Ended:
    try:
        return ray.get(reference)
    except ray.exceptions.TaskCancelledError:
        return Ended(config, STOPPED)
    except ray.exceptions.RayTaskError as error:
        return Ended(config, FAILED, str(error.cause))
    except ray.exceptions.RayError as error:
        if stopping:
            return Ended(config, STOPPED)
        reason = str(error).strip().partition("\n")[0]
        return Ended(config, FAILED, f"Ray gave it up after {RETRIES + 1} tries ({reason})")


def _share_done(config: RunConfig, runs: Path) -> float:
    """The share of its epochs that a run has behind it, from its folder."""
    with contextlib.suppress(OSError, ValueError):
        return len(read_metrics(config.folder(runs))) / config.optim.epochs
    return 0.0


def _for_cluster(config: RunConfig, *, gpus: bool) -> RunConfig:
    """The config with what must not depend on the machine that happens to execute it."""
    runtime, data = config.runtime, config.data
    if runtime.device == "auto":
        runtime = replace(runtime, device="cuda" if gpus else "cpu")
    if data.root is not None:
        data = replace(data, root=str(Path(data.root).absolute()))
    return replace(config, runtime=runtime, data=data)


@contextlib.contextmanager
def _probe(runs: Path) -> Generator[Path]:
    """A file by which tasks see whether they share this machine's file system."""
    runs.mkdir(parents=True, exist_ok=True)
    probe = runs / f".shared-{uuid.uuid4().hex}"
    probe.touch()
    try:
        yield probe
    finally:
        probe.unlink(missing_ok=True)


@contextlib.contextmanager
def _connected(address: str | None, cpus: int) -> Generator[Any]:
    """Ray, joined to a cluster or with one started here that only this machine can reach."""
    imported = "ray" in sys.modules
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if address is None:
        # Ray takes the address of a network interface, even if given 127.0.0.1, unless it believes
        # that no cluster can be built; then all its servers listen on loopback.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    ray = require("ray", extra="cluster", purpose="--workers and --address")
    # Without it Ray forwards the output of every process.
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
    else:
        ray.init(address=address, **quiet)
    try:
        found = str(ray.get_runtime_context().gcs_address)
        if address is None and not found.startswith("127."):
            early = "was imported before and " if imported else ""
            raise RuntimeError(
                f"Ray {early}does not keep to this machine (it listens at {found}). Start a "
                "cluster on a trusted network yourself, and name it with --address."
            )
        yield ray
    finally:
        ray.shutdown()
