"""The command line as its user meets it: real processes, pipes, signals."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from PIL import Image

import spem
from spem import cli

PROGRAM = [sys.executable, "-c", "import sys; from spem.cli import main; sys.exit(main())"]
# one thread: these networks are too small for more, and a busy machine makes more much slower
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
# digits at their own size, few of them: a run takes about a second
TINY = ["--data", "digits", "--data.size", "8", "--data.pad", "1", "--limit", "96"]
TINY_RUN = ["smoke", "--attention", "spem", *TINY[2:]]


def process(args: Sequence[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PROGRAM, *args], cwd=cwd, env=ONE_THREAD, capture_output=True, text=True, check=False
    )


def start(args: Sequence[str], cwd: Path) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [*PROGRAM, *args], cwd=cwd, env=ONE_THREAD, stdout=pipe, stderr=pipe, text=True
    )


def test_the_console_script() -> None:
    (script,) = entry_points(group="console_scripts", name="spem")
    assert script.load() is cli.main


def test_list_in_a_pipe(tmp_path: Path) -> None:
    done = process(["list"], tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    for name in spem.list_attention():
        assert f"\n{name} " in done.stdout


def test_a_reader_that_stops_early(tmp_path: Path) -> None:
    running = start(["cost", "cifar:83", "--layers"], tmp_path)
    assert running.stdout is not None
    assert running.stderr is not None
    running.stdout.close()
    assert running.stderr.read() == ""
    running.stderr.close()
    assert running.wait() in (0, 141)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_an_output_that_is_full_or_closed(tmp_path: Path) -> None:
    command = f"{sys.executable} -m spem --version"
    for where, status, says in (
        ("/dev/full", 2, "spem: No space left on device.\n"),
        ("&-", 0, ""),
    ):
        done = subprocess.run(
            f"{command} >{where}", shell=True, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (status, says)


def test_names_that_the_terminal_cannot_show(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "\u5929" / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (8, 8), (80 * number, 9, 9)).save(
                tmp_path / "\u5929" / name / f"{number}.png"
            )
    args = ["train", "smoke", "--data", "\u5929", "--epochs", "1", "--attention", "none"]
    env = {**ONE_THREAD, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [*PROGRAM, *args], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "data           \\u5929, seed 0" in done.stdout


def test_a_mistake_is_one_line(tmp_path: Path) -> None:
    done = process(["trian", "short"], tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "unknown command 'trian'. Did you mean train?" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_interrupted_training_leaves_a_checkpoint(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    args = ["train", *TINY_RUN, "--epochs", "40", "--folder", "run"]
    running = start(args, tmp_path)
    assert running.stderr is not None
    for line in running.stderr:
        if line.startswith("epoch 1/40"):
            break
    running.send_signal(number)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == code
    assert "Training stopped by" in errors
    assert "Traceback" not in errors
    assert (tmp_path / "run" / "checkpoint.pt").exists()


def without_time(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file without what depends on clock or machine."""
    with path.open(newline="") as file:
        return [
            {k: v for k, v in row.items() if not k.startswith(("time_", "host_"))}
            for row in csv.DictReader(file)
        ]


@pytest.mark.slow
def test_a_killed_comparison_gives_the_same_csv(tmp_path: Path) -> None:
    args = ["compare", "none", "spem", *TINY, "--seeds", "2", "--epochs", "2"]
    running = start([*args, "--runs", "a", "--out", "first"], tmp_path)
    assert running.stderr is not None
    for line in running.stderr:
        if line.startswith("run 1/4:"):
            break
    running.kill()
    running.communicate()
    assert not (tmp_path / "first" / "runs.csv").exists()
    assert len(list((tmp_path / "a").rglob("result.json"))) == 1

    again = process([*args, "--runs", "a", "--out", "first"], tmp_path)
    assert again.returncode == 0, again.stderr
    assert "3 runs to train (1 more are finished)" in again.stderr
    undisturbed = process([*args, "--runs", "b", "--out", "second"], tmp_path)
    assert undisturbed.returncode == 0, undisturbed.stderr
    for name in ("runs.csv", "epochs.csv", "mixes.csv", "gates.csv"):
        rows = without_time(tmp_path / "first" / name)
        assert rows == without_time(tmp_path / "second" / name), name
        assert rows, name
    assert len(without_time(tmp_path / "first" / "runs.csv")) == 4
    assert (tmp_path / "first" / "comparison.png").stat().st_size > 10_000
    assert "none" in again.stdout
    assert "Too few seeds to compare with none: spem (" in again.stdout
