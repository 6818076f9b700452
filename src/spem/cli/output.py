"""What the commands share in speaking: tables, paragraphs and JSON."""

import json
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unicodedata import east_asian_width

_NUMBERS = re.compile(r"[-+±.,e%<\[\] ]*\d[-+±.,e%<\[\] \d]*")


def print_json(document: Any) -> None:
    """Print one JSON document to stdout; nothing else goes there under --json."""
    print(json.dumps(document, indent=2, allow_nan=False))


def say(*sentences: str) -> None:
    """Print sentences as one paragraph, no wider than the terminal."""
    width = shutil.get_terminal_size().columns
    print(textwrap.fill(plain(" ".join(sentences)), width, break_on_hyphens=False))


def plain(text: str) -> str:
    """Text from a file without what would steer a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shown(cell: object) -> str:
    """A number (12,345), a shape (1 x 3 x 8) or a text as a person reads it; "-" for None."""
    if isinstance(cell, tuple):
        return " x ".join(map(str, cell))
    return "-" if cell is None else f"{cell:,}" if isinstance(cell, int) else plain(str(cell))


def _drawn(text: str) -> int:
    """How many places of a terminal it takes: a Chinese character takes two."""
    return len(text) + sum(east_asian_width(character) in "FW" for character in text)


def new_file(text: str) -> Path:
    """A file to write, for options; ValueError if its folder is missing, or it is no file."""
    from spem.files import require_regular

    path = Path(text)
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder {path.parent}.")
    require_regular(path, missing_ok=True)
    return path


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[object]], *, title: str = ""
) -> None:
    """Print cells, for `shown`: drawn by rich on a terminal, aligned plain text elsewhere.

    On a terminal that is too narrow each row is a paragraph, so that no cell is cut.
    """
    title, cells = plain(title), [[shown(cell) for cell in row] for row in (columns, *rows)]
    right = [bool(_NUMBERS.fullmatch("".join(rest))) for _, *rest in zip(*cells, strict=True)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    drawn = sum(max(map(_drawn, column)) + 3 for column in zip(*cells, strict=True))
    terminal = sys.stdout.isatty()
    if terminal and drawn > shutil.get_terminal_size().columns:
        if title:
            say(title)
        for name, *row in cells[1:]:
            named = [f"{c}: {cell}" for c, cell in zip(columns[1:], row, strict=True) if cell]
            say(f"{name or '-'}:", "; ".join(named))
        return
    if terminal and find_spec("rich") is not None:
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table

        table = Table(title=title or None, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        for column, number in zip(cells[0], right, strict=True):
            table.add_column(column, justify="right" if number else "left", no_wrap=True)
        for row in cells[1:]:
            table.add_row(*row)
        Console(highlight=False, markup=False).print(table)
        return
    if title:
        print(title)
    for row in cells:
        padded = zip(row, widths, right, strict=True)
        print("  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in padded).rstrip())
