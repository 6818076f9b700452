"""Tables as CSV files: written whole or not at all, and read back as they were written."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

Row = dict[str, str]

KINDS = ("ops", "step", "family", "network", "memory")


def write(rows: Sequence[Row], path: Path) -> None:
    """Writes rows of the same columns.

    Raises:
        ValueError: There are no rows, or their columns differ.
    """
    if not rows:
        raise ValueError(f"bench: there is nothing to write into {path}.")
    if any(list(row) != list(rows[0]) for row in rows):
        raise ValueError(f"bench: the rows for {path} have different columns.")
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text.getvalue(), encoding="utf-8")
    temporary.replace(path)


def read(path: Path) -> list[Row]:
    """The rows of a table; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def without_failed(rows: Sequence[Row], names: Sequence[str]) -> list[Row]:
    """The rows, less every group (rows that agree in these columns) of which one could not run."""
    failed = {tuple(row.get(name) for name in names) for row in rows if row.get("note")}
    return [row for row in rows if tuple(row.get(name) for name in names) not in failed]


def select(rows: Sequence[Row], wanted: Mapping[str, str]) -> list[Row]:
    """The rows with these values."""
    return [row for row in rows if all(row.get(k) == v for k, v in wanted.items())]
