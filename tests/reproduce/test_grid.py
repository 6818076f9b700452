"""The local executor: what it runs, what it leaves, and what becomes of runs that go wrong."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from reproduce.grids import LONG, Recorder, holders, plan, require_same, undisturbed

from spem.reproduce.board import Board, Tally
from spem.reproduce.grid import run_grid, stopped_by
from spem.reproduce.worker import attempt
from spem.training import RunConfig, Silent, read_config, read_result
from spem.training.checkpoint import load_json
from spem.training.claim import claimed
from spem.training.diverged import DIVERGED, read_diverged
from spem.training.signals import StopSignals

ROOM = 1_400_000
"""Bytes a file may have: more than a checkpoint at depth 11, less than at depth 20."""


@contextmanager
def file_size(limit: int) -> Generator[None]:
    """No larger file can be written, by this process and those that it starts."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def diverging(config: RunConfig) -> RunConfig:
    return replace(config, optim=replace(config.optim, lr=1e20))


def test_what_goes_wrong_stays_with_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Divergence, missing data, a disk without room, damage, death: the rest is trained."""
    monkeypatch.setattr("spem.reproduce.grid.DEATHS", 1)
    good = plan(2)
    huge = diverging(good[0])
    lost = [
        replace(good[0], seed=seed, data=replace(good[0].data, name="/no/such/images"))
        for seed in (0, 1)
    ]
    large = replace(good[0], model=replace(good[0].model, depth=20))
    damaged = replace(good[0], seed=7)
    damaged.folder(tmp_path).mkdir(parents=True)
    (damaged.folder(tmp_path) / "result.json").write_text("{}")
    deadly = replace(good[0], optim=replace(good[0].optim, epochs=LONG))
    undisturbed(good, tmp_path / "expected")
    undisturbed(good[:1], tmp_path)
    before = (good[0].folder(tmp_path) / "result.json").read_bytes()

    def kill(board: Board) -> None:
        for pid in holders(deadly.folder(tmp_path)):
            os.kill(pid, signal.SIGKILL)

    seen = Recorder(kill)
    with file_size(ROOM):
        done = run_grid(
            [huge, *lost, large, damaged, *good, deadly], tmp_path, workers=1, observer=seen
        )

    assert done.finished == (good[0], good[1])
    assert [config for config, _ in done.diverged] == [huge]
    reasons = dict(done.failed)
    assert set(reasons) == {*lost, large, damaged, deadly}
    assert reasons[lost[0]] == reasons[lost[1]]
    assert "/no/such/images" in reasons[lost[0]]
    assert "File too large. Make room and run the same command again" in reasons[large]
    assert "result.json is damaged" in reasons[damaged]
    assert "its process was ended by SIGKILL" in reasons[deadly]
    assert all("\n" not in text for text in reasons.values())
    assert (done.held, done.left, done.stopped_by) == ((), (), None)
    assert seen.closed
    assert (good[0].folder(tmp_path) / "result.json").read_bytes() == before
    require_same(good, tmp_path, tmp_path / "expected")
    assert not list(large.folder(tmp_path).glob(".*tmp"))

    values = load_json(huge.folder(tmp_path) / DIVERGED, remedy="")
    assert values == {
        "id": huge.id,
        "seed": 0,
        "message": done.diverged[0][1],
        "epoch": 0,
    }
    planned = read_config(large.folder(tmp_path))
    assert planned is not None
    assert planned.runtime == read_config(good[0].folder(tmp_path / "expected")).runtime
    assert (planned.runtime.threads, planned.runtime.step) == (1, "eager")

    again = Recorder()
    run_grid([huge, *good], tmp_path, observer=again)
    assert again.seen == []  # nothing is left to train, and no process was started


def test_a_diverged_run_is_tried_again_only_when_asked(tmp_path: Path) -> None:
    config = diverging(plan(1)[0])
    folder = config.folder(tmp_path)
    first = attempt(config, folder, Silent())
    assert first.kind == "diverged"
    assert "became" in first.text
    log = (folder / "log.txt").read_text()
    assert attempt(config, folder, Silent()) == first
    assert (folder / "log.txt").read_text() == log
    assert attempt(config, folder, Silent(), retry_diverged=True) == first
    assert (folder / "log.txt").read_text() != log

    sane = plan(1)[0]
    (folder / DIVERGED).rename(tmp_path / "kept")
    assert read_diverged(config, folder) is None
    other = sane.folder(tmp_path)
    other.mkdir(parents=True)
    (tmp_path / "kept").rename(other / DIVERGED)
    assert read_diverged(sane, other) is None  # it tells of another run


def test_a_run_that_somebody_holds(tmp_path: Path) -> None:
    config = plan(1)[0]
    folder = config.folder(tmp_path)
    with claimed(folder):
        assert attempt(config, folder, Silent()).kind == "held"
    assert attempt(config, folder, Silent()).kind == "finished"


def test_a_budget_ends_in_time(tmp_path: Path) -> None:
    config = plan(1, epochs=LONG)[0]
    started = time.monotonic()
    done = run_grid(
        [config, replace(config, seed=1)],
        tmp_path,
        workers=1,
        budget=10,
        observer=(seen := Recorder()),
    )
    assert time.monotonic() - started < 15
    assert set(done.left) == {config, replace(config, seed=1)}
    assert done.stopped_by is None
    assert seen.names("start") == ["11 none 0"]
    assert holders(tmp_path) == []
    assert read_result(config.folder(tmp_path)) is None
    if (config.folder(tmp_path) / "metrics.jsonl").exists():
        assert (config.folder(tmp_path) / "checkpoint.pt").exists()


def test_when_a_grid_is_stopped() -> None:
    stop = StopSignals()
    assert stopped_by(stop, None) == ""
    assert stopped_by(stop, time.monotonic() + 60) == ""
    assert stopped_by(stop, time.monotonic() - 1) == "the end of the budget"
    stop.receive(signal.SIGINT, None)
    assert stopped_by(stop, None) == "Ctrl-C"


@pytest.mark.parametrize("wrong", [{"workers": 0}, {"per_gpu": 0}, {"budget": -1.0}])
def test_numbers_that_make_no_sense(tmp_path: Path, wrong: dict[str, float]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name}=.* must be larger than 0"):
        run_grid([], tmp_path, observer=Recorder(), **wrong)


def test_a_run_named_twice_counts_once(tmp_path: Path) -> None:
    config = plan(1)[0]
    tally = Tally([config, config], tmp_path, retry_diverged=False)
    assert (tally.total, len(tally.waiting)) == (1, 1)
