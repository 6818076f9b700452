"""Runs as rows, and the files of a results folder: nothing that lies there is lost."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from reproduce.made_up import compared, reproduced, steady

from spem.reproduce import load_runs
from spem.reproduce.experiments import comparison, experiment, run_configs
from spem.reproduce.report import build_report
from spem.reproduce.tables import COMPARE, FILES, build_tables, record
from spem.training import RunConfig, Silent, smoke, train


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[RunConfig], Path]:
    """Two runs of a second."""
    base = smoke(epochs=2)
    base = replace(base, data=replace(base.data, limit=64, test_limit=50))
    configs, _ = comparison(base, ["none", "spem"], [0])
    runs = tmp_path_factory.mktemp("runs")
    for config in configs:
        train(config, config.folder(runs), progress=Silent())
    return configs, runs


def record_all(configs: list[RunConfig], runs: Path, out: Path, **options: object) -> list[str]:
    return record({config: [COMPARE] for config in configs}, runs, out, **options)


def test_a_run_is_a_row(trained: tuple[list[RunConfig], Path]):
    configs, runs = trained
    rows = load_runs(runs).set_index("module")
    assert set(rows.index) == {"none", "spem"}
    spem = rows.loc["spem"]
    wanted = ["finished", 11, "digits", 10]
    assert spem[["status", "depth", "dataset", "classes"]].tolist() == wanted
    assert spem["config"] == configs[1].id
    assert spem["parameters"] == 127_642 + 1_798
    assert 0 <= spem["accuracy"] <= spem["best_accuracy"] <= 100
    named = {"impl", "step", "hardware", "seed", "experiment", "error", "torch", "time_step_ms"}
    assert named | {"time_train_seconds", "time_date"} <= set(rows.columns)


def test_unfinished_diverged_and_damaged_runs_are_rows(
    trained: tuple[list[RunConfig], Path], tmp_path: Path
):
    configs, runs = trained
    shutil.copytree(runs, tmp_path / "runs")
    none, spem = (config.folder(tmp_path / "runs") for config in configs)
    (none / "result.json").unlink()
    (spem / "result.json").write_text("{")
    rows = load_runs(tmp_path / "runs")
    assert sorted(rows["status"]) == ["unfinished", "unreadable"]
    assert "result.json" in rows[rows["status"] == "unreadable"]["error"].iloc[0]
    problems = record_all(configs, tmp_path / "runs", tmp_path)
    assert len(problems) == 1
    assert "result.json" in problems[0]
    assert list(load_runs(tmp_path)["status"]).count("failed") == 1


def test_rows_are_added_and_replaced_and_others_kept(
    trained: tuple[list[RunConfig], Path], tmp_path: Path
):
    """A fresh clone has rows and no run folders: a command there must lose none of them."""
    configs, runs = trained
    out = reproduced(tmp_path / "results", "table1", "controls", seeds=2)
    before = {name: (out / name).read_text().splitlines() for name in FILES}
    other = {"note.txt": "mine", "figures/mine.svg": "<svg/>", "tables/mine.csv": "a\n1\n"}
    for name, text in other.items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text(text)
    for _ in range(2):  # the second time they are replaced
        record_all(configs, runs, out, baseline="none")
        rows = pd.read_csv(out / "runs.csv", dtype=str, keep_default_na=False)
        assert len(rows) == len(before["runs.csv"]) - 1 + 2
        assert (rows["experiment"] == COMPARE).sum() == 2
    for name, lines in before.items():
        now = (out / name).read_text()
        for line in lines[1:]:
            assert line.rstrip(",") in now
    assert {name: (out / name).read_text() for name in other} == other
    # a run that two experiments share has both names
    record({configs[0]: ["table1"]}, runs, out)
    assert f"{COMPARE} table1" in set(load_runs(str(out))["experiment"])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name,value\na,1\n", "is not a table that spem wrote"),
        ('config,seed,module\n"a,1,none\n', "cannot be read"),
        ("config,seed,module\na,x,none\n", "a seed is not a number"),
        ("config,seed,module,accuracy\na,1,none,7", "its last line is cut off"),
        ("", "cannot be read"),
    ],
)
def test_a_foreign_or_damaged_table_is_named_and_kept(
    text: str, says: str, trained: tuple[list[RunConfig], Path], tmp_path: Path
):
    configs, runs = trained
    (tmp_path / "runs.csv").write_text(text)
    with pytest.raises(ValueError, match=says) as caught:
        record_all(configs, runs, tmp_path)
    assert "runs.csv" in str(caught.value)
    assert (tmp_path / "runs.csv").read_text() == text


def test_tables_of_experiments(tmp_path: Path):
    out = reproduced(tmp_path, "table1", "table2", seeds=3, accuracy=steady(spem=2.0))
    first, second = build_tables(load_runs(out))
    assert (first.name, second.name) == ("table1-digits", "table2-digits")
    assert first.reference == "plain"
    assert list(first.frame["row"]) == ["plain", "SE", "CBAM", "ECA", "SRM", "SGE", "SPEM"]
    assert "paper" not in first.frame  # digits are not put beside CIFAR's numbers
    spem = first.frame.set_index("row").loc["SPEM"]
    assert spem["difference"] == pytest.approx(2.0, abs=0.5)
    # each depth is compared with its own plain network, and corrected over the whole table
    assert second.reference == ""
    rows = second.frame.set_index("row")
    assert rows.loc["ResNet245, SPEM", "baseline"] == "ResNet245, plain"
    assert rows["pairs"].count() == 4
    assert rows["p_holm"].min() == pytest.approx(4 * rows["p"].min())


def test_the_papers_numbers_and_their_verdict(tmp_path: Path):
    of_paper = reproduced(tmp_path, "table1", scale="paper", accuracy=steady(93.3, cbam=-9.0))
    table = build_tables(load_runs(of_paper))[0]
    assert table.name == "table1-cifar10"
    rows = table.frame.set_index("row")
    assert rows.loc["plain", ["paper", "paper_parameters"]].tolist() == [93.39, 1.70]
    assert rows.loc[["plain", "CBAM"], "against_paper"].tolist() == ["inside", "outside"]


@pytest.mark.parametrize(("seeds", "verdict"), [(2, "n too small to say"), (3, "all runs equal")])
def test_equal_best_epochs_are_not_called_too_few(tmp_path: Path, seeds: int, verdict: str):
    out = reproduced(tmp_path, "table1", scale="paper", seeds=seeds)
    rows = pd.read_csv(out / "runs.csv")
    rows.assign(best_accuracy=93.0).to_csv(out / "runs.csv", index=False)
    table = build_tables(load_runs(out))[0]
    assert table.frame.set_index("row").loc["plain", "against_paper"] == verdict


def test_commands_that_write_into_one_folder_at_once_keep_all_rows(tmp_path: Path):
    configs = list(run_configs([experiment("table1", "smoke", seeds=range(2))]))[:8]

    def write_one(config: RunConfig) -> None:
        record({config: ["table1"]}, tmp_path / "runs", tmp_path / "out", failed={config: "why"})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write_one, configs))
    assert len(pd.read_csv(tmp_path / "out" / "runs.csv")) == 8


def test_rows_that_were_not_run_and_a_reference_that_was_not(tmp_path: Path):
    out = reproduced(tmp_path, "table1", seeds=3)
    rows = pd.read_csv(out / "runs.csv")
    rows[~rows["module"].isin(["none", "cbam"])].to_csv(out / "runs.csv", index=False)
    (table,) = build_tables(load_runs(out))
    assert table.not_run == ["plain", "CBAM"]
    assert table.frame["difference"].isna().all()
    assert set(table.frame["verdict"]) == {"too few seeds"}


def test_a_comparison_keeps_its_arms_and_reference(tmp_path: Path):
    out = compared(tmp_path, "se", "none", "control", seeds=3)
    (table,) = build_tables(load_runs(out))
    assert (table.name, table.reference) == ("compare-digits", "se")
    assert list(table.frame["row"]) == ["se", "none", "control"]


def test_arms_of_an_earlier_comparison_are_compared_with_the_reference_asked_last(tmp_path: Path):
    out = compared(tmp_path, "none", "spem", seeds=3)

    def others() -> pd.DataFrame:
        rows = load_runs(out).query("module != 'se'").drop(columns="baseline")
        return rows.sort_values(["module", "seed"], ignore_index=True)

    before = others()
    configs, baseline = comparison(smoke(), ["spem", "se"], range(3))
    failed = {config: "why" for config in configs if config.model.attention == "se"}
    record_all(configs, tmp_path / "runs", out, failed=failed, baseline=baseline)
    (table,) = build_tables(load_runs(out))
    assert table.reference == "spem"
    assert table.question == "Do se and none differ from spem?"
    pd.testing.assert_frame_equal(others()[before.columns], before, check_dtype=False)
    record({config: ["table1"] for config in failed}, tmp_path / "runs", out, failed=failed)
    assert set(load_runs(out)["baseline"]) == {"spem"}  # no other was asked for


@pytest.mark.parametrize("arm", ["none", "spem"])
def test_a_comparison_of_which_one_arm_has_run_is_a_table(arm: str, tmp_path: Path):
    """As after Ctrl-C in the second run."""
    out = compared(tmp_path, "none", "spem", seeds=1)
    rows = pd.read_csv(out / "runs.csv")
    rows[rows["module"] == arm].to_csv(out / "runs.csv", index=False)
    (table,) = build_tables(load_runs(out))
    assert table.question == f"Do the others differ from {arm}?"
    assert table.answer == "There is nothing to compare yet."
    assert build_report(out).tables[0].reference == arm


@pytest.mark.slow
def test_every_experiment_makes_its_tables(tmp_path: Path):
    from spem.reproduce.experiments import EXPERIMENTS

    out = reproduced(tmp_path, *EXPERIMENTS, seeds=3)
    tables = build_tables(load_runs(out))
    assert {table.experiment for table in tables} == set(EXPERIMENTS)
    for table in tables:
        asked = run_configs([experiment(table.experiment, "smoke", seeds=[0])])
        assert len(table.frame) == len(asked)
        assert table.answer.endswith("seeds).")
