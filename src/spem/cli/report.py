"""`spem report`: rebuild the report of a results folder from its CSV files alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from spem.cli.options import Json
from spem.cli.progress import show

_RESULTS = "a folder that `spem reproduce` or `spem compare` wrote"


def run(results: Annotated[Path, "FOLDER", _RESULTS], *, json: Json = False) -> None:
    """Rebuild the report of a results folder: a page, tables (CSV, LaTeX, Markdown), figures.

    Nothing is trained and no run is read: runs.csv and the tables next to it are enough.
    """
    from spem.reproduce.report import build_report

    show(build_report(results), json=json)
