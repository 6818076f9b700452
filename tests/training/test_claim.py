"""One process at a time trains in a folder; the claims of dead ones are taken over."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from training.processes import start
from training.tiny import tiny

from spem.training import Silent, train
from spem.training.claim import Claim, claimed, process_start


def write_claim(folder: Path, *, age: float = 0.0, **changes: Any) -> None:
    """A claim as another process would have left it, with a heartbeat so many seconds old."""
    record = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": process_start(os.getpid()),
        "token": "somebody else's",
        **changes,
    }
    path = folder / ".claim"
    path.write_text(json.dumps(record))
    then = time.time() - age
    os.utime(path, (then, then))


def test_second_process_is_refused_and_the_killed_ones_claim_taken_over(tmp_path: Path):
    holder = start("hold", str(tmp_path))
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    try:
        with pytest.raises(RuntimeError, match=rf"in use by process {holder.pid} on .*Wait for it"):
            train(tiny(epochs=1), tmp_path, progress=Silent())
    finally:
        holder.kill()
        holder.communicate()
    with claimed(tmp_path) as claim:
        assert claim.taken_over is not None
        assert f"process {holder.pid}" in claim.taken_over


def test_of_many_takers_of_a_dead_claim_one_wins(tmp_path: Path):
    write_claim(tmp_path, started="before the last boot")
    racers = start("race", str(tmp_path), "12")
    said, _ = racers.communicate(timeout=120)
    assert racers.returncode == 0
    assert said == "1\n"


def test_claim_is_given_back(tmp_path: Path):
    with claimed(tmp_path):
        assert (tmp_path / ".claim").exists()
    assert not list(tmp_path.iterdir())
    with claimed(tmp_path) as claim:
        assert claim.taken_over is None


def test_same_process_cannot_claim_twice(tmp_path: Path):
    with claimed(tmp_path), pytest.raises(RuntimeError, match="in use"), claimed(tmp_path):
        pass


def test_process_id_given_to_another_process_is_no_holder(tmp_path: Path):
    write_claim(tmp_path, started="an earlier process of this id")
    with claimed(tmp_path) as claim:
        assert claim.taken_over is not None


def test_living_process_on_this_host_keeps_its_claim_however_silent(tmp_path: Path):
    write_claim(tmp_path, age=9999)
    with pytest.raises(RuntimeError, match="in use"):
        Claim(tmp_path).acquire()


def test_other_host_holds_while_its_heart_beats(tmp_path: Path):
    write_claim(tmp_path, age=100, host="elsewhere")
    with pytest.raises(RuntimeError, match=r"on elsewhere \(heartbeat 100 s ago\)"):
        Claim(tmp_path).acquire()


def test_silent_host_loses_its_claim(tmp_path: Path):
    write_claim(tmp_path, age=130, host="elsewhere")
    with claimed(tmp_path) as claim:
        assert claim.taken_over is not None
        assert "on elsewhere, which has been silent for 130 s" in claim.taken_over


@pytest.mark.parametrize("content", ["", "[1]", "{", "{}"])
def test_unreadable_claim_is_respected_until_it_is_silent(content: str, tmp_path: Path):
    path = tmp_path / ".claim"
    path.write_text(content)
    with pytest.raises(RuntimeError, match="unknown host"):
        Claim(tmp_path).acquire()
    os.utime(path, (1, 1))
    with claimed(tmp_path) as claim:
        assert claim.taken_over is not None


def test_heartbeat_keeps_the_claim_fresh(tmp_path: Path):
    with claimed(tmp_path, silence_seconds=0.4):
        path = tmp_path / ".claim"
        os.utime(path, (1, 1))
        deadline = time.monotonic() + 10
        while path.stat().st_mtime == 1 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert time.time() - path.stat().st_mtime < 10


def test_process_that_lost_its_claim_stops_writing_and_leaves_it(tmp_path: Path):
    with claimed(tmp_path, silence_seconds=0.4) as claim:
        claim.check()
        write_claim(tmp_path)
        with pytest.raises(RuntimeError, match="taken over by another process"):
            claim.check()
    assert (tmp_path / ".claim").exists()


def test_zombies_and_missing_processes_have_no_start():
    child = os.posix_spawn("/bin/true", ["true"], {})
    deadline = time.monotonic() + 10
    while process_start(child) is not None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process_start(child) is None
    os.waitpid(child, 0)
    assert process_start(child) is None
