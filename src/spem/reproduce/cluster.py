"""Run what is missing of many runs as tasks of a Ray cluster.

A Ray cluster executes whatever reaches its ports: it is for trusted networks. One that is started
here listens on this machine's loopback address only.
"""

import functools
import hashlib
import json
import math
import os
import sys
import tempfile
import time
import uuid
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from spem.extras import require
from spem.reproduce.board import GridObserver, GridOutcome, Run, Tally
from spem.reproduce.grid import (
    DEATHS,
    HELD_SECONDS,
    LOOK_SECONDS,
    require_positive,
    stop_moment,
    stopped_by,
)
from spem.reproduce.worker import Outcome, Told, attempt, plan_all
from spem.training import RunConfig, Silent, read_config
from spem.training.checkpoint import write_atomic
from spem.training.claim import HeldError, claimed
from spem.training.environment import ENVIRONMENT
from spem.training.log import METRICS, Status
from spem.training.memory import keep_freed_memory
from spem.training.results import RESULT
from spem.training.runs import ANSWERS, CONFIG, GATES, WEIGHTS
from spem.training.sets import images_kept
from spem.training.signals import StopSignals, stop_signals

PROGRESS_SECONDS = 2.0
_BROUGHT = (CONFIG, ENVIRONMENT, METRICS, "log.txt", ANSWERS, GATES, WEIGHTS, RESULT)
"""Files that a task brings back from a machine with another file system, the result last."""

Brought = dict[str, bytes]


def run_on_ray(
    configs: Sequence[RunConfig],
    runs: Path,
    *,
    address: str | None = None,
    workers: int | None = None,
    per_gpu: int = 1,
    budget: float | None = None,
    retry_diverged: bool = False,
    observer: GridObserver,
) -> GridOutcome:
    """Train every run that has no result yet, each as a Ray task, and tell how it went.

    A task takes as many CPUs as its run has threads and, where the cluster has GPUs, its share of
    one. When its process dies, Ray starts it again and it goes on from its checkpoint. If `runs` is
    on a file system that all machines share, tasks train in it; if not, they train in their own
    machine's temporary folder, where a task that Ray moves to another machine starts anew, and
    bring the finished files back. The results are those of `spem.reproduce.grid.run_grid`.

    Args:
        configs: The runs, in the order in which to take them.
        runs: Folder of all runs.
        address: Of a cluster to join, whose machines have this package; None starts one here.
        workers: Runs at a time; None is as many as the cluster has room for.
        per_gpu: Runs at a time on one GPU.
        budget: Seconds after which everything is stopped.
        retry_diverged: Train runs that diverged before once more, from their start.
        observer: Told what happens.

    Raises:
        ImportError: Ray is not installed.
        ConnectionError: There is no cluster at the address.
        ValueError: A number makes no sense.
    """
    require_positive(workers=workers, per_gpu=per_gpu, budget=budget)
    stop_at = stop_moment(budget)
    threads = max((config.runtime.threads or 1 for config in configs), default=1)
    with _connected(address, None if workers is None else workers * threads) as ray:
        gpus = ray.cluster_resources().get("GPU", 0)
        configs = [_for_cluster(config, gpus=bool(gpus)) for config in configs]
        runs = runs.absolute()
        plan_all(configs, runs)
        tally = Tally(configs, runs, retry_diverged=retry_diverged)
        with stop_signals() as stop, _probe(runs) as probe:
            try:
                _Tasks(ray, tally, probe, workers, per_gpu, stop_at, stop, observer).run()
            finally:
                observer.close()
        return tally.outcome(stop.received)


