"""`spem compare`, `reproduce`, `report`, `stats` and `demo`, called in this process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from reproduce.made_up import compared, reproduced, steady

from spem import cli
from spem.cli.progress import parse_duration, parse_seeds, roughly
from spem.reproduce import load_runs, run
from spem.training import Interrupted

# digits at their own size, few of them: a run takes about a second
TINY = ["--data", "digits", "--size", "8", "--data.pad", "1", "--limit", "96", "--epochs", "1"]


def call(args: list[str]) -> int:
    return cli.main([str(arg) for arg in args])


def answer(capsys: pytest.CaptureFixture[str], args: list[str]) -> Any:
    """The JSON a command prints."""
    assert call([*args, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


pytestmark = pytest.mark.usefixtures("own_folder")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["compare", "se"], "only se is named, so there is nothing to compare."),
        (["compare"], "nothing is named, so there is nothing to compare."),
        (["compare", "none", "spme", *TINY], "Did you mean spem"),
        (["compare", "none", "se", "se", *TINY], "arm se is named twice"),
        (
            ["compare", "none", "se", "--seeds", "x"],
            "--seeds: 'x' is neither a number of seeds (3)",
        ),
        (["compare", "none", "se", "--seeds", "0"], "'0' is neither a number of seeds"),
        (["compare", "none", "se", "--seeds", "1,0,1"], "'1,0,1' names a seed twice"),
        (["compare", "none", "se", "--recipe", "shrot"], "Did you mean short"),
        (
            ["compare", "none", "se", "--workers", "0"],
            "--workers: '0' is not a whole number from 1",
        ),
        (["reproduce"], "no experiment given. Name some of: all, table1"),
        (["reproduce", "tabel1"], "unknown experiment 'tabel1'. Did you mean table1"),
        (["reproduce", "table1", "--recipe", "smok"], "Did you mean smoke"),
        (
            ["reproduce", "table1", "--budget", "soon"],
            "'soon' is not a time. Write 90s, 30m or 8h.",
        ),
        (["compare", "none", "se", "--data", "gone"], "gone: neither a known set"),
        (["reproduce", "table1", "--root", "gone"], "cifar10: gone/cifar10 does not exist"),
        (["report", "gone"], "gone holds no runs.csv"),
        (["stats", "gone.csv"], "gone.csv: No such file"),
    ],
)
def test_a_mistake_is_one_sentence(
    args: list[str], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert call(args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_compare_trains_once_and_ends_with_the_answer(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    args = ["compare", "none", "control", "spem", *TINY, "--seeds", "2"]
    assert call(args) == 0
    out, err = capsys.readouterr()
    assert "6 runs to train, about " in err
    assert "run 6/6: spem, digits, depth 11, seed 1: " in err
    assert "Too few seeds to compare with none" in out
    assert out.endswith("report: comparison/report.html\n")
    rows = load_runs(tmp_path / "comparison")
    assert list(rows["module"]) == ["none", "control", "spem"] * 2
    assert set(rows["experiment"]) == {"compare"}
    assert call(args) == 0
    assert "All 6 runs are finished; nothing is trained." in capsys.readouterr().err
    told = answer(capsys, args)
    assert [row["row"] for row in told["tables"][0]["rows"]] == ["none", "control", "spem"]
    assert told["tables"][0]["reference"] == "none"


def test_failed_runs_are_named_at_the_end_with_status_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    train, failures = run.train, {"se": OSError("the disk is full"), "eca": MemoryError("none")}

    def sometimes(config: Any, *args: Any, **options: Any) -> Any:
        if config.model.attention in failures:
            raise failures[config.model.attention]
        return train(config, *args, **options)

    monkeypatch.setattr(run, "train", sometimes)
    assert call(["compare", "none", "se", "eca", "spem", *TINY, "--seeds", "1"]) == 1
    out, err = capsys.readouterr()
    assert "\nspem " in out
    assert err.endswith(
        "2 runs did not end well; the others are kept.\n"
        "  se, digits, depth 11, seed 0: the disk is full\n"
        "  eca, digits, depth 11, seed 0: MemoryError: none\n"
    )
    rows = load_runs(tmp_path / "comparison").set_index("module")
    assert list(rows["status"]) == ["finished", "failed", "failed", "finished"]
    assert rows.loc["se", "error"] == "the disk is full"


def test_a_damaged_run_does_not_stop_the_others_and_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    args = ["compare", "none", "se", *TINY, "--seeds", "1"]
    assert call(args) == 0
    (damaged,) = [p for p in tmp_path.rglob("result.json") if "none" in str(p)]
    damaged.write_text("{")
    capsys.readouterr()
    assert call([*args[:3], "spem", *args[3:]]) == 1
    err = capsys.readouterr().err
    assert str(damaged.relative_to(tmp_path)) in err
    assert "run 1/1: spem" in err


def test_a_table_or_report_that_cannot_be_written_is_no_success(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "comparison" / "report.html").mkdir(parents=True)
    assert call(["compare", "none", "se", *TINY, "--seeds", "1"]) != 0
    assert "report.html" in capsys.readouterr().err
    foreign = tmp_path / "other"
    foreign.mkdir()
    (foreign / "runs.csv").write_text("name,value\na,1\n")
    before = len(list(tmp_path.rglob("result.json")))
    assert call(["compare", "none", "eca", *TINY, "--seeds", "1", "--out", "other"]) == 2
    assert "runs.csv is not a table that spem wrote" in capsys.readouterr().err
    assert (foreign / "runs.csv").read_text() == "name,value\na,1\n"
    assert len(list(tmp_path.rglob("result.json"))) == before  # said before anything is trained


def test_reproduce_in_a_fresh_clone_keeps_the_rows_that_lie_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = reproduced(tmp_path / "results", "table1", "figure2", "controls", seeds=2)
    before = len(load_runs(out))

    def broken(*_: Any, **__: Any) -> Any:
        raise OSError("no data here")

    monkeypatch.setattr(run, "train", broken)
    args = ["reproduce", "table1", "--recipe", "smoke", "--results", "results"]
    assert call([*args, "--budget", "60s"]) == 1
    assert "21 runs did not end well" in capsys.readouterr().err  # there are no run folders
    rows = load_runs(out)
    assert len(rows) == before + 7  # of the third seed
    assert (rows["status"] == "finished").sum() == before  # a failure here undoes none of them


def test_dry_run_is_quick_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert call(["reproduce", "all", "--recipe", "paper", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "222 runs, each once even where tables share it; 222 are to be trained: about" in out
    assert ":" not in out.split("trained: ")[1]  # no 40667:34:38
    assert call(["reproduce", "table1", "--recipe", "smoke", "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["missing"], told["experiments"][0]["missing"]) == (21, 21)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_reproduce_from_nothing_to_a_report(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spem.reproduce.experiments.SMOKE_EPOCHS", 1)
    args = ["reproduce", "table1", "table2", "table3", "table4", "figure2", "--recipe", "smoke"]
    args += ["--seeds", "1", "--results", "out"]
    assert call(args) == 0
    out = capsys.readouterr().out
    assert out.endswith("report: out/report.html\n")
    assert out.count("wrote") == 0
    assert call(args) == 0
    assert "nothing is trained" in capsys.readouterr().err
    names = {path.stem for path in (tmp_path / "out" / "tables").glob("*.csv")}
    assert names == {f"{name}-digits" for name in (*args[1:5], "figure2")}


def test_report_needs_the_tables_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = compared(tmp_path / "c", "none", "spem", accuracy=steady(spem=2.0))
    told = answer(capsys, ["report", str(out)])
    assert told["tables"][0]["answer"].startswith("Above none: spem (+2.0)")
    shutil.rmtree(out / "figures")
    assert call(["report", str(out)]) == 0
    assert "Above none: spem" in capsys.readouterr().out


# ---- stats


def test_stats_and_report_follow_one_rule(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for start, seeds in ((90, 2), (15, 6), (90, 6)):
        folder = tmp_path / f"{start}-{seeds}"
        out = compared(folder, "none", "se", "spem", seeds=seeds, accuracy=steady(start, spem=3.0))
        (report,) = answer(capsys, ["report", str(out)])["tables"]
        (table,) = answer(capsys, ["stats", str(out / "runs.csv")])["tables"]
        for mine, theirs in zip(report["rows"], table["groups"], strict=True):
            assert mine["row"] == theirs["group"]
            for name in ("n", "mean", "difference", "low", "high", "p", "p_holm", "verdict"):
                wanted = theirs[name]
                assert mine[name] == (
                    pytest.approx(wanted) if isinstance(wanted, float) else wanted
                )


def test_stats_says_what_it_took_and_what_it_shows(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "theirs.csv"
    rows = ["Model,seed0,seed1,seed2", "none,90%,91%,90%", "\x1b[31mré,93%,94.5%,93%"]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    assert call(["stats", str(path)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("value by Model, paired by seed.\n")
    assert "\x1b" not in out
    assert r"\x1b[31mr" in out
    assert "is above none in this setting" in out


def test_stats_of_shares_and_per_cent_in_one_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Each table speaks of points, and shows as many decimals, as its own numbers do."""
    rows = [(m, s, 0.9 + 0.001 * (s + g)) for m, g in (("none", 0), ("se", 5)) for s in range(3)]
    text = "dataset,module,seed,accuracy\n"
    text += "".join(f"a,{m},{s},{value}\nb,{m},{s},{100 * value}\n" for m, s, value in rows)
    path = tmp_path / "both.csv"
    path.write_text(text)
    shares, percent = answer(capsys, ["stats", str(path)])["tables"]
    assert shares["reading"][0].startswith("se - none: +0.0050 over 3 paired seeds")
    assert percent["reading"][0].startswith("se - none: +0.50 points over 3 paired seeds")


