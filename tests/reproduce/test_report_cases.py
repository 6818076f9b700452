"""Reports of small folders, each with one thing that must be told."""

from __future__ import annotations

import re
import statistics
from pathlib import Path

import numpy as np
import pytest
from reproduce.folders import EPOCHS, PAPER, Folder, controls, table1
from reproduce.pages import Page, ids, line, plain, rows

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
    assert line(page, "controls-cifar10", "SPEM")["last epoch"].startswith("37.01 ± 0.59 (3); [")
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


@pytest.mark.parametrize("experiment", ["controls", "forms", "mixes", "penalty", "family"])
def test_another_recipe_is_told_without_numbers_of_the_paper(
    tmp_path: Path, experiment: str
) -> None:
    folder = Folder()
    name = folder.cell(experiment, "SPEM", "cifar10", "spem")
    folder.run(name, "cifar10", "spem", 0, 37)
    build_report(folder.write(tmp_path))
    text = " ".join(Page((tmp_path / "report.html").read_text()).text)
    wanted = "(depth 11 instead of 164, 5,000 training images instead of 50,000, 5 epochs instead "
    assert f"another recipe than the paper's {wanted}of 164): no number here can be" in text
    assert "the verdicts follow the rule" not in text


def test_depths_stand_for_those_of_their_labels(tmp_path: Path) -> None:
    folder = Folder()
    for depth, paper in ((11, 83), (20, 164)):
        row = f"ResNet{paper}, SPEM"
        name = folder.cell("gradients", row, "cifar10", "spem", depth=depth)
        folder.run(name, "cifar10", "spem", 0, 37, depth=depth)
    build_report(folder.write(tmp_path))
    text = " ".join(Page((tmp_path / "report.html").read_text()).text)
    assert "(depth 11 instead of 83, " in text
    assert "depth 20 instead of 164" in text


def test_the_official_test_images_say_nothing_of_the_training_images(tmp_path: Path) -> None:
    folder = Folder()
    name = folder.cell("table1", "SPEM", "cifar100", "spem")
    official = "7a49b15a2d025a396f6109d0703885ec10f65383c3003b58884d847adf3abb69"
    folder.run(name, "cifar100", "spem", 0, 17, test_sha256=official)
    build_report(folder.write(tmp_path))
    text = " ".join(Page((tmp_path / "report.html").read_text()).text)
    wanted = "CIFAR-100: by their checksum the test images are the official ones, bit for bit. "
    assert f"{wanted}The training images were not compared." in text


def test_power_is_that_of_the_line_with_the_fewest_pairs(tmp_path: Path) -> None:
    folder = Folder()
    for row, attention, seeds in (("plain", "none", 5), ("SE", "se", 5), ("SPEM", "spem", 3)):
        mark = "plain" if attention == "none" else ""
        name = folder.cell("table1", row, "cifar10", attention, reference=mark, seeds=range(5))
        for seed in range(seeds):
            folder.run(name, "cifar10", attention, seed, 37)
    build_report(folder.write(tmp_path))
    found = line(Page((tmp_path / "report.html").read_text()), "power", "table1, CIFAR-10")
    assert found["n"] == "3; up to 5"
    assert found["least sign-flip p"] == "0.25"  # 2 / 2**3


def test_a_difference_leads_to_both_sides_of_its_pairs(tmp_path: Path) -> None:
    folder = Folder()
    names = {}
    for row, attention, seeds in (("plain", "none", (1, 2, 3)), ("SPEM", "spem", (0, 1, 2))):
        mark = "plain" if attention == "none" else ""
        names[row] = folder.cell(
            "table1", row, "cifar10", attention, reference=mark, seeds=range(4)
        )
        for seed in seeds:
            folder.run(names[row], "cifar10", attention, seed, 37)
    build_report(folder.write(tmp_path))
    html = (tmp_path / "report.html").read_text()
    pairs = f'title="runs: {names["SPEM"]}, seed 1 2; {names["plain"]}, seed 1 2"'
    assert html.count(pairs) == 1
    assert f'title="runs: {names["SPEM"]}, seed 0 1 2"' in html  # its accuracy has all


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


@pytest.mark.parametrize(
    ("kept", "says"),
    [
        ((), "holds no answers of these runs, because"),
        (("answers",), "holds answers but not the labels of the test images, because"),
        (("answers", "labels"), ""),
    ],
)
def test_why_the_images_are_not_compared_is_said(
    tmp_path: Path, kept: tuple[str, ...], says: str
) -> None:
    folder = Folder()
    controls(folder, seeds=1)
    folder.answers = {
        key: array
        for key, array in folder.answers.items()
        if ("labels" if key.startswith("labels") else "answers") in kept
    }
    build_report(folder.write(tmp_path))
    page = Page((tmp_path / "report.html").read_text())
    markdown = (tmp_path / "report.md").read_text()
    for text in (" ".join(page.text), markdown):
        assert ("image by image, are missing: " in text) == bool(says)
        assert says in text
    assert ("table-images" in page.tables) == (not says)