class _Tasks:
    """A call of `run_on_ray` under way."""

    def __init__(
        self,
        ray: Any,
        tally: Tally,
        probe: Path,
        workers: int | None,
        per_gpu: int,
        stop_at: float | None,
        stop: StopSignals,
        observer: GridObserver,
    ) -> None:
        self.ray, self.tally, self.probe, self.observer = ray, tally, probe, observer
        self.workers, self.per_gpu = workers, per_gpu
        self.stop_at, self.stop, self.stopping = stop_at, stop, ""
        self.task = ray.remote(_task)
        self.runs: dict[Any, Run] = {}
        self.look_at = 0.0

    def run(self) -> None:
        """Hand in tasks and listen until none is left or all are stopped."""
        while True:
            if not self.stopping:
                self.stopping = stopped_by(self.stop, self.stop_at)
                if self.stopping:
                    for reference in self.runs:  # as by Ctrl-C: a run ends with a checkpoint
                        self.ray.cancel(reference)
            if not self.stopping:
                self._hand_in()
            self.observer.show(self.tally.board(self.stopping))
            if not self.runs and (self.stopping or not self.tally.open):
                return
            self._listen()

    def _hand_in(self) -> None:
        room = self.tally.workers = self._room()
        while len(self.runs) < room:
            run = self.tally.next(HELD_SECONDS)
            if run is None:
                return
            kind = self.tally.begin(run)
            if kind:
                self.observer.event(kind, run.config, "")
            config = _as_planned(run.config, run.folder)
            options: dict[str, Any] = {
                "num_cpus": config.runtime.threads or 1,
                "max_retries": DEATHS - 1,
                "name": f"{config.slug} seed {config.seed}",
            }
            if _on_gpu(config):
                options["num_gpus"] = 1 / self.per_gpu
            task = self.task.options(**options)
            reference = task.remote(config, str(run.folder), str(self.probe), run.retry)
            self.runs[reference] = run

    def _room(self) -> int:
        """How many runs the cluster can take at a time; it may grow and shrink."""
        there = self.ray.cluster_resources()
        configs = [run.config for run in [*self.tally.waiting, *self.runs.values()]]
        threads = max((config.runtime.threads or 1 for config in configs), default=1)
        room = int(there.get("CPU", 0)) // threads
        if any(_on_gpu(config) for config in configs):
            room = min(room, int(there.get("GPU", 0)) * self.per_gpu)
        return max(1, room if self.workers is None else min(room, self.workers))

    def _listen(self) -> None:
        if not self.runs:
            time.sleep(LOOK_SECONDS)
            return
        ready, _ = self.ray.wait(list(self.runs), num_returns=1, timeout=LOOK_SECONDS)
        for reference in ready:
            run = self.runs.pop(reference)
            outcome = self._outcome(reference, run)
            if outcome.kind == "stopped" and not self.stopping and run.deaths + 1 < DEATHS:
                # A signal reached this process alone, which ended the task well for Ray.
                run.deaths += 1
                self.tally.again(run)
                text = "its process was stopped; it goes on from its checkpoint"
                self.observer.event("died", run.config, text)
                continue
            kind = self.tally.end(run, outcome)
            if kind:
                self.observer.event(kind, run.config, outcome.text)
        if time.monotonic() >= self.look_at:
            self.look_at = time.monotonic() + PROGRESS_SECONDS
            for run in self.runs.values():
                self._look(run)

    def _outcome(self, reference: Any, run: Run) -> Outcome:
        try:
            outcome, brought = self.ray.get(reference)
        except self.ray.exceptions.TaskCancelledError:
            return Outcome("stopped", "stopped")
        except self.ray.exceptions.RayError as error:
            if self.stopping:
                return Outcome("stopped", "stopped")
            reason = str(error).strip().partition("\n")[0]
            return Outcome("failed", f"Ray gave the task up after {DEATHS} tries ({reason})")
        if brought:
            try:
                _bring(brought, run.folder)
            except HeldError as error:
                return Outcome("held", str(error))
            except OSError as error:
                return Outcome("failed", f"{run.folder}: {error.strerror or error}")
        return outcome

    def _look(self, run: Run) -> None:
        """Read how far a run is from its folder, if tasks share it."""
        with suppress(OSError, ValueError, KeyError):
            lines = (run.folder / METRICS).read_text(encoding="utf-8").splitlines()
            last = json.loads(lines[-1]) if lines else None
            if last is not None:
                self.tally.note(run, Told(_status(run.config, len(lines), last)))
                self.tally.note(run, Told(accuracy=last["test_accuracy"]))