def test_stats_of_names_that_the_terminal_cannot_show(tmp_path: Path) -> None:
    import subprocess
    import sys

    path = tmp_path / "t.csv"
    rows = [f"{m},{s},{90 + s + g}" for m, g in (("none", 0), ("μ-Netz", 1)) for s in range(3)]
    path.write_text("model,seed,acc\n" + "\n".join(rows) + "\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "spem", "stats", str(path)],
        capture_output=True,
        text=True,
        env={"PATH": "", "PYTHONPATH": ":".join(sys.path), "PYTHONIOENCODING": "ascii"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert r"\u03bc-Netz" in done.stdout


def test_two_comparisons_that_differ_in_one_option_are_two_tables(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The rate is not a column of runs.csv; before, the second one failed after its training."""
    args = ["compare", "none", "se", *TINY, "--seeds", "1", "--out", "out", "--runs", "runs"]
    (first,) = answer(capsys, args)["tables"]
    newest, former = answer(capsys, [*args, "--lr", "0.05"])["tables"]
    assert former["rows"] == first["rows"] != newest["rows"]
    (newest, former) = answer(capsys, ["report", "out"])["tables"]
    assert former["rows"] == first["rows"] != newest["rows"]


def test_a_command_shows_the_table_that_it_was_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = reproduced(tmp_path / "out", "table1", "table3", seeds=3)
    monkeypatch.setattr(run, "missing", lambda *_: [])
    told = answer(capsys, ["reproduce", "table3", "--recipe", "smoke", "--results", str(out)])
    assert [table["name"] for table in told["tables"]] == ["table3-digits", "table1-digits"]


def test_weights_that_are_not_here_are_missed_before_the_first_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert call(["reproduce", "finetune-1000", "--recipe", "study", "--results", "out"]) == 2
    assert "plain-cifar100.safetensors, which are not in" in capsys.readouterr().err
    assert not (tmp_path / "out" / "runs").exists()


def test_stats_names_options_and_encodings(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rows = [f"{m},{s},{rate},90" for m in ("none", "se") for s in range(3) for rate in (1, 2)]
    (tmp_path / "rates.csv").write_text("\n".join(["module,seed,lr,accuracy", *rows]))
    assert call(["stats", "rates.csv"]) == 2
    err = capsys.readouterr().err
    assert "They differ in lr: add one of these to --by, " in err
    assert "or to --within, " in err
    (tmp_path / "other.csv").write_text("module,größe\n", encoding="latin-1")
    assert call(["stats", "other.csv"]) == 2
    assert "its text is not in UTF-8" in capsys.readouterr().err


def test_seeds_and_times() -> None:
    texts = ("3", "1", "5,", "4,0,9")
    assert [parse_seeds(text) for text in texts] == [[0, 1, 2], [0], [5], [4, 0, 9]]
    texts = ("90s", "30m", "1.5h", "45", " 2 m ")
    assert [parse_duration(text) for text in texts] == [90, 1800, 5400, 45, 120]
    for text in ("", "m", "-3m", "0", "1d", "1e3", "1mh"):
        with pytest.raises(ValueError, match="is not a time"):
            parse_duration(text)
    said = ["about 1 s", "about 80 s", "about 67 min", "about 25 h", "about 5 years"]
    assert [roughly(s) for s in (0.2, 80, 4000, 90_000, 146_403_278)] == said


@pytest.mark.slow
def test_demo(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The demo's own path, with shorter runs in this process."""
    from spem.cli import demo

    monkeypatch.setattr(demo, "EPOCHS", 2)
    monkeypatch.setattr(demo, "workers", lambda: 1)
    assert call(["demo", "--out", "shown"]) == 0
    told = capsys.readouterr().out
    for name in ("none", "control", "se", "spem"):
        assert f"\n{name} " in told
    assert "digits cannot rank" in " ".join(told.split())
    assert (tmp_path / "shown" / "comparison.png").stat().st_size > 5000
    assert len(pd.read_csv(tmp_path / "shown" / "runs.csv")) == 12


def test_a_stop_before_the_first_run_is_finished_is_told_as_such(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """There is no table yet then, and that is not a fault of the folder's."""

    def stopped(*_: Any, **__: Any) -> Any:
        raise Interrupted("Training stopped by SIGTERM. Run the command again to go on.", 143)

    args = ["compare", "none", "se", *TINY, "--seeds", "1", "--out", "out", "--runs", "runs"]
    monkeypatch.setattr(run, "run_missing", stopped)
    assert call(args) == 143
    told = capsys.readouterr()
    assert "stopped by SIGTERM" in told.err
    assert "holds no runs.csv" not in told.err
    monkeypatch.setattr(
        run, "run_missing", lambda configs, *_, **__: [run.Ended(c, "stopped") for c in configs]
    )
    assert call(args) == 3
    assert "No run is finished yet.\n2 runs are left" in capsys.readouterr().out
    assert call([*args, "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["left"] == 2
    assert not (tmp_path / "out" / "report.html").exists()
