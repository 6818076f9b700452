"""The report of a results folder: one HTML page, and its tables and figures as files.

Everything comes from the folder's CSV files; no run is read and nothing is trained.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from spem import stats
from spem.extras import require
from spem.files import write_atomic
from spem.reproduce.experiments import EXPERIMENTS
from spem.reproduce.figures import MINUS, Drawing, draw_all
from spem.reproduce.tables import FINISHED, Table, build_tables, read_results

if TYPE_CHECKING:
    import pandas as pd

HEADLINES = ("compare", "controls", "table1", *EXPERIMENTS)
"""The first screen answers the first of these that is present."""
P_VALUES = ("p", "p_flip", "p_holm")


@dataclass(frozen=True)
class Report:
    """What was written: the page and its tables, the first screen's first."""

    page: Path
    tables: list[Table]


def build_report(folder: Path) -> Report:
    """Write `report.html`, `tables/` (CSV, LaTeX, Markdown) and `figures/` (SVG) into a folder.

    Other files there are left alone.

    Raises:
        FileNotFoundError: The folder holds no runs.csv.
        ValueError: A file of the folder is damaged.
    """
    require("jinja2", extra="train", purpose="the report")
    frames = read_results(folder)
    tables = build_tables(frames["runs"])
    tables.sort(key=lambda table: HEADLINES.index(table.experiment))
    drawings = draw_all(tables, frames)
    for table in tables:
        _write_table(table, folder / "tables")
    for drawing in drawings:
        _write(folder / "figures" / f"{drawing.name}.svg", drawing.svg)
    if drawings and tables[0].experiment == "compare":  # the picture of a comparison, to look at
        picture = io.BytesIO()
        drawings[0].figure.savefig(picture, dpi=150)
        write_atomic(folder / "comparison.png", picture.getvalue())
    page = folder / "report.html"
    _write(page, _page(tables, drawings, frames["runs"]))
    return Report(page, tables)


def shown(table: Table) -> pd.DataFrame:
    """A table for people: formatted text, without empty columns."""
    import pandas as pd

    frame, decimals = table.frame, table.decimals

    def numbers(name: str, decimals: int = 2, *, sign: bool = False) -> list[str]:
        return [number(x, decimals, sign=sign) for x in frame.get(name, [None] * len(frame))]

    def spread(mean: str, sd: str, decimals: int) -> list[str]:
        pairs = zip(numbers(mean, decimals), numbers(sd, decimals), strict=True)
        return [m + (f" ± {s}" if s else "") for m, s in pairs]

    ends = zip(*(numbers(name, decimals, sign=True) for name in ("low", "high")), strict=True)
    p = {name: [stats.p_text(x).replace("-", "") for x in frame[name]] for name in P_VALUES}
    heading = f"{MINUS} {table.reference}" if 0 < len(table.reference) < 16 else "difference"
    columns = {
        "": frame["row"].astype(str),
        "paper": numbers("paper"),
        "accuracy, %": spread("mean", "sd", decimals),
        "best epoch, %": spread("best_mean", "best_sd", 2),
        heading: numbers("difference", decimals, sign=True),
        "95 % interval": [f"[{low}, {high}]" if low else "" for low, high in ends],
        "verdict": frame["verdict"],
        "Holm p": p["p_holm"],
        "n": frame["n"].astype(str),
        "p": p["p"],
        "sign-flip p": p["p_flip"],
        "paper's number": frame.get("against_paper", ""),
        "parameters, paper": [f"{text} M" if text else "" for text in numbers("paper_parameters")],
        "parameters": numbers("parameters", 0),
        "note": frame["note"],
    }
    text = pd.DataFrame(columns)
    empty = [name for name in text.columns[1:] if not text[name].astype(bool).any()]
    return text.drop(columns=empty)


def number(value: float | None, decimals: int = 2, *, sign: bool = False) -> str:
    """A number as printed, with a true minus sign; empty for NaN."""
    if value is None or value != value:
        return ""
    value = round(value, decimals) + 0.0  # no minus before a zero
    return f"{value:{'+' if sign else ''},.{decimals}f}".replace("-", MINUS)


def notes(table: Table) -> list[str]:
    """Notes to a table: rows without runs, runs that ended badly, the meaning of columns."""
    found: list[str] = []
    runs = table.runs
    for status, part in runs[runs["status"] != FINISHED].groupby("status"):
        which = [f"{row}, seed {seed}" for row, seed in zip(part["row"], part["seed"], strict=True)]
        reasons = dict.fromkeys(str(error) for error in part["error"] if error)
        found.append(f"{status}: {'; '.join(which)}." + "".join(f" {text}" for text in reasons))
    if table.not_run:
        found.append(f"Not run: {', '.join(table.not_run)}.")
    if "paper" in table.frame and not table.paper_recipe:
        found.append(
            "This is not the paper's recipe: the paper's column is there for "
            "orientation, and nothing here confirms or refutes it."
        )
    if "against_paper" in table.frame:
        found.append(
            "paper's number: inside, if it lies in the 95 % prediction interval for one more run "
            "of ours at its best epoch, which like the paper's is selected on the test images."
        )
    return found


def _write_table(table: Table, folder: Path) -> None:
    text = shown(table)
    _write(folder / f"{table.name}.csv", table.frame.to_csv(index=False, lineterminator="\n"))
    style = text.style.hide(axis="index").format(escape="latex")
    latex = style.format_index(axis="columns", escape="latex").to_latex(hrules=True)
    latex = latex.replace(MINUS, "$-$").replace("±", r"$\pm$")
    _write(folder / f"{table.name}.tex", latex)
    _write(folder / f"{table.name}.md", f"{table.title}: {table.where}\n\n{markdown(text)}")


def markdown(text: pd.DataFrame) -> str:
    """A text table in Markdown."""
    rows = [list(text.columns), ["---"] * len(text.columns), *text.to_numpy().tolist()]
    cells = ([str(cell).replace("|", r"\|") for cell in row] for row in rows)
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)


def _write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, content.encode())


def _page(tables: Sequence[Table], drawings: Sequence[Drawing], runs: pd.DataFrame) -> str:
    from jinja2 import Environment

    source = files("spem.reproduce").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    finished = runs[runs["status"] == FINISHED]
    of_paper = any("paper" in table.frame for table in tables)
    entries = [
        {
            "table": table,
            "text": shown(table),
            "answer": table.answer.replace("(-", f"({MINUS}"),
            "notes": notes(table),
            "figures": [one for one in drawings if one.name.startswith(f"{table.name}-")],
        }
        for table in tables
    ]
    names = ["module", "dataset", "depth", "epochs", "seed", "status", "accuracy", "config"]
    own = runs.assign(accuracy=[number(value) for value in runs["accuracy"]])
    own = own[[name for name in names if name in own]].astype(object).fillna("")
    return environment.from_string(source).render(
        entries=entries, of_paper=of_paper, machines=_machines(finished), runs=own
    )


def _machines(runs: pd.DataFrame) -> list[str]:
    """Hardware, versions and training time, a sentence each."""
    if runs.empty:
        return []
    hours = float(runs["time_train_seconds"].sum()) / 3600 if "time_train_seconds" in runs else 0
    plural = "s" if len(runs) > 1 else ""
    found = [f"{len(runs)} run{plural}, {hours:.2g} hours of training in total."]
    for name in ("hardware", "torch", "commit", "precision", "impl", "step"):
        cells = [str(cell) for cell in runs[name].dropna().unique()] if name in runs else []
        if cells:
            found.append(f"{name}: {'; '.join(cells)}")
    return found
