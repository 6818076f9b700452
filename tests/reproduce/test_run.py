"""The engine: what is missing is run, what fails does not stop the others, nothing is lost."""

from __future__ import annotations

import importlib.util
import os
import signal
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from spem.reproduce import load_runs, run
from spem.reproduce.experiments import comparison
from spem.reproduce.run import estimate_seconds, forget_diverged, missing, run_missing
from spem.training import HeldError, Interrupted, RunConfig, Silent, smoke
from spem.training.folder import build_network, held


class Told(Silent):
    """What an observer was told."""

    def __init__(self) -> None:
        self.shares: list[dict[RunConfig, float]] = []

    def start(self, config: RunConfig) -> None: ...

    def running(self, done: dict[RunConfig, float]) -> None:
        self.shares.append(done)

    def finish(self, ended: run.Ended) -> None: ...


def tiny(*arms: str, seeds: int = 1, **optim: Any) -> list[RunConfig]:
    base = smoke(epochs=2)
    base = replace(base, data=replace(base.data, limit=64, test_limit=50))
    base = replace(base, optim=replace(base.optim, **optim))
    return comparison(base, arms, range(seeds))[0]


def test_a_run_that_diverged_is_not_trained_again_unless_asked(tmp_path: Path):
    configs = tiny("none", "se", lr=1e30)
    ended = run_missing(configs, tmp_path, Told())
    assert {one.status for one in ended} == {"diverged"}
    assert missing(configs, tmp_path) == []
    rows = load_runs(tmp_path)
    assert set(rows["status"]) == {"diverged"}
    assert rows["error"].str.contains("infinite|NaN|nan|inf").all()
    with held(configs[0].folder(tmp_path)):  # by a process that trains it again already
        forget_diverged(configs, tmp_path)
        assert missing(configs, tmp_path) == configs[1:]
    forget_diverged(configs, tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    forget_diverged(configs[:1], tmp_path)
    assert missing(configs, tmp_path) == configs


def test_a_run_that_another_process_has_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The others come first, and it is looked at again until it can be had."""
    configs, train, refused = tiny("none", "se"), run.train, [0]

    def held_twice(config: RunConfig, *args: Any, **options: Any) -> Any:
        if config.model.attention == "none" and refused[0] < 2:
            refused[0] += 1
            raise HeldError("in use by process 1 on there.")
        return train(config, *args, **options)

    monkeypatch.setattr(run, "train", held_twice)
    monkeypatch.setattr(run, "HELD_SECONDS", 0.01)
    ended = run_missing(configs, tmp_path, Told())
    assert [one.config.model.attention for one in ended] == ["se", "none"]
    assert refused == [2]


@pytest.mark.slow
def test_a_budget_stops_with_a_checkpoint_and_the_next_call_goes_on(tmp_path: Path):
    configs = [replace(c, optim=replace(c.optim, epochs=400)) for c in tiny("none", "se")]
    ended = run_missing(configs, tmp_path, Told(), budget=4)
    assert [one.status for one in ended] == ["stopped"] * 2
    assert (configs[0].folder(tmp_path) / "checkpoint.pt").exists()
    short = tiny("none", "se")
    assert [one.status for one in run_missing(short, tmp_path / "b", Told(), budget=600)] == [
        "finished"
    ] * 2


def test_a_signal_stops_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def between(*_: Any, **__: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        return run.Ended(configs[0], "finished")

    configs = tiny("none", "se", "spem")
    monkeypatch.setattr(run, "attempt", between)
    with pytest.raises(Interrupted, match="SIGTERM with 2 runs left") as caught:
        run_missing(configs, tmp_path, Told())
    assert caught.value.code == 143


def test_an_estimate_grows_with_what_there_is_to_do():
    one, two = tiny("none", "se")
    deep = replace(one, model=replace(one.model, depth=164))
    small, larger = estimate_seconds([one]), estimate_seconds([one, two, deep])
    assert small is not None
    assert larger is not None
    assert larger > small * 5 > 0
    assert estimate_seconds([replace(one, data=replace(one.data, name="some/folder"))]) is None


def test_an_estimate_measures_blocks_of_the_kind_that_is_trained(monkeypatch: pytest.MonkeyPatch):
    built: list[str] = []

    def build(config: RunConfig, classes: int) -> Any:
        built.append(config.model.block)
        return build_network(config, classes)

    monkeypatch.setattr("spem.training.folder.build_network", build)
    run._seconds_an_image.cache_clear()
    one = tiny("none")[0]
    basic = replace(one, model=replace(one.model, depth=20, block="basic"))
    estimate_seconds([one, basic])
    assert built == ["bottleneck", "basic"]


def test_a_task_that_does_not_see_the_folder_says_so(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="every machine of the cluster"):
        run._task(tiny("none", "se")[0], str(tmp_path), str(tmp_path / "gone"), ".", bool)


def same(folder: Path) -> pd.DataFrame:
    """The rows without clock, machine and order."""
    rows = load_runs(folder)
    rows = rows[[name for name in rows if not name.startswith("time_") and name != "commit"]]
    return rows.sort_values(["config", "seed"], ignore_index=True)


@pytest.mark.slow
@pytest.mark.parametrize("kill", [False, True])
def test_on_ray_the_rows_are_the_same(tmp_path: Path, kill: bool):
    """Two tasks at a time; with `kill` one worker process is killed while it trains."""
    if importlib.util.find_spec("ray") is None:  # imported too early it leaves this machine
        pytest.skip("Ray is not installed")
    configs = [
        replace(c, optim=replace(c.optim, epochs=30 if kill else 2)) for c in tiny("none", "spem")
    ]
    run_missing(configs, tmp_path / "a", Told())
    killed, over = list[int](), threading.Event()
    if kill:
        args = (tmp_path / "b", killed, over)
        threading.Thread(target=_kill_one, args=args, daemon=True).start()
    told = Told()
    ended = run_missing(configs, tmp_path / "b", told, workers=2)
    over.set()
    assert [one.status for one in ended] == ["finished"] * 2, ended
    assert {one.config for one in ended} == set(configs)  # a failure is looked up by its config
    assert bool(killed) == kill
    assert any(len(shares) == 2 for shares in told.shares)
    pd.testing.assert_frame_equal(same(tmp_path / "a"), same(tmp_path / "b"))


@pytest.mark.slow
def test_a_budget_that_ends_while_workers_start_fails_no_run(tmp_path: Path):
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed")
    waiting = partial(exec, "import time\nwhile True: time.sleep(0.1)")
    how: dict[str, Any] = {"workers": 2, "budget": 20, "prepare": waiting}
    ended = run_missing(tiny("none", "se", "eca"), tmp_path, Told(), **how)
    assert [one.status for one in ended] == ["stopped"] * 3, ended


def _kill_one(runs: Path, killed: list[int], over: threading.Event) -> None:
    """End the process that holds the first run that has an epoch behind it."""
    while not over.wait(0.05):
        for path in runs.rglob("metrics.jsonl"):
            held = (path.parent / ".lock").read_text().split()  # "process 123 on ..."
            if held:
                os.kill(int(held[1]), signal.SIGKILL)
                killed.append(int(held[1]))
                return
