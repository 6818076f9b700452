"""The report as one HTML file that needs nothing else: pictures and styles are inside."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from spem.extras import require
from spem.reproduce.report.document import Document, runs_table
from spem.reproduce.report.drawing import anchor, svg
from spem.reproduce.report.reading import RunRow

TEMPLATE = "report.html.j2"


def render(document: Document) -> str:
    """The report as HTML. Whatever comes from a file is escaped.

    Raises:
        ImportError: Jinja2 or matplotlib is not installed.
    """
    jinja2 = require("jinja2", extra="reproduce", purpose="the report")
    from markupsafe import Markup

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals.update(anchor=anchor, tell=tell, first_of=first_of)
    source = files("spem.reproduce.report").joinpath(TEMPLATE).read_text(encoding="utf-8")
    # What matplotlib drew is markup already; its texts were turned into outlines.
    drawn = {panel.name: Markup(svg(panel)) for one in document.pictures for panel in one.panels}
    values: dict[str, Any] = {
        "d": document,
        "drawn": drawn,
        "runs": runs_table(document),
    }
    return str(environment.from_string(source).render(values)) + "\n"


def tell(runs: Sequence[RunRow]) -> str:
    """The runs behind a cell in words: ids with their seeds.

    >>> tell([])
    ''
    """
    seeds: dict[str, list[str]] = {}
    for run in runs:
        seeds.setdefault(run.id, []).append(str(run.seed))
    return "; ".join(f"{name}, seed {' '.join(of)}" for name, of in seeds.items())


def first_of(runs: Sequence[RunRow]) -> str:
    """The place in the appendix to which a cell of these runs leads."""
    return "run-" + anchor(runs[0].key)
