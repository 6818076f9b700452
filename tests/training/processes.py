"""What the tests let other processes do: hold a folder, race for one, train and be killed.

Run as a program; children are forked from it before torch has computed anything, which is much
faster than starting an interpreter for each.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from importlib import import_module
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import torch
from training.tiny import differences, outcome, shortened, tiny, trained

from spem.training import HeldError
from spem.training.folder import build_network, held
from spem.training.step import make_optimizer

FORK = multiprocessing.get_context("fork")
KILLED = shortened(tiny(epochs=2, checkpoint_minutes=0.0), images=100)
"""Six steps and two evaluations, with a checkpoint after each step."""


def environment() -> dict[str, str]:
    """That of a program of these tests."""
    paths = os.pathsep.join([str(Path(__file__).resolve().parents[1]), *sys.path])
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


def start(*arguments: str) -> subprocess.Popen[str]:
    """Start this file as a program."""
    command, pipe = [sys.executable, __file__, *arguments], subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment())


def hold(folder: Path) -> None:
    """Hold a folder, say so, and wait to be told to end (or killed)."""
    with held(folder):
        print("held", flush=True)
        sys.stdin.readline()


def race(folder: Path, count: int) -> None:
    """Let many processes go for one folder at the same moment; print how many got it."""
    barrier = FORK.Barrier(count)
    children = [forked(_enter, folder, barrier) for _ in range(count)]
    print(sum(ended(child) == 0 for child in children))


def _enter(folder: Path, barrier: Any) -> None:
    barrier.wait()
    try:
        with held(folder):
            time.sleep(1)  # longer than the others need to fail
    except HeldError:
        sys.exit(1)


def kills(folder: Path, wanted: int) -> None:
    """Kill trainings at random moments, resume them, compare; print what differed."""
    chance = random.Random(0)
    # What a training loads on its way is loaded here, so that no child spends its time on that.
    for module in ("safetensors.torch", "sklearn.datasets", "torch.utils.flop_counter"):
        import_module(module)
    make_optimizer(build_network(KILLED, classes=10), KILLED.optim)
    undisturbed = folder / "undisturbed"
    assert ended(forked(trained, KILLED, undisturbed)) == 0
    began = time.monotonic()
    assert ended(forked(trained, KILLED, folder / "again")) == 0  # with everything compiled
    length = time.monotonic() - began
    expected = outcome(undisturbed)
    hits = mid_run = 0
    for trial in range(6 * wanted):
        if hits == wanted:
            break
        where = folder / f"trial{trial}"
        child = forked(trained, KILLED, where)
        if trial % 2:  # every other one once there is something to go on from
            while not (where / "checkpoint.pt").exists() and child.is_alive():
                time.sleep(0.001)
        time.sleep(chance.uniform(0, length / 2 if trial % 2 else length))
        child.kill()
        if ended(child) == 0:
            length /= 2  # it had ended before: the machine has become faster
            continue
        hits += 1
        mid_run += (where / "checkpoint.pt").exists()
        assert ended(forked(trained, KILLED, where)) == 0, f"trial {trial} did not resume"
        differing = differences(outcome(where), expected)
        assert not differing, f"trial {trial}: {differing}"
        left = {path.name for path in where.iterdir()}
        assert left == {"config.json", "metrics.jsonl", "model.safetensors", "result.json", ".lock"}
        shutil.rmtree(where)
    print(hits, mid_run)


def forked(work: Any, *arguments: Any) -> ForkProcess:
    """A child process that runs a function."""
    child = FORK.Process(target=work, args=arguments)
    child.start()
    return child


def ended(child: ForkProcess) -> int | None:
    """Exit status of a child, negative for a signal."""
    child.join()
    return child.exitcode


if __name__ == "__main__":
    torch.set_num_threads(1)
    command, target, *numbers = sys.argv[1:]
    if command == "train":
        trained(tiny(epochs=2, checkpoint_minutes=0.0), Path(target))
    else:
        {"hold": hold, "race": race, "kills": kills}[command](Path(target), *map(int, numbers))
