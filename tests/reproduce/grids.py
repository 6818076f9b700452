"""Grids of a few seconds for tests, and what other processes do with them.

Run as a program, it forks the commands under test before torch has computed anything, which is much
faster than starting an interpreter for each. Their workers are started as always.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from training.processes import fork, say, wait
from training.tiny import differences, outcome, tiny

from spem.reproduce.board import Board
from spem.reproduce.grid import run_grid
from spem.reproduce.scales import SCALES
from spem.training import RunConfig, Silent, train
from spem.training.checkpoint import load_checkpoint
from spem.training.claim import process_start

HERE = Path(__file__).resolve()
LONG = 100_000
"""Epochs of a run that no test waits for."""
PATIENCE = 120.0
"""Seconds after which a test gives up waiting; workers take long to start on a busy machine."""


def plan(count: int, epochs: int = 4) -> list[RunConfig]:
    """Runs of 7 steps an epoch with a checkpoint after every step: none, se, spem, then seed 1."""
    configs = [
        replace(tiny(name, epochs=epochs, checkpoint_minutes=0.0), seed=seed)
        for seed in range((count + 2) // 3)
        for name in ("none", "se", "spem")
    ]
    few = [replace(c, data=replace(c.data, test_limit=50)) for c in configs]
    return few[:count]


def fewer_images() -> None:
    """Let a third of the images do for the scale `smoke`: how long it trains is not the point.

    A run still has four epochs of a moment each, so that it can be killed between any two.
    """
    smoke = SCALES["smoke"]

    def base(dataset: str) -> RunConfig:
        config = smoke.base(dataset)
        return replace(config, data=replace(config.data, limit=480))

    SCALES["smoke"] = replace(smoke, base=base)


class Recorder:
    """A grid's observer that keeps what it is told."""

    def __init__(self, look: Callable[[Board], None] = lambda board: None) -> None:
        self.seen: list[tuple[str, str]] = []
        self.texts: dict[str, str] = {}
        self.closed = False
        self._look = look

    def event(self, kind: str, config: RunConfig, text: str) -> None:
        name = f"{config.model.depth} {config.model.attention} {config.seed}"
        self.seen.append((kind, name))
        self.texts[kind] = text

    def show(self, board: Board) -> None:
        self._look(board)

    def close(self) -> None:
        self.closed = True

    def names(self, kind: str) -> list[str]:
        return sorted(name for what, name in self.seen if what == kind)


