"""Grids whose processes are killed or stopped at random moments end as if undisturbed."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

from reproduce.grids import (
    Recorder,
    holders,
    plan,
    program,
    require_same,
    trained_since,
    undisturbed,
)

from spem.reproduce.board import Board
from spem.reproduce.grid import run_grid


def test_killed_workers_are_replaced(tmp_path: Path) -> None:
    configs = plan(2, epochs=6)
    undisturbed(configs, tmp_path / "expected")
    runs, chance = tmp_path / "runs", random.Random()
    killed: list[int] = []
    moment, seen_at = [0.0], [0.0]

    def kill(board: Board) -> None:
        """Kill what trains a random time after it was first seen, twice in all."""
        alive = [pid for pid in holders(runs) if pid not in killed]
        if not alive or len(killed) == 2:
            return
        if not moment[0] and trained_since(seen_at[-1], runs):
            moment[0] = time.monotonic() + chance.uniform(0, 1)
        elif moment[0] and time.monotonic() > moment[0]:
            os.kill(alive[0], signal.SIGKILL)
            killed.append(alive[0])
            moment[0] = 0.0
            seen_at.append(time.time())

    seen = Recorder(kill)
    done = run_grid(configs, runs, workers=1, observer=seen)
    assert (len(done.finished), done.failed) == (2, ()), (seen.seen, seen.texts)
    assert killed
    # Killed just after the end of a run, a worker takes nothing with it.
    assert len(seen.names("died")) in (len(killed), len(killed) - 1)
    require_same(configs, runs, tmp_path / "expected")


def test_two_commands_share_the_runs(tmp_path: Path) -> None:
    assert program("share", tmp_path) == "shared\n"


def test_everything_is_killed_and_started_again(tmp_path: Path) -> None:
    assert program("kills", tmp_path) == "the same\n"


def test_ctrl_c_and_a_parent_that_is_killed(tmp_path: Path) -> None:
    assert program("stops", tmp_path) == "stopped\n"
