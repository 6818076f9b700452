"""`spem reproduce`: what it refuses, plans, shows and says, with the grid itself replaced."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from reproduce.grids import plan

from spem import cli
from spem.cli.grid_table import GridTable, run_name, totals
from spem.cli.reproduce import parse_duration
from spem.reproduce import grid
from spem.reproduce.board import GridOutcome, Tally
from spem.reproduce.worker import Outcome, Told
from spem.training import RunConfig
from spem.training.checkpoint import save_json
from spem.training.log import Status


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "no experiment given. Name some of: all, table1"),
        (["tabel1"], "unknown experiment 'tabel1'. Did you mean table1"),
        (["table1", "--scale", "smok"], "unknown scale 'smok'. Did you mean smoke?"),
        (["table1", "--seeds", "x"], "--seeds 'x'"),
        (["table1", "--budget", "soon"], "--budget 'soon' is no time. Write 90s, 30m or 8h."),
        (["table1", "--address", "here:1"], "Add --engine ray"),
        (["penalty", "--scale", "smoke", "--workers", "0"], "workers=0 must be larger than 0"),
    ],
)
def test_a_mistake_is_one_sentence(
    args: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["reproduce", *args, "--results", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30m", 1800), ("1.5h", 5400), ("45", 45), (" 2 m ", 120)]
)
def test_times(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "-3m", "0", "1d", "1e3"])
def test_no_times(text: str) -> None:
    with pytest.raises(ValueError, match="is no time"):
        parse_duration(text)


def test_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every cell with its seeds and cost; nothing is written."""
    out = tmp_path / "out"
    args = ["penalty", "forms", "--scale", "smoke", "--seeds", "0,4", "--dry-run"]
    assert cli.main(["reproduce", *args, "--results", str(out)]) == 0
    text = capsys.readouterr().out
    lines = {line.split("  ")[0]: line for line in text.splitlines()}
    assert {"penalty", "forms"} <= set(lines)
    assert "spem(form=code)" in text
    assert text.count("0 4") == 6
    # penalty 0.1 and the form of the text are one run: 5 configs x 2 seeds
    assert "10 runs, each once even where tables share it; 10 are to be trained." in text
    assert "Estimate for this machine" in text
    assert not out.exists()


def ended(configs: list[RunConfig], **changes: Any) -> GridOutcome:
    return replace(GridOutcome(tuple(configs), (), (), (), ()), **changes)


@pytest.fixture
def outcome(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the grid, which is not run, is made to end in; and what it was asked for."""
    given: dict[str, Any] = {}

    def run_grid(configs: list[RunConfig], runs: Path, **options: Any) -> GridOutcome:
        given["asked"] = configs, runs, options
        return given["end"](configs)

    monkeypatch.setattr(grid, "run_grid", run_grid)
    return given


def call(out: Path, *more: str) -> int:
    args = ["penalty", "--scale", "smoke", "--seeds", "1", "--results", str(out), *more]
    return cli.main(["reproduce", *args])


def test_what_the_grid_is_asked_for(
    tmp_path: Path, outcome: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    outcome["end"] = lambda configs: ended(configs[:1], left=tuple(configs[1:]))
    more = ["--budget", "2m", "--workers", "3", "--retry-diverged", "--root", "images"]
    assert call(tmp_path, *more) == 0
    configs, runs, options = outcome["asked"]
    assert runs == tmp_path / "runs"
    assert {config.data.root for config in configs} == {"images"}
    assert {config.runtime.threads for config in configs} == {1}
    del options["observer"]
    asked = {"workers": 3, "per_gpu": 1, "budget": 120.0, "retry_diverged": True}
    assert options == asked
    out = capsys.readouterr().out
    assert "1 run left. Checkpoints are written;" in out
    assert "`spem reproduce penalty --scale smoke" in out
    assert (tmp_path / "plan.csv").exists()


def test_ctrl_c_says_how_to_go_on(
    tmp_path: Path, outcome: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    outcome["end"] = lambda configs: ended([], left=tuple(configs), stopped_by=signal.SIGINT)
    assert call(tmp_path) == 130
    err = capsys.readouterr().err
    assert "stopped by Ctrl-C with 2 runs left" in err
    assert "`spem reproduce penalty --scale smoke" in err


def test_each_reason_is_said_once(
    tmp_path: Path, outcome: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    outcome["end"] = lambda configs: ended(
        [], failed=tuple((config, "no disk") for config in configs)
    )
    assert call(tmp_path) == 1
    err = capsys.readouterr().err
    assert err.count("no disk") == 1
    assert "2 runs (digits 11 spem, seed 0 and others)" in err


def test_the_table_elsewhere_than_on_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    one, two = plan(2)
    table = GridTable()
    table.event("start", one, "")
    table.event("failed", one, "no such images")
    table.event("failed", two, "no such images")
    table.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "start    digits 11 none, seed 0",
        "failed   digits 11 none, seed 0: no such images",
        "failed   digits 11 se, seed 0: for the same reason",
    ]


def test_runs_that_differ_have_different_names() -> None:
    one = plan(1)[0]
    small = replace(one, model=replace(one.model, branch_start=0.03))
    free = replace(one, optim=replace(one.optim, penalty=0.0))
    half = replace(one, runtime=replace(one.runtime, precision="bf16"))
    assert len({run_name(config) for config in (one, small, free, half)}) == 4


def test_totals_and_the_time_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two equal runs of 4 epochs, one half done after 10 s, one to come: 10 + 20 s."""
    now = [100.0]
    monkeypatch.setattr("spem.reproduce.board.time.monotonic", lambda: now[0])
    one, two = plan(1)[0], replace(plan(1)[0], seed=1)
    tally = Tally([one, two], tmp_path, retry_diverged=False)
    assert totals(tally.board()) == "0 of 2 runs done, 0 running, 2 to come"
    run = tally.next(1.0)
    assert run is not None
    assert tally.begin(run) == "start"
    tally.note(run, Told(Status(0, 4, 0, 7, 100.0, 0.0, None)))
    now[0] = 110.0
    tally.note(run, Told(Status(2, 4, 0, 7, 100.0, 0.0, None)))
    assert tally.board().seconds_left == pytest.approx(30.0)
    text = "0 of 2 runs done, 1 running, 1 to come, about 30 s left in all"
    assert totals(tally.board()) == text
    now[0] = 120.0
    assert tally.end(run, Outcome("finished", "90 %")) == "finished"
    assert tally.board().seconds_left == pytest.approx(20.0)


def test_a_diverged_run_is_left_alone(tmp_path: Path) -> None:
    config = plan(1)[0]
    folder = config.folder(tmp_path)
    folder.mkdir(parents=True)
    save_json({"id": config.id, "seed": 0, "message": "nan", "epoch": 1}, folder / "diverged.json")
    assert Tally([config], tmp_path, retry_diverged=False).diverged == [(config, "nan")]
    asked = Tally([config], tmp_path, retry_diverged=True)
    assert [run.retry for run in asked.waiting] == [True]
