"""What the tests let other processes do: hold a folder, race for one, train and be killed.

Run as a program; children are forked from it before torch has computed anything, which is much
faster than starting an interpreter for each.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
from training.tiny import differences, outcome, shortened, tiny, trained

from spem.training import Interrupted
from spem.training.folder import build_network, held
from spem.training.step import make_optimizer

HERE = Path(__file__).resolve()
KILLED = shortened(tiny(epochs=2, checkpoint_minutes=0.0), images=100)
"""Six steps and two evaluations, with a checkpoint after each step."""


def start(*arguments: str) -> subprocess.Popen[str]:
    """Start this file as a program."""
    paths = [str(HERE.parents[1]), *sys.path]
    return subprocess.Popen(
        [sys.executable, str(HERE), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
    )


def hold(folder: Path) -> None:
    """Hold a folder, say so, and wait to be told to end (or killed)."""
    with held(folder):
        say("held")
        sys.stdin.readline()


def race(folder: Path, count: int) -> None:
    """Let many processes go for one folder at the same moment; print how many got it."""
    gate = os.pipe()
    children = [fork(partial(_enter, folder, gate)) for _ in range(count)]
    os.close(gate[1])  # all children wait for this end of file
    os.close(gate[0])
    say(str(sum(wait(child) == 0 for child in children)))


def _enter(folder: Path, gate: tuple[int, int]) -> int:
    os.close(gate[1])
    os.read(gate[0], 1)
    try:
        with held(folder):
            time.sleep(1)  # longer than the others need to fail
    except RuntimeError:
        return 1
    return 0


def kills(folder: Path, wanted: int) -> None:
    """Kill trainings at random moments, resume them, compare; print what differed."""
    chance = random.Random(0)
    _import_everything()
    undisturbed = folder / "undisturbed"
    assert wait(fork(partial(_train, undisturbed))) == 0
    began = time.monotonic()
    assert wait(fork(partial(_train, folder / "again"))) == 0  # with everything compiled
    length = time.monotonic() - began
    expected = outcome(undisturbed)
    hits = mid_run = 0
    for trial in range(6 * wanted):
        if hits == wanted:
            break
        where = folder / f"trial{trial}"
        child = fork(partial(_train, where))
        until = time.monotonic() + length
        if trial % 2:  # every other one once there is something to go on from
            while not (where / "checkpoint.pt").exists() and time.monotonic() < until:
                time.sleep(0.001)
        time.sleep(chance.uniform(0, length / 2 if trial % 2 else length))
        os.kill(child, signal.SIGKILL)
        if wait(child) == 0:
            continue  # it had ended before
        hits += 1
        mid_run += (where / "checkpoint.pt").exists()
        assert wait(fork(partial(_train, where))) == 0, f"trial {trial} did not resume"
        differing = differences(outcome(where), expected)
        assert not differing, f"trial {trial}: {differing}"
        left = {path.name for path in where.iterdir()}
        assert left == {"config.json", "metrics.jsonl", "model.safetensors", "result.json", ".lock"}
        shutil.rmtree(where)
    say(f"{hits} {mid_run}")


def _import_everything() -> None:
    """Load here what a training loads on its way, so that no child spends its time on that."""
    for module in ("safetensors.torch", "sklearn.datasets", "torch.utils.flop_counter"):
        import_module(module)
    make_optimizer(build_network(KILLED, classes=10), KILLED.optim)


def _train(where: Path) -> int:
    try:
        trained(KILLED, where)
    except Interrupted as stopped:
        return stopped.code
    return 0


def fork(work: Callable[[], int]) -> int:
    """Run a function in a child process; returns the child's id."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        code = work()
    finally:
        os._exit(code)


def wait(child: int) -> int:
    """Exit status of a child, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    torch.set_num_threads(1)
    command, target = sys.argv[1], Path(sys.argv[2])
    if command == "hold":
        hold(target)
    elif command == "train":
        trained(tiny(epochs=2, checkpoint_minutes=0.0), target)
    elif command == "race":
        race(target, int(sys.argv[3]))
    else:
        kills(target, int(sys.argv[3]))
