"""The report of a results folder: HTML, Markdown, LaTeX and CSV tables, and figures as PDF.

It is made from the CSV files of the folder alone, and twice from the same files it is the same
bytes.
"""

from collections.abc import Sequence
from pathlib import Path

from spem.extras import require
from spem.reproduce.report import html, latex, markdown
from spem.reproduce.report.document import Document, compose
from spem.reproduce.report.drawing import anchor, pdf
from spem.reproduce.report.lines import Block
from spem.reproduce.report.reading import read_folder
from spem.reproduce.report.tables import csv_rows
from spem.reproduce.rows import csv_text
from spem.training.checkpoint import write_atomic

__all__ = ["build_report"]


def build_report(out: Path) -> list[Path]:
    """Write report.html, report.md, `tables/` and `figures/` of a results folder.

    Args:
        out: The folder with plan.csv and what was collected beside it.

    Returns:
        The files written. Files of a former report that this one does not have are removed from
        `tables/` and `figures/`.

    Raises:
        ValueError: There is no plan.csv, or a file is damaged; the message names file and line.
        ImportError: matplotlib, Jinja2 or scipy is not installed.
    """
    for module in ("matplotlib", "jinja2", "scipy.stats"):
        require(module, extra="reproduce", purpose="the report")
    document, blocks = compose(read_folder(out))
    contents = {
        out / "report.html": html.render(document).encode(),
        out / "report.md": markdown.render(document).encode(),
        **_tables(document, blocks, out / "tables"),
        **{
            out / "figures" / f"{panel.name}.pdf": pdf(panel)
            for picture in document.pictures
            for panel in picture.panels
        },
    }
    for path, content in contents.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content)
    _remove_others(contents, out)
    return list(contents)


def _tables(document: Document, blocks: Sequence[Block], folder: Path) -> dict[Path, bytes]:
    """Each experiment's table as LaTeX and as CSV."""
    found: dict[Path, bytes] = {}
    for chapter in document.chapters:
        rows = [row for b in blocks if b.experiment == chapter.name for row in csv_rows(b)]
        name = anchor(chapter.name)
        found[folder / f"{name}.tex"] = latex.render(chapter.tables).encode()
        found[folder / f"{name}.csv"] = csv_text(rows).encode()
    return found


def _remove_others(written: dict[Path, bytes], out: Path) -> None:
    for pattern in ("tables/*.tex", "tables/*.csv", "figures/*.pdf"):
        for path in out.glob(pattern):
            if path not in written:
                path.unlink()
