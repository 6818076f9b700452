"""`spem stats`: paired statistics of any results in a CSV file."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spem.cli.options import Options, number
from spem.cli.output import decimals_for, print_json, print_table

if TYPE_CHECKING:
    import pandas as pd


def options() -> Options:
    """What the command takes."""
    o = Options(
        "stats",
        "Paired differences of any results: a CSV with one run a row, or with a column a seed.",
        more="Runs of two groups that have the same seed are a pair. Below three pairs nothing is "
        "concluded; p is of the paired t test, from six pairs on also of flipping signs.",
    )
    o.add("file", "FILE", "for example runs.csv of `spem compare`", kind=Path)
    o.add("--by", "COLUMN", "columns that name a group", count="*", default=())
    o.add("--value", "COLUMN", "column of the number that is compared")
    o.add("--pair", "COLUMN", "column that makes two runs a pair")
    o.add("--baseline", "GROUP", "what the others are compared with; none, or else the first")
    o.add("--within", "COLUMN", "columns that split the file into tables", count="*")
    o.add("--level", "X", "of the intervals", kind=number(0), default=0.95, rare=True)
    return o.json()


def run(
    *,
    file: Path,
    by: list[str],
    value: str | None,
    pair: str | None,
    baseline: str | None,
    within: list[str] | None,
    level: float,
    json: bool,
) -> None:
    """Compare the groups of a file, and show how they differ."""
    from spem.stats import choose_columns, compare, read_table

    rows = read_table(file)
    try:
        rows, chosen = choose_columns(rows, by=by, value=value, pair=pair, within=within)
        named = (rows[[chosen["by"][0], chosen["pair"]]] != "").all(axis=1)
        table = compare(rows[named], **chosen, baseline=baseline, level=level)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{file}: {str(error.args[0]).removeprefix('compare: ')}") from error
    left = len(rows) - int(table["n"].sum())
    notes = (
        [f"{left} of {len(rows)} rows have no number or no name and are left out."] if left else []
    )
    parts = (
        table.groupby(chosen["within"], sort=False, dropna=False)
        if chosen["within"]
        else [((), table)]
    )
    tables = [(dict(zip(chosen["within"], key, strict=True)), part) for key, part in parts]
    if json:
        print_json(_document(file, chosen, notes, tables))
        return
    if hasattr(sys.stdout, "reconfigure"):  # a name that the terminal cannot show is no error
        with contextlib.suppress(OSError):
            sys.stdout.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
    split = f", within {' and '.join(chosen['within'])}" if chosen["within"] else ""
    print(
        _plain(
            f"{chosen['value']} by {' and '.join(chosen['by'])}, paired by {chosen['pair']}{split}."
        )
    )
    for note in notes:
        print(note)
    for where, part in tables:
        print()
        _print(chosen, where, part, level)


def _print(chosen: dict[str, Any], where: dict[str, Any], part: pd.DataFrame, level: float) -> None:
    from spem.stats import p_text

    decimals = decimals_for([s for s in (*part["sd"], *part["difference_sd"]) if s == s])
    columns = [chosen["by"][0], "n", "mean", "sd", "pairs", f"to {part['baseline'].iloc[0]}"]
    columns += [f"{100 * level:g} % interval", "p", "sign-flip p", "Holm p", "verdict"]
    rows: list[list[str]] = []
    for line in part.to_dict("records"):
        own = line["group"] == line["baseline"]
        cells = [
            line["group"],
            str(line["n"]),
            _text(line["mean"], decimals),
            _text(line["sd"], decimals),
        ]
        cells += ["" if own else str(line["pairs"]), _text(line["difference"], decimals, sign=True)]
        there = line["low"] == line["low"]
        ends = [_text(line[name], decimals, sign=True) for name in ("low", "high")]
        cells.append(f"[{', '.join(ends)}]" if there else "")
        cells += [p_text(line[name]) for name in ("p", "p_flip", "p_holm")]
        rows.append([_plain(cell) for cell in [*cells, line["verdict"]]])
    title = _plain(", ".join(f"{name}={cell}" for name, cell in where.items()))
    print_table([_plain(name) for name in columns], rows, align="lrrrrrlrrrl", title=title)
    for text in _reading(chosen, part, decimals):
        print(_plain(text))


def _reading(chosen: dict[str, Any], part: pd.DataFrame, decimals: int) -> list[str]:
    """What a table shows and what it does not, a sentence for each comparison."""
    from spem.stats import REFERENCE, sentence

    percent = "acc" in chosen["value"].lower() and part["mean"].abs().max() > 1.5
    unit = "points" if percent else ""
    lines = [line for line in part.to_dict("records") if line["verdict"] != REFERENCE]
    if not lines:
        return ["There is one group only: nothing is compared."]
    return [sentence(line, unit=unit, decimals=decimals, pair=chosen["pair"]) for line in lines]


def _text(value: float, decimals: int, *, sign: bool = False) -> str:
    """A number in so many decimals, or by its digits where it is very large or very small."""
    if value != value:
        return ""
    plain = value == 0 or 1e-9 <= abs(value) < 1e12
    return f"{value:{'+' if sign else ''}{f'.{decimals}f' if plain else '.6g'}}"


def _plain(text: str) -> str:
    """Text from a file without what would steer a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _document(
    file: Path,
    chosen: dict[str, Any],
    notes: list[str],
    tables: list[tuple[dict[str, Any], pd.DataFrame]],
) -> dict[str, Any]:
    from spem.cli.progress import records

    found: list[dict[str, Any]] = []
    for where, part in tables:
        decimals = decimals_for([s for s in (*part["sd"], *part["difference_sd"]) if s == s])
        groups = records(part.drop(columns=list(where)))
        reading = _reading(chosen, part, decimals)
        found.append({"within": where, "groups": groups, "reading": reading})
    return {"file": str(file), **chosen, "notes": notes, "tables": found}
