"""`spem report`: damaged files are named with line and remedy; nothing but a report is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from reproduce.folders import Folder, table1

from spem.cli import main


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("spem.reproduce.report.html.svg", lambda panel: "<svg></svg>")
    monkeypatch.setattr("spem.reproduce.report.pdf", lambda panel: b"%PDF")
    made = Folder()
    table1(made, seeds=(0, 1, 2))
    return made.write(tmp_path / "results")


def refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence that `spem report` says; no report is written."""
    assert main(["report", str(folder)]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("spem: ")
    assert told.err.count("\n") == 1
    assert not (folder / "report.html").exists()
    return told.err


def change(path: Path, line: int, column: str, cell: str) -> None:
    """Another value in one cell of a file without quotation marks."""
    lines = path.read_text().split("\n")
    cells = lines[line - 1].split(",")
    cells[lines[0].split(",").index(column)] = cell
    lines[line - 1] = ",".join(cells)
    path.write_text("\n".join(lines))


def drop(path: Path, column: str) -> None:
    lines = [line.split(",") for line in path.read_text().strip().split("\n")]
    where = lines[0].index(column)
    path.write_text("\n".join(",".join(c[:where] + c[where + 1 :]) for c in lines) + "\n")


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert main(["report", str(folder), "--json"]) == 0
    files = [Path(name) for name in json.loads(capsys.readouterr().out)["files"]]
    assert files[:2] == [folder / "report.html", folder / "report.md"]
    assert {p for p in folder.rglob("*") if p.is_file()} == {*files, *before}
    assert {path: path.read_bytes() for path in before} == before
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out.startswith(f"wrote {folder / 'report.html'} and ")


def test_no_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = refused(tmp_path, capsys)
    assert f"{tmp_path / 'plan.csv'} does not exist" in told
    assert "--results" in told


def test_an_empty_plan(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "plan.csv"
    path.write_text(path.read_text().split("\n")[0] + "\n")
    assert "plan.csv holds no rows. Run `spem reproduce`" in refused(folder, capsys)


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("plan.csv", "paper_top1"),
        ("runs.csv", "seed"),
        ("runs.csv", "accuracy"),
        ("epochs.csv", "test_accuracy"),
        ("mixes.csv", "lambda"),
        ("gates.csv", "q50"),
        ("gradients.csv", "norm"),
    ],
)
def test_a_missing_column(
    folder: Path, capsys: pytest.CaptureFixture[str], name: str, column: str
) -> None:
    drop(folder / name, column)
    told = refused(folder, capsys)
    assert f"{folder / name}, line 1: the column {column} is missing." in told
    assert "Run `spem reproduce` on this folder again" in told


@pytest.mark.parametrize(
    ("name", "column", "cell", "finding"),
    [
        ("plan.csv", "paper_top1", "94,8", None),
        ("plan.csv", "paper_top1", "high", "holds 'high', which is no number"),
        ("plan.csv", "seeds", "0;1", "holds '0;1', which is no list of seeds"),
        ("runs.csv", "seed", "one", "holds 'one', which is no whole number"),
        ("runs.csv", "seed", "0.5", "holds '0.5', which is no whole number"),
        ("runs.csv", "seed", "nan", "holds 'nan', which is no whole number"),
        ("runs.csv", "accuracy", "", "column accuracy is empty for a finished run"),
        ("runs.csv", "accuracy", "37.5 %", "holds '37.5 %', which is no number"),
        ("runs.csv", "accuracy", "nan", "column accuracy is no finite number"),
        ("runs.csv", "status", "done", "status 'done' is neither finished nor diverged"),
        ("epochs.csv", "epoch", "", "holds '', which is no whole number"),
        ("gates.csv", "q05", "inf", "holds 'inf', which is no number"),
    ],
)
def test_a_damaged_cell(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    column: str,
    cell: str,
    finding: str | None,
) -> None:
    change(folder / name, 4, column, cell)
    told = refused(folder, capsys)
    assert f"{folder / name}, line 4: " in told
    assert (finding or "cells stand under") in told
    assert "Run `spem reproduce`" in told


def test_a_cut_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "runs.csv"
    path.write_text(path.read_text()[:-40])
    last = path.read_text().count("\n") + 1
    assert f"runs.csv, line {last}: " in refused(folder, capsys)


def test_no_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "epochs.csv").write_bytes(b"\xff\xfe\x00")
    assert "epochs.csv is no UTF-8 text" in refused(folder, capsys)


def test_damaged_answers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "predictions.npz").write_bytes(b"PK not an archive")
    assert "predictions.npz" in refused(folder, capsys)


def test_an_infinite_loss_is_only_missing(folder: Path) -> None:
    change(folder / "epochs.csv", 4, "loss", "inf")
    change(folder / "epochs.csv", 5, "test_accuracy", "nan")
    assert main(["report", str(folder)]) == 0
