"""The report of a results folder: one HTML page, and its tables and figures as files.

Everything comes from the CSV files of the folder; no run is read and nothing is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spem import stats
from spem.extras import require
from spem.files import write_atomic
from spem.reproduce.experiments import EXPERIMENTS
from spem.reproduce.figures import MINUS, Drawing, draw_all
from spem.reproduce.tables import FINISHED, Table, build_tables, read_results

if TYPE_CHECKING:
    import pandas as pd

HEADLINES = ("compare", "controls", "table1", *EXPERIMENTS)
"""What the first screen answers: the first of these that was asked."""

DIFFERENCES: tuple[tuple[str, str], ...] = (
    (
        "Selection on the test set",
        "The paper's accuracies are those of the best of 164 epochs of one run, chosen by the "
        "test images themselves. Here the last epoch is the headline; the best epoch stands "
        "beside it under its own name, because only that is of the paper's kind. The paper gives "
        "no seeds and no deviations: its numbers are single draws.",
    ),
    (
        "A small start",
        "SPEM's gate begins at 0.032, so every residual branch starts almost silent. This alone "
        "can help a deep network. The paper has no control for it; the experiment “controls” "
        "has two.",
    ),
    (
        "The formula",
        "Text, figure 3 and the official program of the paper define three different modules: "
        "where the sigmoids stand and whether the two pools are mapped before or after they are "
        "mixed. SPEM means the text's form unless a row says otherwise.",
    ),
    (
        "The penalty",
        "The program adds 0.1 times the sum of |p|² over all blocks to the loss, so it grows with "
        "depth. It shrinks |p| and thereby lengthens the steps of lambda, which depends on the "
        "direction of p only: learned lambdas of single blocks carry little meaning.",
    ),
    (
        "CBAM's parameters",
        "The paper prints 1.92 M and 1.94 M. The official CBAM has 1.91 M and 1.93 M, and no "
        "variant of its parts that we know of reproduces both cells without being tuned to them.",
    ),
    (
        "ECA's parameters on CIFAR-100",
        "The paper prints 1.72 M, less than the plain network with 100 classes already has "
        "(1.73 M): this cell cannot be reached by any ECA.",
    ),
    (
        "Table 4, (b) to (e)",
        "The figure that named the reweight variants by letter is lost. Ours are named by their "
        "formula; which of the four letters they are cannot be recovered.",
    ),
    (
        "Table 4, (f) and (g)",
        "The text says that the maximum alone is better than the minimum alone and that (f) is "
        "above (g); the table has (g) above (f). Letters or rows are swapped in the paper.",
    ),
    (
        "Table 3 and Figure 2",
        "The values of lambda in Table 3 are lost and taken as 0.1, 0.3, 0.5, 0.7, 0.9, the first "
        "row being 0.1. Figure 2 prints no numbers; its grid of 0.1 to 0.9 is inferred.",
    ),
    (
        "Unknown settings",
        "The weight decay and the width of SE are not in the text; they are taken from the "
        "official program and from the printed parameter counts. The authors' code of the other "
        "modules is not public; those here follow their own papers.",
    ),
)
"""In what the reproduction differs from the paper: (what, how)."""


@dataclass(frozen=True)
class Report:
    """What was written.

    Args:
        headline: The table of the first screen; None where no run is finished yet.
        page: The HTML page.
        tables: All tables.
    """

    headline: Table | None
    page: Path
    tables: tuple[Table, ...]


def build_report(folder: Path) -> Report:
    """Write `report.html`, `tables/` (CSV, LaTeX, Markdown) and `figures/` (SVG) of a folder.

    Files of other names that lie there are not touched.

    Raises:
        FileNotFoundError: The folder holds no runs.csv.
        ImportError: Jinja2 or matplotlib are not installed.
        OSError: A file cannot be written.
        ValueError: A file of the folder is damaged.
    """
    require("jinja2", extra="train", purpose="the report")
    frames = read_results(folder)
    tables = build_tables(frames["runs"])
    tables.sort(key=lambda table: (not len(table.frame), HEADLINES.index(table.experiment)))
    drawings = draw_all(tables, frames)
    for table in tables:
        _write_table(table, folder / "tables")
    for drawing in drawings:
        _write(folder / "figures" / f"{drawing.name}.svg", drawing.svg)
    if drawings and tables[0].experiment == "compare":  # the picture of a comparison, to look at
        drawings[0].figure.savefig(folder / "comparison.png", dpi=150)
    page = folder / "report.html"
    _write(page, _page(tables, drawings, frames["runs"]))
    return Report(tables[0] if tables else None, page, tuple(tables))


def shown(table: Table) -> pd.DataFrame:
    """A table as people read it: texts, columns without content left out."""
    import pandas as pd

    frame, decimals = table.frame, table.decimals
    text = pd.DataFrame({"": frame["row"].astype(str)})
    if "paper" in frame:
        text["paper"] = [number(value) for value in frame["paper"]]
    text["accuracy, %"] = [
        number(mean, decimals) + (f" ± {number(sd, decimals)}" if sd == sd else "")
        for mean, sd in zip(frame["mean"], frame["sd"], strict=True)
    ]
    if "best_mean" in frame:
        text["best epoch, %"] = [
            number(mean) + (f" ± {number(sd)}" if sd == sd else "")
            for mean, sd in zip(frame["best_mean"], frame["best_sd"], strict=True)
        ]
    heading = f"{MINUS} {table.reference}" if 0 < len(table.reference) < 16 else "difference"
    text[heading] = [number(value, decimals, sign=True) for value in frame["difference"]]
    text["95 % interval"] = [
        f"[{number(low, decimals, sign=True)}, {number(high, decimals, sign=True)}]"
        if low == low
        else ""
        for low, high in zip(frame["low"], frame["high"], strict=True)
    ]
    text["verdict"] = frame["verdict"]
    text["Holm p"] = [stats.p_text(p).replace("-", "") for p in frame["p_holm"]]
    text["n"] = frame["n"].astype(str)
    text["p"] = [stats.p_text(p).replace("-", "") for p in frame["p"]]
    if frame["p_flip"].notna().any():
        text["sign-flip p"] = [stats.p_text(p).replace("-", "") for p in frame["p_flip"]]
    if "against_paper" in frame:
        text["paper's number"] = frame["against_paper"]
    if "paper_parameters" in frame and frame["paper_parameters"].notna().any():
        text["parameters, paper"] = [
            "" if value != value or value is None else f"{value:.2f} M"
            for value in frame["paper_parameters"]
        ]
    text["parameters"] = [
        f"{int(value):,}" if value == value else "" for value in frame["parameters"]
    ]
    if frame["note"].astype(bool).any():
        text["note"] = frame["note"]
    empty = [name for name in text.columns[1:] if not text[name].astype(bool).any()]
    return text.drop(columns=empty)


def number(value: float | None, decimals: int = 2, *, sign: bool = False) -> str:
    """A number as it is printed, with a true minus sign; nothing where there is none.

    Examples:
        >>> number(1.5, 1, sign=True), number(None), number(-0.001)
        ('+1.5', '', '0.00')
    """
    if value is None or value != value:
        return ""
    value = round(value, decimals) + 0.0  # no minus before a zero
    return f"{value:{'+' if sign else ''},.{decimals}f}".replace("-", MINUS)


def notes(table: Table) -> list[str]:
    """What must be known to read a table: rows without runs, runs that ended badly, its columns."""
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
            "This is another recipe than the paper's: the paper's column stands there for "
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
    latex = text.style.hide(axis="index").format(escape="latex")
    latex = latex.format_index(axis="columns", escape="latex")
    content = latex.to_latex(hrules=True).replace(MINUS, "$-$").replace("±", r"$\pm$")
    _write(folder / f"{table.name}.tex", content)
    _write(folder / f"{table.name}.md", f"{table.title}: {table.where}\n\n{markdown(text)}")


def markdown(text: pd.DataFrame) -> str:
    """A table of texts in Markdown."""
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
    entries: list[dict[str, Any]] = [
        {
            "table": table,
            "text": shown(table),
            "answer": table.answer.replace("(-", f"({MINUS}"),
            "notes": notes(table),
            "figures": [d for d in drawings if d.name.startswith(f"{table.name}-")],
        }
        for table in tables
    ]
    return environment.from_string(source).render(
        entries=entries,
        machines=_machines(finished),
        differences=DIFFERENCES if of_paper else (),
        runs=_runs_text(runs),
    )


def _machines(runs: pd.DataFrame) -> list[str]:
    """On what was trained, by which version, and for how long, a sentence each."""
    if runs.empty:
        return []
    hours = float(runs["time_train_seconds"].sum()) / 3600 if "time_train_seconds" in runs else 0
    found = [f"{len(runs)} runs, together {hours:.2g} hours of training."]
    for name in ("hardware", "torch", "commit", "precision", "impl", "step"):
        cells = [str(cell) for cell in runs[name].dropna().unique()] if name in runs else []
        if cells:
            found.append(f"{name}: {'; '.join(cells)}")
    return found


def _runs_text(runs: pd.DataFrame) -> pd.DataFrame:
    """Every run in a row, for the appendix."""
    names = ["module", "dataset", "depth", "epochs", "seed", "status", "accuracy", "config"]
    own = runs[[name for name in names if name in runs]].astype(object)
    return own.assign(accuracy=[number(value) for value in runs["accuracy"]]).fillna("")
