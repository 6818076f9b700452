"""`spem stats` on CSV files of others and on that of this repository."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from spem import cli

REPOSITORY = Path(__file__).resolve().parents[1]
RECORDED = REPOSITORY / "results" / "cifar10-depth11" / "runs.csv"
CLOSE = 1e-9

ACCURACIES = {
    "none": [58.0, 58.7, 56.8, 57.9],
    "se": [57.0, 57.7, 57.3, 57.4],
    "spem": [59.1, 59.6, 58.1, 59.2],
}


def call(args: Sequence[str]) -> int:
    """The exit code of a command run in this process."""
    try:
        return cli.main(args)
    except SystemExit as stop:  # how the parser ends
        return stop.code if isinstance(stop.code, int) else -1


def write(path: Path, lines: Sequence[str]) -> str:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def runs(path: Path, **changes: str) -> str:
    """Three modules by four seeds; `changes` replaces the accuracy cell of "<module><seed>"."""
    lines = ["attention,seed,accuracy,time_train_seconds"]
    for module, accuracies in ACCURACIES.items():
        for seed, accuracy in enumerate(accuracies):
            cell = changes.get(f"{module}{seed}", str(accuracy))
            lines.append(f"{module},{seed},{cell},{100 + len(lines)}")
    return write(path, lines)


def answer(capsys: pytest.CaptureFixture[str], args: Sequence[str]) -> Any:
    assert call(["stats", *args, "--json"]) == 0
    told = capsys.readouterr()
    assert told.err == ""
    return json.loads(told.out)


def refused(capsys: pytest.CaptureFixture[str], args: Sequence[str]) -> str:
    assert call(["stats", *args]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert "Traceback" not in told.err
    return " ".join(told.err.replace("│", " ").split())


# ---- what it answers


def test_the_numbers_of_scipy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = answer(capsys, [runs(tmp_path / "runs.csv"), "--equivalence", "2"])
    (table,) = document["tables"]
    assert (table["baseline"], table["within"]) == ("none", {})
    none, se, spem = table["groups"]
    assert (none["name"], none["difference"], none["equivalence"]) == ("none", None, None)
    for group in (se, spem):
        a, b = ACCURACIES[group["name"]], ACCURACIES["none"]
        test = stats.ttest_rel(a, b)
        low, high = test.confidence_interval(0.95)
        found = group["difference"]
        assert group["mean"] == pytest.approx(np.mean(a))
        assert group["sd"] == pytest.approx(np.std(a, ddof=1))
        assert found["p"] == pytest.approx(test.pvalue, abs=CLOSE)
        assert (found["low"], found["high"]) == (pytest.approx(low), pytest.approx(high))
        assert found["correlation"] == pytest.approx(np.corrcoef(a, b)[0, 1])
        assert group["correlation_interval"][0] < found["correlation"]
        assert group["shown"] == (group["adjusted_p"] < 0.05)
    p = sorted([se["difference"]["p"], spem["difference"]["p"]])
    assert spem["adjusted_p"] == pytest.approx(2 * p[0])
    assert se["adjusted_p"] == pytest.approx(max(2 * p[0], p[1]))
    assert spem["shown"]
    assert not se["shown"]
    assert (spem["equivalence"]["margin"], spem["equivalence"]["shown"]) == (2.0, True)
    assert any("spem is above none, also after correction" in text for text in table["reading"])
    assert any("se and none are " in text for text in table["reading"])


def test_what_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["stats", runs(tmp_path / "runs.csv")]) == 0
    printed = capsys.readouterr().out
    assert "attention  n   mean    sd  pairs  to none  95 % interval" in printed
    spem = next(line for line in printed.splitlines() if line.startswith("spem  "))
    assert spem.split()[:6] == ["spem", "4", "59.00", "0.64", "4", "+1.15"]
    assert "spem - none: +1.15 points over 4 paired seeds, 95 % interval [" in printed
    assert "4 pairs find a difference of about" in printed  # what they cannot show, for se
    assert "se is below none" not in printed


def test_twice_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Eight pairs are resampled: with a fixed key."""
    rows = [
        f"{m},{s},{50 + s % 3 + (m == 'b') * (0.1 + s / 9):.2f}" for m in "ab" for s in range(8)
    ]
    file = write(tmp_path / "x.csv", ["attention,seed,accuracy", *rows])
    first, second = answer(capsys, [file]), answer(capsys, [file])
    assert first == second
    found = first["tables"][0]["groups"][1]["difference"]
    assert (found["interval"], found["p_method"], found["p"]) == ("BCa", "sign-flip", 2 / 256)


