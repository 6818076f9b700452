"""The report: what the first screen says, what it may not say, and what it leaves alone."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from reproduce.made_up import compared, reproduced, steady

from spem.attention import list_attention
from spem.reproduce.figures import KNOWN, MINUS, colour, curves, differences, of_table
from spem.reproduce.report import build_report, markdown, number, shown
from spem.reproduce.tables import build_tables, load_runs, read_results

INTERVAL = "95 % interval"


class Page(HTMLParser):
    """A page as text, with what stands on its first screen: before the first fold."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.first, self.all, self.open, self.tags, self.ids, self.silent = "", "", True, [], [], 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, self.open))
        self.ids += [value for name, value in attrs if name == "id"]
        for name, value in attrs:
            if name in ("src", "href") and value and not value.startswith(("data:", "#")):
                assert name == "href"
                assert tag != "link", "the page must need nothing else"
        if tag == "details":
            self.open = False
        self.silent += tag in ("style", "title", "svg")

    def handle_endtag(self, tag: str) -> None:
        self.silent -= tag in ("style", "title", "svg")

    def handle_data(self, data: str) -> None:
        if not self.silent:
            self.all += data
            if self.open:
                self.first += data


def page(folder: Path) -> Page:
    return Page(build_report(folder).page.read_text(encoding="utf-8"))


def test_the_first_screen_asks_answers_and_shows(tmp_path: Path):
    out = compared(tmp_path, "none", "control", "se", "spem", accuracy=steady(spem=2.0))
    found = page(out)
    first = [tag for tag, there in found.tags if there]
    assert first.count("svg") == 1
    assert first.count("table") == 1
    assert "Do control, se and spem differ from none?" in found.first
    assert "Above none: spem (+2.0)" in found.first
    assert "digits, ResNet-11, 10 epochs, 6 seeds" in found.first
    assert len(found.first.split()) < 200
    assert len(found.ids) == len(set(found.ids))
    tables = [f"tables/compare-digits.{suffix}" for suffix in ("csv", "tex", "md")]
    figure = "figures/compare-digits-differences.svg"
    for name in ("report.html", "comparison.png", figure, *tables):
        assert (out / name).stat().st_size > 0


def test_few_seeds_and_hardly_trained_networks_are_told(tmp_path: Path):
    few = page(compared(tmp_path / "few", "none", "spem", seeds=2, accuracy=steady(spem=5.0)))
    assert "Too few seeds to compare with none" in few.first
    assert "above" not in few.first
    assert "[" not in few.first
    low = page(compared(tmp_path / "low", "none", "spem", accuracy=steady(14, spem=2.0)))
    assert "Hardly trained" in low.first


def test_digits_are_named_and_not_put_beside_the_paper(tmp_path: Path):
    out = reproduced(tmp_path, "table1", "figure2", seeds=3)
    found = page(out)
    assert {path.name for path in (out / "tables").iterdir()} == {
        f"{name}-digits.{suffix}"
        for name in ("table1", "figure2")
        for suffix in ("csv", "tex", "md")
    }
    assert all("cifar" not in path.name for path in (out / "figures").iterdir())
    assert "93.39" not in found.all
    assert "best epoch" not in found.first
    assert "a test of the machinery" in found.first


def test_best_epoch_and_verdict_stand_only_where_the_recipe_is_the_papers(tmp_path: Path):
    ours = page(reproduced(tmp_path / "p", "table1", scale="paper", accuracy=steady(93.3))).first
    assert "best epoch, %" in ours
    assert "prediction interval" in ours
    other = page(reproduced(tmp_path / "s", "table1", scale="short", accuracy=steady(40))).first
    assert "best epoch, %" not in other
    assert "paper's number" not in other
    assert "not the paper's recipe" in other
    assert "93.39" in other


def test_what_was_not_run_or_ended_badly_is_one_line(tmp_path: Path):
    out = reproduced(tmp_path, "family", seeds=3)
    rows = pd.read_csv(out / "runs.csv")
    rows = rows[rows["module"].isin(["none", "se", "spem"])]
    rows.loc[rows["module"] == "se", ["status", "error"]] = ["failed", "no memory"]
    rows.to_csv(out / "runs.csv", index=False)
    found = page(out)
    assert found.first.count("Not run: ") == 1
    assert "not run" not in found.first
    assert "failed: SE, seed 0; SE, seed 1; SE, seed 2. no memory" in found.first
    text = shown(build_tables(load_runs(out))[0])
    assert list(text[""]) == ["plain", "SPEM"]


def test_other_peoples_files_stay(tmp_path: Path):
    out = compared(tmp_path, "none", "spem", seeds=3)
    theirs = {"figures/mine.svg": "a", "tables/table9.tex": "b", "notes.md": "c"}
    for name, text in theirs.items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text(text)
    before = {name: (out / name).read_bytes() for name in ("runs.csv", "epochs.csv", "mixes.csv")}
    build_report(out)
    build_report(out)
    assert {name: (out / name).read_text() for name in theirs} == theirs
    assert {name: (out / name).read_bytes() for name in before} == before