def program(command: str, folder: Path) -> str:
    """Run this file as a program in a process group of its own; returns what it says."""
    paths = [str(HERE.parents[1]), *sys.path]
    done = subprocess.run(
        [sys.executable, str(HERE), command, str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        check=False,
        timeout=2 * PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


def undisturbed(configs: Sequence[RunConfig], runs: Path) -> None:
    """Train the runs here, one after the other, by `train` alone."""
    for config in configs:
        train(config, config.folder(runs), progress=Silent())


def require_same(configs: Sequence[RunConfig], runs: Path, expected: Path) -> None:
    """Weights, momentum and metrics of every run are equal bit for bit to those expected."""
    for config in configs:
        here, there = outcome(config.folder(runs)), outcome(config.folder(expected))
        assert differences(here, there) == [], config.model.attention
        for name in ("answers.npy", "gates.json"):
            ours, theirs = (config.folder(where) / name for where in (runs, expected))
            assert ours.read_bytes() == theirs.read_bytes(), name


def holders(runs: Path) -> list[int]:
    """Ids of the living processes that train in the folder."""
    found: list[int] = []
    for claim in runs.rglob(".claim"):
        try:
            values = json.loads(claim.read_text())
        except (OSError, ValueError):
            continue
        if process_start(values["pid"]) == values["started"]:
            found.append(values["pid"])
    return found


def trained_since(moment: float, runs: Path) -> bool:
    """Whether any run has written a checkpoint since a time (of the system's clock)."""
    return any(path.stat().st_mtime > moment for path in runs.rglob("checkpoint.pt"))


def wait_until(condition: Callable[[], object]) -> None:
    """Wait for something to become true.

    Raises:
        TimeoutError: It has not within `PATIENCE`.
    """
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("what was waited for has not happened")
        time.sleep(0.02)


def starts(config: RunConfig, runs: Path) -> int:
    """How many times a training began or went on in the run's folder."""
    return (config.folder(runs) / "log.txt").read_text().count("step: eager")


def grid(runs: Path, count: int, epochs: int, workers: int = 1) -> int:
    """In a child process with a process group of its own, train a grid; returns the child's id."""

    def work() -> int:
        os.setsid()
        seen = Recorder()
        done = run_grid(plan(count, epochs), runs, workers=workers, observer=seen)
        counts = [len(x) for x in (done.finished, done.diverged, done.failed, done.held, done.left)]
        began = len(seen.names("start")) - len(seen.names("held"))
        (runs / f"outcome-{os.getpid()}").write_text(f"{counts} {began}")
        return 0 if done.stopped_by is None else 128 + done.stopped_by

    return fork(work)


def outcome_of(child: int, runs: Path) -> tuple[str, int]:
    """What a grid in a child ended in: the counts of its outcome, and how many runs it began."""
    counts, _, began = (runs / f"outcome-{child}").read_text().rpartition(" ")
    return counts, int(began)


def share(folder: Path) -> None:
    """Two commands on one folder: each run is trained by one of them, once; both wait for all."""
    configs, runs = plan(6, 4), folder / "runs"
    runs.mkdir()
    children = [grid(runs, 6, 4) for _ in range(2)]
    assert [wait(child) for child in children] == [0, 0]
    ends = [outcome_of(child, runs) for child in children]
    assert [counts for counts, _ in ends] == ["[6, 0, 0, 0, 0]"] * 2, ends
    assert [starts(config, runs) for config in configs] == [1] * 6
    assert min(began for _, began in ends) > 0, ends
    undisturbed(configs, folder / "expected")
    require_same(configs, runs, folder / "expected")
    say("shared")


def kills(folder: Path) -> None:
    """Kill whole grids, parent and workers, at random moments; then leave one alone."""
    runs, chance = folder / "runs", random.Random()
    runs.mkdir()
    for workers in (2, 1):
        began = time.time()
        child = grid(runs, 3, 6, workers)
        wait_until(partial(trained_since, began, runs))
        time.sleep(chance.uniform(0, 1))
        os.killpg(child, signal.SIGKILL)
        wait(child)
    child = grid(runs, 3, 6)
    assert wait(child) == 0
    assert outcome_of(child, runs)[0] == "[3, 0, 0, 0, 0]"
    configs = plan(3, 6)
    undisturbed(configs, folder / "expected")
    require_same(configs, runs, folder / "expected")
    say("the same")


def stops(folder: Path) -> None:
    """Ctrl-C, and a parent that is killed alone: both leave checkpoints and no process."""
    (config,) = plan(1, LONG)
    run = config.folder(folder)
    child = grid(folder, 1, LONG)
    wait_until((run / "checkpoint.pt").exists)
    os.killpg(child, signal.SIGINT)
    assert wait(child) == 130
    assert outcome_of(child, folder)[0] == "[0, 0, 0, 0, 1]"
    assert holders(folder) == []
    steps = progress(run)
    assert steps > 0

    child = grid(folder, 1, LONG)
    wait_until(lambda: holders(folder))
    (worker,) = holders(folder)
    wait_until(lambda: progress(run) > steps)
    os.kill(child, signal.SIGKILL)
    wait(child)
    wait_until(lambda: process_start(worker) is None)
    assert not (run / ".claim").exists(), "the worker did not end in order"
    say("stopped")


def progress(folder: Path) -> int:
    """Steps of the run that its checkpoint holds."""
    content = load_checkpoint(folder / "checkpoint.pt")
    return 7 * content["epoch"] + content["step"]


if __name__ == "__main__":
    {"share": share, "kills": kills, "stops": stops}[sys.argv[1]](Path(sys.argv[2]))