def test_the_recorded_comparison_of_this_repository(capsys: pytest.CaptureFixture[str]) -> None:
    """Its summary.csv was written by another path through the code."""
    (table,) = answer(capsys, [str(RECORDED)])["tables"]
    assert table["within"] == {"dataset": "cifar10", "depth": "11"}
    summary = (RECORDED.parent / "summary.csv").read_text(encoding="utf-8").splitlines()
    heading = summary[0].split(",")
    for line in summary[1:]:
        recorded = dict(zip(heading, line.split(","), strict=True))
        group = next(g for g in table["groups"] if g["name"] == recorded["attention"])
        assert group["mean"] == pytest.approx(float(recorded["accuracy_mean"]), rel=1e-6)
        if recorded["difference_low95"]:
            low = float(recorded["difference_low95"])
            assert group["difference"]["low"] == pytest.approx(low, rel=1e-5)


def test_other_names_of_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file of somebody else's, from a spreadsheet: semicolons, a mark in front, own names."""
    file = tmp_path / "other.csv"
    lines = ["method;fold;score", "ours;a;0.91", "base;a;0.90", "ours;b;0.95", "base;b;0.93"]
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    document = answer(capsys, [str(file), "--baseline", "base"])
    assert (document["by"], document["value"], document["pair"]) == (["method"], "score", "fold")
    assert document["notes"] == [
        "--by was not given: method is taken.",
        "--value was not given: score is taken.",
        "--pair was not given: fold is taken.",
    ]
    (table,) = document["tables"]
    assert [group["name"] for group in table["groups"]] == ["base", "ours"]
    assert "over 2 paired folds" in table["reading"][0]
    assert "points" not in table["reading"][0]  # shares of 1
    first = answer(capsys, [str(file)])["tables"][0]
    assert first["baseline"] == "ours"  # the first group, where none is named none


