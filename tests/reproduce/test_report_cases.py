"""Reports of small folders, each with one thing that must be told."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from reproduce.folders import PAPER, Folder, controls, table1
from reproduce.pages import Page, ids, line, rows

from spem.reproduce.report import build_report


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out what takes the time: drawing figures into files."""
    monkeypatch.setattr("spem.reproduce.report.html.svg", lambda panel: "<svg></svg>")
    monkeypatch.setattr("spem.reproduce.report.pdf", lambda panel: b"%PDF")


def test_the_paper_recipe_gets_a_bare_verdict(tmp_path: Path) -> None:
    folder = Folder("paper")
    means = (94.6, 94.8, 95.1)
    name = folder.cell("table1", "SPEM", "cifar10", "spem", depth=164, paper=(1.74, 94.80))
    for seed, mean in enumerate(means):
        facts = {"epochs": 164, "best_accuracy": mean, "parameters": 1_736_518}
        folder.run(name, "cifar10", "spem", seed, 94, depth=164, train_images=None, **facts)
    build_report(folder.write(tmp_path))
    found = line(Page((tmp_path / "report.html").read_text()), "table1-cifar10", "SPEM")
    assert re.fullmatch(r"inside \[\d\d\.\d\d, \d\d\.\d\d\]", found["verdict"])
    assert found["ours"] == "1,736,518; rounds to it"


def test_a_missing_figure_names_its_command(tmp_path: Path) -> None:
    folder = Folder("smoke")
    table1(folder, seeds=(0,))
    build_report(folder.write(tmp_path))
    text = " ".join(Page((tmp_path / "report.html").read_text()).text)
    for name in ("figure2", "table2", "controls", "gradients", "penalty"):
        assert f"spem reproduce {name} --scale smoke --results DIR" in text
    assert "the controls were not run" in text


def test_a_plan_without_runs(tmp_path: Path) -> None:
    folder = Folder()
    folder.cell("table1", "SPEM", "cifar10", "spem", paper=PAPER["spem"])
    build_report(folder.write(tmp_path))
    page = Page((tmp_path / "report.html").read_text())
    assert line(page, "table1-cifar10", "SPEM")["last epoch"] == "not run"
    assert "svg" not in page.tags
    assert list((tmp_path / "figures").glob("*")) == []


def test_only_diverged_runs(tmp_path: Path) -> None:
    """runs.csv then lacks the columns of results."""
    folder = Folder()
    name = folder.cell("table1", "SPEM", "cifar10", "spem", paper=PAPER["spem"], seeds=(0,))
    folder.run(name, "cifar10", "spem", 0, 0, message="loss is NaN")
    folder.write(tmp_path)
    path = tmp_path / "runs.csv"
    keep = path.read_text().splitlines()[0].split(",")
    keep = [c for c in keep if c not in ("accuracy", "epochs", "parameters", "test_sha256")]
    full = rows(tmp_path, "runs.csv")
    path.write_text(
        "\n".join([",".join(keep), *(",".join(r[c] for c in keep) for r in full)]) + "\n"
    )
    build_report(tmp_path)
    found = line(Page((tmp_path / "report.html").read_text()), "table1-cifar10", "SPEM")
    assert found["last epoch"] == "diverged"


@pytest.mark.parametrize(
    "change",
    [{"precision": "bf16"}, {"impl": "numba"}, {"impl": "triton"}],
    ids=lambda change: "-".join(change.values()),
)
def test_other_arithmetic_stays_out_of_paper_tables(tmp_path: Path, change: dict[str, str]) -> None:
    folder = Folder()
    for experiment in ("table1", "controls"):
        name = folder.cell(experiment, "SPEM", "cifar10", "spem", paper=PAPER["spem"])
    for seed in range(3):
        folder.run(name, "cifar10", "spem", seed, 37, **change)
    build_report(folder.write(tmp_path))
    page = Page((tmp_path / "report.html").read_text())
    assert line(page, "table1-cifar10", "SPEM")["last epoch"].startswith("left out")
    assert line(page, "controls-cifar10", "SPEM")["last epoch"].endswith("(3)")
    assert "3 finished runs in bfloat16 or with fused kernels are left out" in " ".join(page.text)


def test_runs_of_another_recipe_are_not_compared(tmp_path: Path) -> None:
    folder = Folder()
    for label, attention, images in (("plain", "none", 5000), ("SPEM", "spem", 10000)):
        mark = "plain" if attention == "none" else ""
        name = folder.cell("table1", label, "cifar10", attention, reference=mark)
        for seed in range(3):
            folder.run(name, "cifar10", attention, seed, 37, train_images=images)
    build_report(folder.write(tmp_path))
    page = Page((tmp_path / "report.html").read_text())
    assert line(page, "table1-cifar10", "SPEM")["\N{MINUS SIGN} plain"] == "\N{EN DASH}"


def test_images_are_compared_seed_by_seed(tmp_path: Path) -> None:
    """Counted by hand on six images."""
    folder = Folder()
    controls(folder, seeds=1)
    out = folder.write(tmp_path)
    names = ids(out, "controls")
    for name in names.values():
        folder.answers[f"labels-{name}"] = np.array([1, 2, 3, 4, 5, 6], dtype=np.uint8)
        folder.answers[f"{name}-0"] = np.array([1, 2, 3, 0, 0, 0], dtype=np.uint8)
    folder.answers[f"{names['SPEM (text)']}-0"] = np.array([0, 2, 3, 4, 5, 0], dtype=np.uint8)
    build_report(folder.write(tmp_path))
    page = Page((tmp_path / "report.html").read_text())
    found = line(page, "images", "SPEM (text) \N{MINUS SIGN} scale")
    assert found["seed 0"] == "2 : 1; p 1.000"
