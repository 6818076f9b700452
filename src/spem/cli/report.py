"""`spem report`: rebuild the report of a results folder from its CSV files alone."""

from __future__ import annotations

from pathlib import Path

from spem.cli.options import Options
from spem.cli.progress import show


def options() -> Options:
    """What the command takes."""
    o = Options(
        "report",
        "Rebuild the report of a results folder: a page, tables (CSV, LaTeX, Markdown), figures.",
        more="Nothing is trained and no run is read: runs.csv and the tables beside it are enough.",
    )
    o.add("results", "FOLDER", "a folder that `spem reproduce` or `spem compare` wrote", kind=Path)
    return o.json()


def run(*, results: Path, json: bool) -> None:
    """Write the report, and show its first screen."""
    from spem.reproduce.report import build_report

    show(build_report(results), json=json)
