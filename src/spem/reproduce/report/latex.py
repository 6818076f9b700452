r"""The tables of an experiment in LaTeX, for `\input` in a document with booktabs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from spem.reproduce.report.tables import MINUS, Table

SPECIAL = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "[": "{[}",  # after the end of a row it would be an option
    "]": "{]}",
    MINUS: "$-$",
    "\N{EN DASH}": "--",
    "±": r"$\pm$",
    "²": "$^2$",
    "\N{RIGHT SINGLE QUOTATION MARK}": "'",
}


def render(tables: Sequence[Table]) -> str:
    """Tables with `booktabs` rules, one below the other."""
    return "% needs \\usepackage{booktabs} and \\usepackage{graphicx}\n" + "\n".join(
        _table(table) for table in tables
    )


def _table(t: Table) -> str:
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escape(t.title)}}}",
        r"\resizebox{\linewidth}{!}{%",
        rf"\begin{{tabular}}{{{t.align}}}",
        r"\toprule",
        _row(t.columns),
        r"\midrule",
        *(_row(cell.text for cell in row) for row in t.rows),
        r"\bottomrule",
        r"\end{tabular}}",
        *(rf"\par\smallskip\footnotesize {escape(note)}" for note in t.notes),
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _row(cells: Iterable[str]) -> str:
    return " & ".join(escape(text) for text in cells) + r" \\"


def escape(text: str) -> str:
    r"""A text in which LaTeX sees no commands; letters it may lack are left out.

    >>> escape("50 % of a_b {x}")
    '50 \\% of a\\_b \\{x\\}'
    """
    text = re.sub(r"\s+", " ", text)
    return "".join(SPECIAL.get(letter, letter) for letter in text if letter.isprintable())
