"""`spem reproduce`, killed with all its workers at random moments, ends as if undisturbed.

Run as a program, it forks the commands it kills, each with a process group of its own, from a
process that has imported everything: a start then takes no longer than what it does.
"""

from __future__ import annotations

import csv
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from reproduce.grids import PATIENCE, fewer_images, wait_until
from training.processes import fork, say, wait

HERE = Path(__file__).resolve()
SEED = 4
"""Of the moments at which is killed."""
COMMAND = ["reproduce", "penalty", "--scale", "smoke", "--seeds", "1"]
RUNS = 2
TABLES = ("runs.csv", "epochs.csv", "mixes.csv", "gates.csv", "gradients.csv")
WHOLE = ("plan.csv", "predictions.npz")


def test_a_killed_reproduction_ends_in_the_same_bytes(tmp_path: Path) -> None:
    paths = [str(HERE.parents[1]), *sys.path]
    done = subprocess.run(
        [sys.executable, str(HERE), str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        check=False,
        timeout=5 * PATIENCE,
    )
    print(done.stdout)
    logs = "".join(path.read_text() for path in sorted(tmp_path.glob("*.log")))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    assert "Traceback" not in logs, logs
    # Before anything was trained, within each of the two runs, and with both of them finished.
    hits = [line.split(": ")[1] for line in done.stdout.splitlines() if line.startswith("killed")]
    assert hits[:4] == [
        "0 of 2 finished, without checkpoint",
        "0 of 2 finished, without checkpoint",
        "0 of 2 finished, with a checkpoint",
        "1 of 2 finished, with a checkpoint",
    ]
    assert hits[4] == "2 of 2 finished"
    killed, expected = tmp_path / "killed", tmp_path / "undisturbed"
    for name in WHOLE:
        assert (killed / name).read_bytes() == (expected / name).read_bytes(), name
    for name in TABLES:
        rows = without_machine(expected / name)
        assert len(rows) > RUNS, name
        assert without_machine(killed / name) == rows, name
    assert (killed / "report.html").exists()


def without_machine(path: Path) -> list[list[str]]:
    """The cells of a table, heading first, but for columns of clock and machine."""
    with path.open(newline="") as file:
        heading, *rows = csv.reader(file)
    kept = [i for i, name in enumerate(heading) if not name.startswith(("time_", "host_"))]
    return [[row[i] for i in kept] for row in (heading, *rows)]


def start(out: Path, workers: int) -> int:
    """Start the command in a process group of its own; returns its id."""

    def work() -> int:
        os.setsid()
        with out.with_suffix(".log").open("a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
        options = ["--results", str(out), "--workers", str(workers)]
        return import_module("spem.cli").main([*COMMAND, *options])

    child = fork(work)
    wait_until(lambda: os.getpgid(child) == child)
    return child


def moments(out: Path, name: str) -> list[float]:
    """When the files of this name were written in the folders of the runs."""
    return sorted(path.stat().st_mtime for path in (out / "runs").rglob(name))


def epochs(out: Path) -> int:
    """Epochs that the runs have written down."""
    return sum(path.read_text().count("\n") for path in (out / "runs").rglob("metrics.jsonl"))


def kill(out: Path, ready: Callable[[], object], delay: float, over: Callable[[], object]) -> None:
    """Start the command and kill it so long after what is waited for; say how far it was.

    Should the machine have become faster than it was, it is killed before the phase is over.
    """
    child = start(out, workers=1)
    try:
        wait_until(ready)
        end = time.monotonic() + delay
        wait_until(lambda: over() or time.monotonic() > end)
    finally:
        os.killpg(child, signal.SIGKILL)
        code = wait(child)
    how = "killed" if code == -signal.SIGKILL else f"ended with {code}"
    finished, begun = len(moments(out, "result.json")), len(moments(out, "checkpoint.pt"))
    tables = ", ".join(name for name in (*WHOLE, *TABLES, "report.md") if (out / name).exists())
    more = "" if finished == RUNS else ", with a checkpoint" if begun else ", without checkpoint"
    say(f"{how} {delay:.3f} s later [{tables}]: {finished} of {RUNS} finished{more}")


def main(folder: Path) -> None:
    """Run once undisturbed, then be killed in every phase, then go on to the end."""
    for name in ("cli.reproduce", "reproduce.gather", "reproduce.grid", "reproduce.report"):
        import_module(f"spem.{name}")
    fewer_images()
    expected, out = folder / "undisturbed", folder / "killed"
    began = time.time()
    assert wait(start(expected, workers=RUNS)) == 0
    ended = time.time()
    logs, results = moments(expected, "log.txt"), moments(expected, "result.json")
    planned, working = (expected / "plan.csv").stat().st_mtime - began, logs[0] - began
    collecting = ended - results[-1]
    training = results[0] - logs[0]

    chance = random.Random(SEED)
    say(f"seed {SEED}: {planned=:.1f} {working=:.1f} {training=:.1f} {collecting=:.1f}")

    def files(name: str, count: int = 1) -> Callable[[], bool]:
        return lambda: len(moments(out, name)) >= count

    # With one worker the second run begins after the first. A run has four epochs.
    kill(out, lambda: True, chance.uniform(0, planned), files("log.txt"))
    kill(out, lambda: True, chance.uniform(0, working), files("log.txt"))
    kill(out, files("checkpoint.pt"), chance.uniform(0, training / 2), lambda: epochs(out) >= 3)
    kill(
        out,
        lambda: epochs(out) >= 5,
        chance.uniform(0, training / 2),
        lambda: epochs(out) >= 7,
    )
    for _ in range(3):
        kill(
            out,
            files("result.json", RUNS),
            chance.uniform(0, collecting),
            (out / "report.md").exists,
        )
    assert wait(start(out, workers=1)) == 0
    say("done")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