def test_answers_of_other_seeds_are_no_pairs(tmp_path: Path) -> None:
    folder = Folder()
    controls(folder, seeds=1)
    names = ids(folder.write(tmp_path), "controls")
    for row in ("SPEM (text)", "SPEM (code)"):
        folder.answers[f"{names[row]}-7"] = folder.answers.pop(f"{names[row]}-0")
    build_report(folder.write(tmp_path))
    text = " ".join(Page((tmp_path / "report.html").read_text()).text)
    assert "missing: no two of the networks have stored answers of one seed, and labels." in text


def test_without_spem_no_images_are_compared(tmp_path: Path) -> None:
    folder = Folder()
    folder.run(folder.cell("table1", "SE", "cifar10", "se"), "cifar10", "se", 0, 37)
    build_report(folder.write(tmp_path))
    text = " ".join(Page((tmp_path / "report.html").read_text()).text)
    assert "missing: neither the controls nor Table 1 have SPEM and a network" in text


def test_faster_arithmetic_is_tested_for_equivalence(tmp_path: Path) -> None:
    """Each network against its own base; the interval by its definition, within 0.5 points."""
    folder = Folder()
    accuracies = {
        "plain, float32, composed": (36.0, 36.5, 36.2, 36.3),
        "plain, float32, fused": (36.1, 36.4, 36.3, 36.3),
        "SPEM, float32, composed": (38.0, 38.5, 38.2, 38.3),
        "SPEM, bfloat16, composed": (38.1, 38.4, 39.6, 38.3),
        "SPEM, float32, fused": (),
    }
    for i, (row, values) in enumerate(accuracies.items()):
        attention = "none" if row.startswith("plain") else "spem"
        mark = "base" if row.endswith("float32, composed") else ""
        more = {"id": f"{i:010x}", "reference": mark, "seeds": range(4)}
        name = folder.cell("equivalence", row, "cifar10", attention, **more)
        for seed, value in enumerate(values):
            folder.run(name, "cifar10", attention, seed, 0, accuracy=value)
    build_report(folder.write(tmp_path))
    page = Page((tmp_path / "report.html").read_text())
    minus = " \N{MINUS SIGN} "
    t95 = 2.353363  # Student's t, three degrees, 95 % one-sided
    for row, base, finding in (
        ("plain, float32, fused", "plain, float32, composed", "shown"),
        ("SPEM, bfloat16, composed", "SPEM, float32, composed", "not shown"),
    ):
        pairs = [a - b for a, b in zip(accuracies[row], accuracies[base], strict=True)]
        mean, half = statistics.mean(pairs), t95 * statistics.stdev(pairs) / 2
        found = line(page, "equivalence-cifar10-within", f"{row}{minus}{base}")
        assert found["equal within 0.5"] == finding
        assert found["n"] == "4"
        wanted = f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"
        assert plain(found["points, 90 % interval"]) == wanted
    lacking = f"SPEM, float32, fused{minus}SPEM, float32, composed"
    found = line(page, "equivalence-cifar10-within", lacking)
    assert found["points, 90 % interval"] == "not run"
    assert len(page.tables["table-equivalence-cifar10-within"]) == 4  # no base against another
    text = " ".join(page.text)
    assert "plain, float32, fused and plain, float32, composed are equal within 0.5 points" in text
    assert "are not shown to be equal within 0.5 points: 90 % interval" in text
    assert "kept out of the paper's tables until such a study has shown them equivalent" in text
    assert "Equal within 0.5 points?" in (tmp_path / "tables" / "equivalence.tex").read_text()


def test_the_penalty_is_seen_in_lambda_too(tmp_path: Path) -> None:
    """Medians and extremes of the last epoch, counted by hand from three blocks of one seed."""
    folder = Folder()
    for penalty in (0.1, 0.0):
        row, mark = f"penalty {penalty:g}", "base" if penalty else ""
        name = folder.cell("penalty", row, "cifar10", "spem", penalty=penalty, reference=mark)
        folder.run(name, "cifar10", "spem", 0, 37, penalty=penalty)
    ends = iter((0.2, 0.3, 0.9, 0.0, 0.6, 1.0))
    for mix in folder.tables["mixes"]:
        if mix["epoch"] == EPOCHS - 1:
            mix["lambda"] = next(ends)
    build_report(folder.write(tmp_path))
    assert (tmp_path / "figures" / "penalty-lambda.pdf").exists()
    text = (tmp_path / "report.md").read_text()
    wanted = "penalty 0.1 ends at 0.3 (0.2 to 0.9); penalty 0 ends at 0.6 (0 to 1)."
    assert f"lambda, median of blocks and seeds: {wanted}" in text