def test_names_are_text_in_the_page(tmp_path: Path):
    out = compared(tmp_path, "none", "spem", seeds=3)
    rows = pd.read_csv(out / "runs.csv")
    rows["module"] = rows["module"].replace("spem", "<b>$x_1$ & co</b>")
    rows.to_csv(out / "runs.csv", index=False)
    found = page(out)
    assert "<b>$x_1$ & co</b>" in found.first
    assert "b" not in {tag for tag, _ in found.tags}
    assert r"\$x\_1\$ \& co" in (out / "tables" / "compare-digits.tex").read_text()


def test_a_folder_without_runs_is_told(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"holds no runs\.csv"):
        build_report(tmp_path)
    (tmp_path / "runs.csv").write_text("config,seed,module\n")
    assert "No results yet" in page(tmp_path).first


def test_a_module_has_one_colour_and_no_other_has_it():
    names = [*KNOWN, *(name for name in list_attention() if name not in KNOWN)]
    assert len(names) > 20
    assert len({colour(name) for name in names}) == len(names)
    assert colour("mine_ab12cd") == colour("mine_ab12cd") != colour("mine_ab12ce")
    assert all(re.fullmatch("#[0-9a-fA-F]{6}", colour(name)) for name in [*names, "se(pool=max)"])


def test_intervals_end_where_accuracies_do(tmp_path: Path):
    """Differences of networks near 100 % have intervals that no accuracy could reach."""

    def near(config: object) -> float:
        seed, name = config.seed, config.model.attention
        return 99.0 + (0.9 if name == "spem" else 0) * (seed != 1)

    out = compared(tmp_path, "none", "spem", seeds=3, accuracy=near)
    (table,) = build_tables(load_runs(out))
    line = table.frame.iloc[1].to_dict()
    assert line["mean"] + line["high"] - line["difference"] > 100
    drawing = differences(table)
    assert drawing is not None
    drawn = [x for each in drawing.figure.axes[0].lines for x in np.asarray(each.get_xdata())]
    assert max(drawn) <= 1.0 + 1e-9


def test_numbers_and_markdown():
    assert [number(-0.004), number(1.256, sign=True), number(float("nan"))] == ["0.00", "+1.26", ""]
    text = markdown(pd.DataFrame({"": ["a|b"], "n": ["3"]}))
    assert text == "|  | n |\n| --- | --- |\n| a\\|b | 3 |\n"


def test_the_papers_column_is_spoken_of_only_where_it_stands(tmp_path: Path):
    """Studies of our own have no number in the paper, on its data sets neither."""
    found = page(reproduced(tmp_path, "scratch", scale="study"))
    assert "plain" in found.first
    assert "paper's column" not in found.all
    assert "How this differs from the paper" not in found.all
    (table,) = build_tables(load_runs(tmp_path))
    assert "paper" not in table.frame
    assert list(shown(table).columns[1:5]) == ["accuracy, %", f"{MINUS} plain", INTERVAL, "verdict"]


def test_a_row_far_away_is_an_arrow_with_its_numbers(tmp_path: Path):
    """One arm that is 25 points below would press all the others into one line."""
    gains = {"se": 0.5, "eca": 0.3, "spem": -25.0}
    out = compared(tmp_path, "none", "se", "eca", "spem", accuracy=steady(60, **gains))
    (table,) = build_tables(load_runs(out))
    drawing = differences(table)
    assert drawing is not None
    (axis,) = drawing.figure.axes
    assert axis.get_xlim()[0] > -5
    line = table.frame.set_index("row").loc["spem"]
    (arrow,) = axis.texts
    text = f"{line['difference']:+.1f} [{line['low']:+.1f}, {line['high']:+.1f}]"
    assert arrow.get_text() == f" \N{LEFTWARDS ARROW} {text.replace('-', MINUS)} "
    assert "An arrow" in drawing.caption
    near = differences(build_tables(load_runs(compared(tmp_path / "near", "none", "se")))[0])
    assert near is not None
    assert not near.figure.axes[0].texts
    assert "An arrow" not in near.caption


def test_curves_are_of_finished_runs_alone(tmp_path: Path):
    """A run that diverged has epochs too, which no table counts."""
    out = compared(tmp_path, "none", "spem", seeds=3)
    rows = pd.read_csv(out / "runs.csv")
    rows.loc[(rows["module"] == "spem") & (rows["seed"] == 0), "status"] = "diverged"
    rows.to_csv(out / "runs.csv", index=False)
    (table,) = build_tables(load_runs(out))
    epochs = of_table(table, read_results(out)["epochs"])
    assert set(epochs[epochs["row"] == "spem"]["seed"]) == {1, 2}


def test_rows_of_one_module_have_its_colour_and_lines_that_differ(tmp_path: Path):
    out = reproduced(tmp_path, "scratch", scale="study", seeds=3)
    (table,) = build_tables(load_runs(out))
    drawn = curves(table, of_table(table, read_results(out)["epochs"]))
    assert drawn is not None
    lines = {str(line.get_label()): line for line in drawn.figure.axes[0].lines}
    first, second = lines["SPEM"], lines["SPEM, identity start"]
    assert first.get_color() == second.get_color() == colour("spem")
    assert first.get_linestyle() != second.get_linestyle()
    assert lines["SE"].get_linestyle() == first.get_linestyle()
