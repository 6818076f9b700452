"""The command line, called in this process; test_cli_processes.py starts real ones."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from reproduce import runs

from spem import cli
from spem.reproduce import Run

# digits at their own size, few of them: a run takes about a second
TINY = ["--data", "digits", "--data.size", "8", "--data.pad", "1", "--limit", "96"]


def call(args: Sequence[str]) -> int:
    """The exit code of a command run in this process."""
    try:
        return cli.main(args)
    except SystemExit as stop:  # how the parser ends
        return stop.code if isinstance(stop.code, int) else -1


def answer(capsys: pytest.CaptureFixture[str], args: Sequence[str]) -> Any:
    """The JSON a command prints."""
    assert call([*args, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# ---- compare, demo


@pytest.mark.parametrize(
    ("text", "seeds"), [("3", [0, 1, 2]), ("1", [0]), ("5,", [5]), ("4,0,9", [4, 0, 9])]
)
def test_seeds(text: str, seeds: list[int]) -> None:
    from spem.cli.compare import parse_seeds

    assert parse_seeds(text) == seeds


def test_seeds_that_are_none_are_refused_whoever_asks() -> None:
    from spem.cli.compare import parse_seeds

    with pytest.raises(ValueError, match=r"^--seeds 'x' is no number of seeds \(3\)"):
        parse_seeds("x")


@pytest.mark.parametrize("seeds", [3, 6])
def test_compare_and_stats_say_the_same(
    seeds: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of six seeds a difference that is shown, one that is not, and Holm's correction of both."""
    right = {
        "none": (331, 325, 329, 320, 327, 330),
        "se": (335, 334, 331, 329, 330, 342),
        "spem": (330, 327, 329, 321, 325, 333),
    }

    def made_up(config: Any, *_: Any, **__: Any) -> Any:
        accuracy = 100 * right[config.model.attention][config.seed] / 360
        made = Run(config, runs.result(config, accuracy), tuple(runs.epochs(accuracy)))
        runs.write(made, Path("runs"))
        return made.result

    monkeypatch.setattr("spem.reproduce.compare.train", made_up)
    args = ["compare", "none", "se", "spem", "--data", "digits", "--seeds", str(seeds)]
    told = answer(capsys, args)
    (table,) = answer(capsys, ["stats", "comparison/runs.csv"])["tables"]
    assert told["reading"] == table["reading"]
    for line, group in zip(told["lines"], table["groups"], strict=True):
        assert line["attention"] == group["name"]
        assert line["difference"] == group["difference"]
        assert line["adjusted_p"] == group["adjusted_p"]
        assert line["last"] == {key: group[key] for key in ("n", "mean", "sd")}
    with Path("comparison/summary.csv").open(newline="") as file:
        summary = list(csv.DictReader(file))
    for row, group in zip(summary[1:], table["groups"][1:], strict=True):
        d = group["difference"]
        assert row["difference_interval"] == d["interval"] == ("t" if seeds < 6 else "BCa")
        expected = [d["low"], d["high"], d["p"], group["adjusted_p"]]
        cells = ("difference_low95", "difference_high95", "difference_p", "difference_holm_p")
        assert [float(row[cell]) for cell in cells] == pytest.approx(expected, rel=1e-6)
    assert call(args) == 0
    printed = capsys.readouterr().out
    assert all(sentence in printed for sentence in table["reading"])
    assert ("Holm" in table["reading"][0]) == (seeds == 6)


def test_compare_one_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = answer(capsys, ["compare", "none", "se", *TINY, "--seeds", "7,", "--epochs", "1"])
    assert [line["attention"] for line in told["lines"]] == ["none", "se"]
    assert told["reference"] == "none"
    assert told["lines"][1]["difference"]["low"] is None
    assert "n too small" in told["reading"][0]
    assert all(Path(path).exists() for path in told["files"])


def test_compare_shows_what_is_left_when_a_run_diverges(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from spem.reproduce import compare

    train = compare.train

    def sometimes(config: Any, *args: Any, **options: Any) -> Any:
        if config.model.attention == "se":
            raise FloatingPointError("train: the training loss became nan")
        return train(config, *args, **options)

    monkeypatch.setattr(compare, "train", sometimes)
    assert call(["compare", "none", "se", *TINY, "--seeds", "1", "--epochs", "1"]) == 1
    told = capsys.readouterr()
    assert "\nnone " in told.out
    assert "1 of 2 runs diverged" in told.err
    assert "se, seed 0: train: the training loss became nan" in told.err


def test_demo(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The demo's own path, with a shorter run."""
    from dataclasses import replace

    from spem.cli import demo

    config = demo.demo_config()
    short = replace(
        config,
        data=replace(config.data, limit=64),
        optim=replace(config.optim, epochs=1, milestones=()),
    )
    monkeypatch.setattr(demo, "demo_config", lambda: short)
    threads = torch.get_num_threads()
    assert call(["demo", "--out", "shown"]) == 0
    assert torch.get_num_threads() == threads
    told = capsys.readouterr().out
    for name in ("none", "se", "spem"):
        assert f"\n{name} " in told
    assert "What to try next" in told
    for file in ("comparison.png", "summary.csv", "runs.csv"):
        assert f"shown/{file}" in told
        assert (tmp_path / "shown" / file).exists()
