"""Run folders -> runs, table and CSV."""

from __future__ import annotations

import csv
import math
from itertools import product
from pathlib import Path
from statistics import fmean

import pytest
from reproduce.runs import config, run, write
from scipy import stats

from spem.reproduce import Run, collect, table, write_csv

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
    assert (line.difference, line.adjusted_p, line.step_ratio) == (None, None, None)


NONE = (90.0, 91.5, 89.0, 92.0, 90.5, 91.0, 88.5)
ABOVE = (0.5, 1.25, 2.0, 0.25, 3.0, 1.5, 9.0)
AROUND = (0.5, -1.25, 0.75, -0.25, 1.0, -1.5, 2.0)


def many(count: int) -> list[Run]:
    """So many seeds of a reference, of something above it for every seed, and of something not."""
    return [
        run(name, seed, NONE[seed] + difference[seed])
        for name, difference in (("none", (0.0,) * 7), ("se", ABOVE), ("spem", AROUND))
        for seed in range(count)
    ]


def flipped(differences: tuple[float, ...]) -> float:
    """Share of sign patterns whose sum is as far from 0, counted one by one."""
    sums = [
        sum(sign * d for sign, d in zip(signs, differences, strict=True))
        for signs in product((1, -1), repeat=len(differences))
    ]
    return sum(abs(s) >= abs(sum(differences)) - 1e-9 for s in sums) / len(sums)


def test_few_seeds_are_compared_by_t() -> None:
    plain, se, spem = table(many(5), "none")
    assert (plain.difference, plain.adjusted_p) == (None, None)
    for line, differences in ((se, ABOVE[:5]), (spem, AROUND[:5])):
        expected = stats.ttest_1samp(differences, 0)
        ends = expected.confidence_interval(0.95)
        assert line.difference is not None
        assert (line.difference.interval, line.difference.p_method) == ("t", "t")
        assert line.difference.p == pytest.approx(expected.pvalue)
        assert (line.difference.low, line.difference.high) == pytest.approx((ends.low, ends.high))


def test_from_six_seeds_on_by_resampling_and_after_holm() -> None:
    _, se, spem = table(many(7), "none")
    for line, differences in ((se, ABOVE), (spem, AROUND)):
        assert line.difference is not None
        assert (line.difference.interval, line.difference.p_method) == ("BCa", "sign-flip")
        assert line.difference.p == pytest.approx(flipped(differences))
    # 2 of 128 patterns; the one comparison that has the smaller p is corrected for both
    assert se.adjusted_p == pytest.approx(2 * 2 / 128)
    assert spem.adjusted_p == pytest.approx(flipped(AROUND))
    # one seed far above the others: the interval is not symmetric, as that of t is
    d = se.difference
    assert d is not None
    assert d.mean is not None
    assert d.low is not None
    assert d.high is not None
    assert d.high - d.mean > 1.5 * (d.mean - d.low)


def test_what_is_compared_is_what_the_table_holds(tmp_path: Path) -> None:
    """Thirds of a percent have no end; the file ends after seven digits."""
    runs = [
        run(name, seed, 100 * right / 360)
        for name, counts in (("none", (331, 325, 329)), ("se", (335, 326, 331)))
        for seed, right in enumerate(counts)
    ]
    _, line = table(runs, "none")
    written = rows(write_csv(runs, table(runs, "none"), tmp_path, reference="none")[0])
    a, b = ([float(r["accuracy"]) for r in written if r["attention"] == n] for n in ("none", "se"))
    assert line.difference is not None
    assert line.difference.mean == pytest.approx(fmean(b) - fmean(a), abs=1e-12)
    assert line.last.mean == pytest.approx(fmean(b), abs=1e-12)
    assert line.last.mean != pytest.approx(100 * (335 + 326 + 331) / 3 / 360, abs=1e-12)


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
    # t = 2.5 / 0.5 = 5 with one degree of freedom, where Student's t is Cauchy's distribution
    p = 1 - 2 * math.atan(5) / math.pi
    assert float(summary[0]["difference_p"]) == pytest.approx(p, abs=1e-6)
    assert float(summary[0]["difference_holm_p"]) == pytest.approx(p, abs=1e-6)  # the only one
    assert summary[0]["difference_interval"] == "t"
    added = ("difference_p", "difference_holm_p", "difference_interval")
    assert [summary[1][column] for column in added] == [""] * 3


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