def _task(
    config: RunConfig, folder: str, probe: str, retry_diverged: bool
) -> tuple[Outcome, Brought]:
    """What a cluster executes: one try at a run, in the shared folder or in one of its own."""
    _settle_in()
    shared = Path(probe).exists()
    where = Path(folder) if shared else _own_folder(folder)
    outcome = attempt(config, where, Silent(), retry_diverged=retry_diverged)
    if shared or outcome.kind not in ("finished", "diverged"):
        return outcome, {}
    names = [
        path.name for path in where.iterdir() if path.name in _BROUGHT or "diverged" in path.name
    ]
    # What was trained stays there too: if the driver is lost, its next call finds it.
    return outcome, {name: (where / name).read_bytes() for name in names}


@functools.cache
def _settle_in() -> None:
    """Decode images once for all tasks that a Ray process executes, and keep its memory."""
    images_kept().__enter__()
    keep_freed_memory()


def _own_folder(folder: str) -> Path:
    """Where a task trains that does not share the driver's file system; the same at each try."""
    key = hashlib.sha256(f"{os.getuid()} {folder}".encode()).hexdigest()[:16]
    own = Path(tempfile.gettempdir()) / f"spem-{os.getuid()}" / key
    own.mkdir(parents=True, exist_ok=True, mode=0o700)
    return own


def _bring(brought: Brought, folder: Path) -> None:
    """Write the files of a task into the run's folder, the result last."""
    with claimed(folder):
        if (folder / RESULT).exists():
            return
        for name in sorted(brought, key=lambda name: name == RESULT):
            write_atomic(folder / name, brought[name])


def _for_cluster(config: RunConfig, *, gpus: bool) -> RunConfig:
    """The config with what must not depend on the machine that happens to execute it."""
    runtime, data = config.runtime, config.data
    if runtime.device == "auto":
        runtime = replace(runtime, device="cuda" if gpus else "cpu")
    if data.root is not None:
        data = replace(data, root=str(Path(data.root).absolute()))
    return replace(config, runtime=runtime, data=data)


def _as_planned(config: RunConfig, folder: Path) -> RunConfig:
    """The config with the runtime that was written down when the run was planned."""
    with suppress(ValueError, OSError):
        stored = read_config(folder)
        if stored is not None:
            return replace(config, runtime=stored.runtime)
    return config


def _on_gpu(config: RunConfig) -> bool:
    return config.runtime.device.startswith("cuda")


def _status(config: RunConfig, epochs: int, last: dict[str, Any]) -> Status:
    """Where a run stands by its last complete epoch."""
    images = last["images_per_second"] * last["seconds"]
    each = last["seconds"] + last["evaluation_seconds"]
    steps = max(1, math.ceil(images / config.optim.batch))
    left = (config.optim.epochs - epochs) * each
    return Status(epochs, config.optim.epochs, 0, steps, last["images_per_second"], left, last)


@contextmanager
def _probe(runs: Path) -> Generator[Path]:
    """A file by which tasks see whether they share the driver's file system."""
    runs.mkdir(parents=True, exist_ok=True)
    probe = runs / f".shared-{uuid.uuid4().hex}"
    probe.touch()
    try:
        yield probe
    finally:
        probe.unlink(missing_ok=True)


@contextmanager
def _connected(address: str | None, cpus: int | None) -> Generator[Any]:
    """Ray, joined to a cluster or with one started here that only this machine can reach."""
    imported = "ray" in sys.modules
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
    if address is None:
        # Ray takes the address of a network interface, even if told 127.0.0.1, unless it believes
        # that no cluster can be built; then all its servers listen on loopback.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    ray = require("ray", extra="cluster", purpose="--engine ray")
    # Without it Ray forwards the output of every process.
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
    else:
        ray.init(address=address, **quiet)
    try:
        found = str(ray.get_runtime_context().gcs_address)
        if address is None and not found.startswith("127."):
            how = "was imported before, " if imported else ""
            raise RuntimeError(
                f"reproduce: Ray {how}does not keep to this machine (it listens at {found}). Start "
                "a cluster on a trusted network yourself, and name it with --address."
            )
        yield ray
    finally:
        ray.shutdown()
