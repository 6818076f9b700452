"""A results folder: plan, tables and predictions, from runs trained for the purpose."""

from __future__ import annotations

import csv
import shutil
from dataclasses import replace
from pathlib import Path
from threading import Thread

import numpy as np
import pytest

from spem.reproduce.agreement import read_predictions
from spem.reproduce.experiments import Cell, Experiment, experiment
from spem.reproduce.gather import gather
from spem.reproduce.plan_file import name_of, read_plan, record_plan
from spem.reproduce.scales import SCALES
from spem.training import RunConfig, Silent, recipes, train
from spem.training.checkpoint import load_answers
from spem.training.diverged import write_diverged
from spem.training.runs import save_config

TABLES = ["runs.csv", "epochs.csv", "mixes.csv", "gates.csv", "gradients.csv"]


def tiny(attention: str, seed: int = 0, arm: str = "") -> RunConfig:
    base = recipes.smoke(attention, epochs=2)
    data = replace(base.data, limit=32, test_limit=40)
    return replace(base, data=data, seed=seed, experiment="smoke" + arm)


def planned(*cells: Cell, seeds: tuple[int, ...] = (0, 1)) -> Experiment:
    return Experiment("forms", "A title", "A question?", SCALES["smoke"], cells, seeds)


CELLS = (
    Cell("plain", "cifar10", tiny("none"), "plain"),
    Cell("SPEM", "cifar10", tiny("spem")),
    Cell("SPEM, again", "cifar10", tiny("spem", arm="-again")),
    Cell("not at this scale", "cifar10", None, note="why"),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("results")
    for attention, seed, arm in (
        ("spem", 1, ""),
        ("spem", 0, ""),
        ("none", 0, ""),
        ("spem", 0, "-again"),
        ("none", 7, ""),  # not in the plan
    ):
        config = tiny(attention, seed, arm)
        train(config, config.folder(out / "runs"), progress=Silent())
    lost = tiny("none", 1)
    folder = lost.folder(out / "runs")
    folder.mkdir(parents=True)
    save_config(lost, folder)
    write_diverged(lost, folder, 1, f"train: it diverged. The last checkpoint is in {folder}.")
    one = tiny("none").folder(out / "runs") / "metrics.jsonl"
    (folder / "metrics.jsonl").write_text(one.read_text().splitlines(keepends=True)[0])
    record_plan([planned(*CELLS)], out)
    return out


@pytest.fixture
def results(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "results"))


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_tables_hold_the_planned_runs_in_order(results: Path):
    written = gather(results).files
    assert [path.name for path in written] == [*TABLES, "predictions.npz"]
    runs = rows(results / "runs.csv")
    again = f"{tiny('spem').id}-again"
    assert [(r["attention"], r["id"], r["seed"], r["status"]) for r in runs] == [
        ("none", tiny("none").id, "0", "finished"),
        ("none", tiny("none").id, "1", "diverged"),
        ("spem", tiny("spem").id, "0", "finished"),
        ("spem", tiny("spem").id, "1", "finished"),
        ("spem", again, "0", "finished"),
    ]
    assert runs[1]["accuracy"] == ""
    assert runs[1]["message"] == "the loss became infinite or NaN in epoch 1, counted from 0"
    assert len(rows(results / "epochs.csv")) == 9  # one before it diverged
    assert len(rows(results / "mixes.csv")) == 3 * 2 * 3
    assert len(rows(results / "gates.csv")) == 3 * 3
    gradients = rows(results / "gradients.csv")
    assert len(gradients) == 4 * 2 * 3 + 3
    assert [g["index"] for g in gradients[:3]] == ["0", "1", "2"]


def test_predictions_agree_with_accuracies(results: Path):
    gather(results)
    found = read_predictions(results / "predictions.npz")
    assert found.answers.keys() >= {(f"{tiny('spem').id}-again", 0)}
    for row in rows(results / "runs.csv"):
        if row["status"] == "finished":
            answers = found.answers[row["id"], int(row["seed"])]
            labels = found.labels[row["id"]]
            assert 100 * float((answers == labels).mean()) == pytest.approx(float(row["accuracy"]))


def test_two_gatherings_write_the_same_bytes(results: Path):
    first = {path.name: path.read_bytes() for path in gather(results).files}
    assert {path.name: path.read_bytes() for path in gather(results).files} == first


def test_labels_are_kept_where_the_images_are_gone(results: Path, monkeypatch: pytest.MonkeyPatch):
    gather(results)
    before = (results / "predictions.npz").read_bytes()

    def gone(*args: object) -> None:
        raise FileNotFoundError("no images here")

    monkeypatch.setattr("spem.reproduce.gather.load_test", gone)
    gather(results)
    assert (results / "predictions.npz").read_bytes() == before
    (results / "predictions.npz").unlink()
    gather(results)
    assert not read_predictions(results / "predictions.npz").labels


def test_a_plan_grows_and_keeps_its_seeds(results: Path):
    record_plan([planned(*CELLS[:1], seeds=(5,))], results)
    record_plan([experiment("table1", "smoke", seeds=[0])], results)
    plan = read_plan(results)
    assert [row.experiment for row in plan] == ["table1"] * 14 + ["forms"] * 4
    first = next(row for row in plan if row.key == ("forms", "cifar10", "plain"))
    assert first.seeds == "0 1 5"
    assert (first.id, first.reference, first.folder) == (tiny("none").id, "plain", "smoke")
    other = next(row for row in plan if row.row == "SPEM, again")
    assert (other.id, other.folder) == (f"{tiny('spem').id}-again", "smoke-again")
    assert next(row for row in plan if row.row == "not at this scale").id == ""
    assert plan[0].paper_top1 == "93.39"
    assert plan[0].paper_parameters_millions == "1.70"


def test_scales_are_not_mixed(results: Path):
    with pytest.raises(ValueError, match="another --results folder"):
        record_plan([experiment("table1", "short")], results)


def test_a_folder_without_a_plan_is_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no results folder"):
        gather(tmp_path)
    (tmp_path / "plan.csv").write_text("experiment,row\ntable1,x\n")
    with pytest.raises(ValueError, match="lacks the column data"):
        gather(tmp_path)


def test_a_damaged_run_is_left_out_and_named_and_hides_no_other(results: Path):
    gather(results)
    before = rows(results / "runs.csv")
    folder = tiny("spem").folder(results / "runs")
    (folder / "answers.npy").write_bytes(b"no array")
    (damaged,) = gather(results).damaged
    assert "answers.npy is damaged" in damaged
    left = rows(results / "runs.csv")
    assert left == [row for row in before if (row["id"], row["seed"]) != (tiny("spem").id, "0")]


def test_damaged_predictions_are_named(results: Path):
    gather(results)
    (results / "predictions.npz").write_bytes(b"PK no archive")
    with pytest.raises(ValueError, match=r"predictions\.npz is damaged"):
        gather(results)


def test_names_tell_arms_apart():
    assert name_of(tiny("spem")) == tiny("spem").id
    assert name_of(tiny("spem", arm="-bf16")) == f"{tiny('spem').id}-bf16"


def test_answers_are_small(trained: Path):
    folder = tiny("spem").folder(trained / "runs")
    assert load_answers(folder / "answers.npy").dtype == np.uint8


def test_two_commands_plan_at_once(tmp_path: Path):
    names = ("forms", "penalty", "parametrisations", "controls")
    planned = [experiment(name, "smoke", seeds=[0]) for name in names]
    threads = [Thread(target=record_plan, args=([one], tmp_path)) for one in planned]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {row.experiment for row in read_plan(tmp_path)} == set(names)
