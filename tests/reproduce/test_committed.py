"""The committed results folders: their reports follow from their tables, byte for byte."""

from __future__ import annotations

import csv
import itertools
import re
import shutil
from pathlib import Path

import pytest

from spem.reproduce.agreement import read_predictions
from spem.reproduce.experiments import experiment
from spem.reproduce.plan_file import name_of, read_plan
from spem.reproduce.report import build_report

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = sorted(path.parent for path in (ROOT / "results").glob("*/plan.csv"))


def test_there_is_one() -> None:
    assert FOLDERS


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_the_report_is_made_of_the_tables(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        if path.suffix in (".csv", ".npz"):
            shutil.copy(path, tmp_path)
    build_report(tmp_path)
    # Pictures depend on matplotlib and its fonts; words and numbers may not.
    words = [folder / "report.md", *sorted((folder / "tables").iterdir())]
    for path in words:
        assert (tmp_path / path.relative_to(folder)).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_ids_are_those_of_the_experiments(folder: Path) -> None:
    for row in read_plan(folder):
        cells = {(c.data, c.row): c for c in experiment(row.experiment, row.scale).cells}
        config = cells[row.data, row.row].config
        assert row.id == ("" if config is None else name_of(config))


def test_the_readme_quotes_the_controls() -> None:
    """Its table of differences says what the runs say."""
    with (ROOT / "results" / "short" / "runs.csv").open(newline="") as file:
        runs = list(csv.DictReader(file))
    ids = {row.row: row.id for row in read_plan(ROOT / "results" / "short") if row.id}
    readme = (ROOT / "README.md").read_text()
    quoted = re.findall(
        r"^\| (SPEM \(\w+\)) - ([^|]+) \| ([-+.\d]+) \[([-+.\d]+), ([-+.\d]+)\] \| ([.\d]+) \|",
        readme,
        re.M,
    )
    assert len(quoted) == 6
    for name, other, mean, low, high, p in quoted:
        a, b = (
            {int(r["seed"]): float(r["accuracy"]) for r in runs if r["id"] == ids[row]}
            for row in (name, other)
        )
        differences = [a[seed] - b[seed] for seed in range(8)]
        assert float(mean) == pytest.approx(sum(differences) / 8, abs=0.005)
        flipped = [
            abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
            for signs in itertools.product((1, -1), repeat=8)
        ]
        least = abs(sum(differences)) * (1 - 1e-9)
        assert float(p) == pytest.approx(sum(v >= least for v in flipped) / 256, abs=0.0005)
        assert float(low) < float(mean) < float(high)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_accuracies_follow_from_the_answers(folder: Path) -> None:
    stored = read_predictions(folder / "predictions.npz")
    with (folder / "runs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows
    for row in rows:
        right = stored.right(row["id"], int(row["seed"]))
        assert 100 * right.mean() == pytest.approx(float(row["accuracy"]), abs=1e-4)
        assert row["host_commit"]
        assert not row["host_commit"].endswith("-dirty")