def test_tables_within(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["dataset,depth,attention,seed,accuracy"]
    for data, shift in (("cifar10", 0), ("cifar100", -20)):
        lines += [
            f"{data},11,{m},{s},{90 + shift + s + (m == 'se')}"
            for m in ("none", "se")
            for s in (0, 1)
        ]
    lines.append("cifar100,20,se,0,71")
    file = write(tmp_path / "x.csv", lines)
    tables = answer(capsys, [file])["tables"]
    assert [list(table["within"].values()) for table in tables] == [
        ["cifar10", "11"],
        ["cifar100", "11"],
        ["cifar100", "20"],
    ]
    assert [len(table["groups"]) for table in tables] == [2, 2, 1]
    assert "Nothing is compared with" in tables[2]["reading"][0]
    assert "differ in attention" in refused(capsys, [file, "--within", "dataset", "--by", "depth"])
    by = answer(capsys, [file, "--by", "dataset", "--within", "attention", "depth"])["tables"]
    assert by[0]["within"] == {"attention": "none", "depth": "11"}
    assert [group["name"] for group in by[0]["groups"]] == ["cifar10", "cifar100"]


def test_several_columns_name_a_group(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The controls of the issue: plain, and plain with branches that start small."""
    lines = ["attention,branch_start,seed,accuracy"]
    for s in range(3):
        lines += [
            f"none,,{s},{50 + s}",
            f"none,0.032,{s},{51 + s * 1.1}",
            f"spem,,{s},{52 + s * 1.3}",
        ]
    file = write(tmp_path / "x.csv", lines)
    said = refused(capsys, [file])
    assert "none with seed 0 stands on line 2 and on line 3. They differ in branch_start:" in said
    assert "(--by attention branch_start) or split by it (--within branch_start)" in said
    both = ["--by", "attention", "branch_start"]
    (table,) = answer(capsys, [file, *both])["tables"]
    names = ["none, branch_start=-", "none, branch_start=0.032", "spem, branch_start=-"]
    assert [group["name"] for group in table["groups"]] == names
    (table,) = answer(capsys, [file, *both, "--baseline", "spem"])["tables"]
    assert table["baseline"] == names[2]
    assert "stands for several groups: none, branch_start=-; none, branch_start=0.032" in refused(
        capsys, [file, *both, "--baseline", "none"]
    )


# ---- what it leaves out, aloud


def test_empty_cells_and_missing_seeds_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = runs(tmp_path / "runs.csv", spem1="", spem3="nan", se0="inf")
    document = answer(capsys, [file])
    (note,) = document["notes"]
    assert note.startswith("3 of 12 rows are left out, no finite accuracy: se, seed 0; spem, seed ")
    (table,) = document["tables"]
    assert "se has no seed 0; it is compared without." in table["notes"]
    assert "spem has no seed 1, 3; it is compared without." in table["notes"]
    assert [group["n"] for group in table["groups"]] == [4, 3, 2]
    assert table["groups"][2]["difference"]["mean"] == pytest.approx((1.1 + 1.3) / 2)
    assert call(["stats", file]) == 0
    printed = capsys.readouterr().out
    assert note in printed
    assert "spem has no seed 1, 3" in printed


def test_rows_without_a_name_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "x.csv", ["attention,seed,accuracy", "a,0,1", ",0,1", "b,,2", "b,0,3"])
    assert answer(capsys, [file])["notes"] == [
        "2 of 4 rows are left out, no attention or no seed: line 3, 4."
    ]


def test_settings_that_differ_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["attention,seed,accuracy,epochs,precision"]
    lines += [f"{m},{s},{50 + s + e},{e},fp32" for m, e in (("none", 3), ("se", 5)) for s in (0, 1)]
    file = write(tmp_path / "x.csv", lines)
    (table,) = answer(capsys, [file])["tables"]
    assert table["notes"] == [
        "Not all runs compared here have the same epochs (3, 5): a difference can be due to it."
    ]
    (table,) = answer(capsys, [file, "--by", "epochs", "--baseline", "3"])["tables"]
    assert table["notes"] == []


def test_small_numbers_keep_their_digits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        f"{m},{s},{0.001 * s**2 + (m == 'b') * (1e-4 + 1e-5 * s)}" for m in "ab" for s in range(3)
    ]
    file = write(tmp_path / "x.csv", ["attention,seed,loss", *rows])
    assert call(["stats", file, "--value", "loss"]) == 0
    assert "b - a: +0.000110 over 3 paired seeds" in capsys.readouterr().out


def test_a_cell_cannot_steer_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [f"{m},{s},{s + len(m) ** s}" for m in ("none", "\x1b]0;title\x07[b]") for s in (0, 1)]
    file = write(tmp_path / "x.csv", ["attention,seed,accuracy", *rows])
    assert call(["stats", file]) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "\\x1b]0;title\\x07[b]" in printed


# ---- mistakes: one sentence


def test_columns_that_do_not_exist(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = runs(tmp_path / "runs.csv")
    said = refused(capsys, [file, "--value", "accurate"])
    assert "no column 'accurate'. Nearest: accuracy. Columns: attention, seed, accuracy" in said
    assert "no column 'x'" in refused(capsys, [file, "--within", "x"])
    assert "no column 'y'" in refused(capsys, [file, "--by", "attention", "y"])
    assert "'seed' is named by --by and by --pair" in refused(capsys, [file, "--by", "seed"])
    assert "no group 'non' for --baseline. Nearest: none. Groups: none, se, spem" in refused(
        capsys, [file, "--baseline", "non"]
    )


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([], "is empty"),
        (["attention,seed,accuracy"], "has a heading and no rows"),
        (["a,b,c", "1,2,3"], "has no column 'attention'. Name one with --by: a, b, c."),
        (["attention,seed,c", "x,2,3"], "has no column 'accuracy'. Name one with --value"),
        (["attention,c,accuracy", "x,2,3"], "has no column 'seed'. Name one with --pair"),
        (["attention,seed,accuracy", "x,0,good"], "line 2: 'good' in column 'accuracy' is not a"),
        (["attention,seed,accuracy", "x,0"], "line 2: 2 cells under 3 columns"),
        (["attention,seed,accuracy", "x,0,1,2"], "line 2: 4 cells under 3 columns"),
        (["attention,seed,seed,accuracy", "x,0,1,2"], "two columns named 'seed'"),
        (["attention,seed,accuracy", "x,0,", "x,1,nan"], "no row holds a number in 'accuracy'"),
        (["attention,seed,accuracy", "x,0,1", "x,0,1"], "x with seed 0 stands on line 2 and on"),
        (["attention,seed,accuracy", 'x,0,"1'], "is no CSV file that can be read"),
    ],
)
def test_files_that_are_no_results(
    lines: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.csv"
    path.write_text("\n".join(lines), encoding="utf-8")
    said = refused(capsys, [str(path)])
    assert says in said
    assert "bad.csv" in said


def test_no_text_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.csv").write_bytes(b"\xff\xfe\x00\x01")
    assert "is no UTF-8 text" in refused(capsys, [str(tmp_path / "x.csv")])
    assert "No such file" in refused(capsys, [str(tmp_path / "gone.csv")])
    assert "Is a directory" in refused(capsys, [str(tmp_path)])


@pytest.mark.parametrize(
    ("option", "says"),
    [
        (["--equivalence", "0"], "margin=0.0 is no margin"),
        (["--level", "95"], "level=95.0 is no level"),
        (["--level", "high"], "--level"),
    ],
)
def test_options_out_of_range(
    option: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in refused(capsys, [runs(tmp_path / "runs.csv"), *option])
