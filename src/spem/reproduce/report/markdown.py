"""The report as Markdown: the same sentences and tables, the figures as links."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from spem.reproduce.report.document import Document, runs_table
from spem.reproduce.report.html import tell
from spem.reproduce.report.tables import Cell, Table


def render(document: Document) -> str:
    """The report as Markdown. Whatever comes from a file is escaped."""
    return "\n".join(_lines(document)) + "\n"


def _lines(d: Document) -> Iterator[str]:
    yield from (f"# {escape(d.title)}", "", "## Summary", "")
    yield from _paragraphs(d.answer)
    yield from _items(d.headline)
    if d.headline_table:
        yield from table(d.headline_table)
    yield from ("### What was run", "")
    yield from _items([*d.facts, *d.data])
    yield from table(d.state)
    if d.power:
        yield from table(d.power)
    if d.images:
        yield from table(d.images)
    else:
        yield from _paragraphs([d.no_images])
    yield from ("## Tables", "")
    yield from _paragraphs([READING])
    for chapter in d.chapters:
        if chapter.question:
            yield from (f"### {escape(chapter.title)}", "")
            yield from _paragraphs([chapter.question])
        for one in chapter.tables:
            yield from table(one, heading="#### ")
    yield from ("## Figures", "")
    for picture in d.pictures:
        yield from (f"### {escape(picture.title)}", "")
        if picture.panels:
            yield from _items_raw(
                f"[{escape(panel.name)}.pdf](figures/{panel.name}.pdf): {escape(panel.alt)}"
                for panel in picture.panels
            )
            yield from _paragraphs([picture.caption])
        else:
            scale = f" --scale {d.scale}" if d.scale else ""
            command = f"spem reproduce {picture.command}{scale} --results DIR"
            yield from _paragraphs([f"Its data are missing; this makes it: {command}"])
    yield from ("## Differences from the paper, and what cannot be reproduced", "")
    yield from _items_raw(f"**{escape(what)}.** {escape(how)}" for what, how in d.differences)
    yield from ("## Runs", "")
    yield from table(runs_table(d), heading="")


READING = (
    "Accuracies are percent of the test images, mean ± standard deviation (number of seeds), then "
    "the 95 % t interval of the mean. Last epoch is the headline; best epoch was selected on the "
    "test set, as the paper's numbers were. "
    "Differences are of last epochs, in points, over pairs of equal seed, with a 95 % interval (t "
    "below six pairs, BCa from six on) and p values, alone and after Holm's correction for the "
    "lines of one table compared with the same reference (not across columns or tables). The "
    "verdict says whether the paper's number lies inside the 95 % prediction interval for one more "
    "best-epoch run of ours."
)


def table(t: Table, *, heading: str = "### ") -> Iterator[str]:
    """A table in pipes, with the runs behind each row in a last column."""
    if heading:
        yield from (f"{heading}{escape(t.title)}", "")
    behind = [_runs(row) for row in t.rows] if heading else []
    extra = ["runs"] if any(behind) else []
    yield "| " + " | ".join(escape(column) for column in [*t.columns, *extra]) + " |"
    sides = [":--" if side == "l" else "--:" for side in t.align] + [":--"] * len(extra)
    yield "| " + " | ".join(sides) + " |"
    for i, row in enumerate(t.rows):
        cells = [one.text for one in row] + ([behind[i]] if extra else [])
        yield "| " + " | ".join(escape(text) for text in cells) + " |"
    yield ""
    yield from _paragraphs(t.notes)


def _runs(row: Iterable[Cell]) -> str:
    runs = {run.key: run for cell in row for run in cell.runs}
    return tell(list(runs.values()))


def escape(text: str) -> str:
    r"""A text in which Markdown and HTML see nothing but letters.

    >>> escape("a_b*c | <script>")
    'a\\_b\\*c \\| &lt;script&gt;'
    """
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*_{}\[\]|#~$])", r"\\\1", text)
    return re.sub(r"\s+", " ", text)


def _paragraphs(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        yield from (_start(escape(text)), "")


def _items(texts: Iterable[str]) -> Iterator[str]:
    yield from _items_raw(escape(text) for text in texts)


def _items_raw(texts: Iterable[str]) -> Iterator[str]:
    yield from (f"- {text}" for text in texts)
    yield ""


def _start(text: str) -> str:
    """A paragraph that does not begin like a list or a rule."""
    return re.sub(r"^(\d+)([.)])|^([-+=])", r"\1\\\2\\\3" if text[:1].isdigit() else r"\\\3", text)
