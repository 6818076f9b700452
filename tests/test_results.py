"""What is committed under results/ holds together: weights, tables, and what the README says."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

from spem.data import load_images
from spem.ops import use_impl
from spem.reproduce import paired_test, summarise
from spem.training import evaluate, load_weights

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "results"
COMPARISONS = sorted(path.with_name("runs.csv") for path in RESULTS.glob("*/summary.csv"))
WEIGHTS = sorted(RESULTS.glob("*/weights/*.safetensors"))


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_there_are_results():
    assert COMPARISONS
    assert WEIGHTS


@pytest.mark.parametrize("path", WEIGHTS, ids=lambda p: p.stem)
def test_committed_weights_give_their_row_to_the_image(path: Path, data_root: Path):
    assert path.stat().st_size < 1_000_000
    model, config = load_weights(path)
    (row,) = [
        row
        for row in rows(path.parents[1] / "runs.csv")
        if row["attention"] == config.model.attention and int(row["seed"]) == config.seed
    ]
    assert (row["id"], int(row["depth"])) == (config.id, config.model.depth)
    images = load_images(config.data.name, "test", root=data_root)
    assert images.sha256 == row["test_sha256"]
    with use_impl(config.runtime.impl):
        accuracy = evaluate(model, images, normalisation=config.data.normalisation)
    assert accuracy.count == len(images) == 10_000
    assert accuracy.correct == round(float(row["accuracy"]) * len(images) / 100)


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda p: p.parent.name)
def test_the_summary_follows_from_the_runs(path: Path):
    runs = rows(path)
    accuracy = {
        attention: {
            int(r["seed"]): float(r["accuracy"]) for r in runs if r["attention"] == attention
        }
        for attention in {r["attention"] for r in runs}
    }
    assert len({tuple(sorted(seeds)) for seeds in accuracy.values()}) == 1, "seeds are not paired"
    assert len({r["train_sha256"] for r in runs}) == 1
    for summary in path.parent.glob("**/summary.csv"):
        for row in rows(summary):
            mine = accuracy[row["attention"]]
            assert float(row["accuracy_mean"]) == pytest.approx(summarise(list(mine.values())).mean)
            if row["difference_to"]:
                d = paired_test(mine, accuracy[row["difference_to"]])
                assert float(row["difference_mean"]) == pytest.approx(d.mean)
                assert float(row["difference_low95"]) == pytest.approx(d.t_low)
                assert float(row["difference_high95"]) == pytest.approx(d.t_high)


def test_the_readme_shows_the_committed_numbers():
    text = (REPOSITORY / "README.md").read_text()
    folder = RESULTS / "cifar10-depth11"
    to_plain = {row["attention"]: row for row in rows(folder / "summary.csv")}
    for name, row in to_plain.items():
        line = next(line for line in text.splitlines() if re.match(rf"\| `{name}`.*±", line))
        cells = [f"{float(row['accuracy_mean']):.2f} ± {float(row['accuracy_sd']):.2f}"]
        if row["difference_to"]:
            low, high = float(row["difference_low95"]), float(row["difference_high95"])
            cells += [f"{float(row['difference_mean']):+.2f}", f"[{low:+.2f}, {high:+.2f}]"]
        for cell in cells:
            assert cell in line, f"README says of {name}: {line}; the table says {cell}"


def test_the_readme_shows_the_measured_step_times():
    text = (REPOSITORY / "README.md").read_text()
    table = rows(REPOSITORY / "benchmarks" / "results" / "step_cpu.csv")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    for row in table:
        name, ratio = f"`{row['attention']}`", f"{float(row['to_plain']):.2f}"
        assert any(name in line and ratio in line for line in lines), (name, row["way"], ratio)
