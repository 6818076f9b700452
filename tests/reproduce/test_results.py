"""Run folders -> runs, table and CSV."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from reproduce.runs import config, run, write

from spem.reproduce import collect, table, write_csv

RUNS = [
    run("spem", 0, 92.0, step_seconds=0.03, parameters=129440, attention_parameters=1798),
    run("none", 0, 90.0, step_seconds=0.01),
    run("spem", 1, 95.0, step_seconds=0.05, parameters=129440, attention_parameters=1798),
    run("none", 1, 92.0, step_seconds=0.03),
    run("none", 2, 97.0, step_seconds=0.02),
]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_collect_reads_what_has_finished(tmp_path: Path) -> None:
    for one in RUNS:
        write(one, tmp_path)
    plan = [config(name, seed) for seed in range(3) for name in ("none", "spem")]
    found = collect(plan, tmp_path)
    # the plan's order; spem with seed 2 has no result
    assert [(r.attention, r.seed) for r in found] == [
        ("none", 0),
        ("spem", 0),
        ("none", 1),
        ("spem", 1),
        ("none", 2),
    ]
    assert found[0] == RUNS[1]
    assert found[0].curve == (91.0, 90.0)


def test_a_damaged_result_is_named(tmp_path: Path) -> None:
    folder = write(RUNS[0], tmp_path)
    text = (folder / "result.json").read_text()
    (folder / "result.json").write_text(text.replace("92.0", "99.0", 1))
    with pytest.raises(ValueError, match=r"result\.json is damaged"):
        collect([RUNS[0].config], tmp_path)


def test_table() -> None:
    first, second = table(RUNS, "none")
    assert (first.attention, second.attention) == ("spem", "none")
    assert (first.last.n, first.last.mean) == (2, 93.5)
    assert (first.best.mean, first.best_selected_on) == (94.5, "test")
    assert first.difference is not None
    # seeds 0 and 1: +2 and +3
    assert (first.difference.n, first.difference.mean) == (2, 2.5)
    assert second.difference is None
    assert (second.last.n, second.last.mean) == (3, 93.0)
    assert (first.step_ms, second.step_ms) == (40.0, 20.0)
    assert (first.step_ratio, second.step_ratio) == (2.0, 1.0)


def test_table_without_the_reference() -> None:
    (line,) = table(RUNS[:1], "none")
    assert (line.difference, line.step_ratio) == (None, None)


def test_csv(tmp_path: Path) -> None:
    written = write_csv(RUNS, table(RUNS, "none"), tmp_path / "out", reference="none")
    assert [path.name for path in written] == ["runs.csv", "epochs.csv", "mixes.csv", "summary.csv"]
    runs = rows(written[0])
    assert [(r["attention"], r["seed"]) for r in runs] == [
        ("none", "0"),
        ("none", "1"),
        ("none", "2"),
        ("spem", "0"),
        ("spem", "1"),
    ]
    assert [float(r["accuracy"]) for r in runs] == [90, 92, 97, 92, 95]
    assert runs[0]["validation_accuracy"] == ""
    assert runs[3]["id"] == RUNS[0].config.id
    assert float(runs[3]["time_step_ms"]) == 30
    assert runs[3]["host_torch"] == "2.15.0"
    epochs = rows(written[1])
    assert len(epochs) == 10
    assert [float(r["test_accuracy"]) for r in epochs[:2]] == [91, 90]
    mixes = rows(written[2])
    assert len(mixes) == 4
    assert (mixes[0]["mix"], mixes[0]["lambda"]) == ("layer1.0.attention.pool", "0.25")
    summary = rows(written[3])
    assert [r["attention"] for r in summary] == ["spem", "none"]
    assert (summary[0]["difference_to"], summary[0]["difference_mean"]) == ("none", "2.5")
    assert summary[1]["difference_to"] == ""
    # two values of 2 and 3: deviation sqrt(1/2), t(1, 0.975) = 12.7062
    assert float(summary[0]["difference_low95"]) == pytest.approx(2.5 - 12.7062 * 0.5, abs=1e-4)


def test_what_depends_on_clock_or_machine_says_so(tmp_path: Path) -> None:
    """Runs that differ in nothing else give the same bytes in all other columns."""
    elsewhere = [
        run(
            one.attention,
            one.seed,
            one.accuracy,
            parameters=one.result.parameters,
            attention_parameters=one.result.attention_parameters,
            train_seconds=99.0,
            evaluation_seconds=98.0,
            step_seconds=97.0,
            images_per_second=96.0,
            hardware="another machine",
            versions={"python": "3.12.0", "torch": "2.6.0"},
        )
        for one in reversed(RUNS)
    ]
    tables = []
    for name, runs in (("a", RUNS), ("b", elsewhere)):
        lines = sorted(table(runs, "none"), key=lambda line: line.attention)
        files = write_csv(runs, lines, tmp_path / name, reference="none")
        stripped = [
            [
                {k: v for k, v in row.items() if not k.startswith(("time_", "host_"))}
                for row in rows(path)
            ]
            for path in files
        ]
        tables.append(stripped)
    assert tables[0] == tables[1]


def test_an_older_file_without_a_successor_goes(tmp_path: Path) -> None:
    write_csv(RUNS, table(RUNS, "none"), tmp_path, reference="none")
    plain = [one for one in RUNS if one.attention == "none"]
    write_csv(plain, table(plain, "none"), tmp_path, reference="none")
    assert not (tmp_path / "mixes.csv").exists()
