"""`spem stats`: paired statistics of any results in a CSV file."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from spem.cli.options import RARE, Json, number
from spem.cli.output import plain, print_json, print_table
from spem.extras import rephrased, require

if TYPE_CHECKING:
    import pandas as pd

_VALUE = "column of the number that is compared"
_PAIR = "column that makes two runs a pair"
_BASELINE = "what the others are compared with; none, or else the first"
_WITHIN = "columns that split the file into tables"


def run(
    file: Annotated[Path, "FILE", "for example runs.csv of `spem compare`"],
    *,
    by: Annotated[Sequence[str], "COLUMN", "columns that name a group"] = (),
    value: Annotated[str | None, "COLUMN", _VALUE] = None,
    pair: Annotated[str | None, "COLUMN", _PAIR] = None,
    baseline: Annotated[str | None, "GROUP", _BASELINE] = None,
    within: Annotated[Sequence[str] | None, "COLUMN", _WITHIN] = None,
    level: Annotated[float, "X", "of the intervals", number(0), RARE] = 0.95,
    json: Json = False,
) -> None:
    """Paired differences of any results: a CSV with one run a row, or a column a seed or group.

    Runs of two groups that have the same seed are a pair. Below three pairs nothing is concluded; p
    is of the paired t test, from six pairs on also of flipping signs.
    """
    from spem.cli.progress import records
    from spem.stats import REFERENCE, compare, sentence

    rows = read_table(file)
    try:
        rows, chosen = choose_columns(rows, by=by, value=value, pair=pair, within=within)
        named = (rows[[chosen["by"][0], chosen["pair"]]] != "").all(axis=1)
        table = compare(rows[named], **chosen, baseline=baseline, level=level)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{file}: {str(error.args[0]).removeprefix('compare: ')}") from error
    left, split_by = len(rows) - int(table["n"].sum()), chosen["within"]
    notes = [f"{left} of {len(rows)} rows have no number or no name and are left out."] * bool(left)
    told: list[dict[str, Any]] = []
    if not json:
        split = f", within {' and '.join(split_by)}" if split_by else ""
        named_by = " and ".join(chosen["by"])
        print(plain(f"{chosen['value']} by {named_by}, paired by {chosen['pair']}{split}."))
        print(*notes, sep="\n", end="\n" * len(notes))
    alone: Any = [((), table)]
    for key, part in table.groupby(split_by, sort=False, dropna=False) if split_by else alone:
        where, lines = dict(zip(split_by, key, strict=True)), part.to_dict("records")
        decimals = _decimals(part)
        percent = "acc" in chosen["value"].lower() and part["mean"].abs().max() > 1.5
        words: Any = {"unit": "points" if percent else "", "pair": chosen["pair"]}
        others = [line for line in lines if line["verdict"] != REFERENCE]
        reading = [sentence(line, decimals=decimals, **words) for line in others]
        reading = reading or ["There is one group only: nothing is compared."]
        if json:
            groups = records(part.drop(columns=split_by))
            told.append({"within": where, "groups": groups, "reading": reading})
            continue
        print()
        columns = [chosen["by"][0], "n", "mean", "sd", "pairs", f"to {lines[0]['baseline']}"]
        columns += [f"{100 * level:g} % interval", "p", "sign-flip p", "Holm p", "verdict"]
        title = ", ".join(f"{name}={cell}" for name, cell in where.items())
        print_table(columns, [_cells(line, decimals) for line in lines], title=title)
        print(*map(plain, reading), sep="\n")
    if json:
        print_json({"file": str(file), **chosen, "notes": notes, "tables": told})


def _cells(line: dict[Any, Any], decimals: int) -> list[str]:
    """A row of the table."""
    from spem.stats import p_text

    mean, sd = (_text(line[name], decimals) for name in ("mean", "sd"))
    signed = (_text(line[name], decimals, "+") for name in ("difference", "low", "high"))
    difference, low, high = signed
    pairs = "" if line["group"] == line["baseline"] else str(line["pairs"])
    p = [p_text(line[name]) for name in ("p", "p_flip", "p_holm")]
    row = [line["group"], str(line["n"]), mean, sd, pairs, difference]
    return [*row, f"[{low}, {high}]" if low else "", *p, line["verdict"]]


def _decimals(part: pd.DataFrame) -> int:
    """As many as show two digits of the smallest deviation that is not 0, and two at least."""
    spreads = part[["sd", "difference_sd"]].to_numpy(float)
    smallest = spreads[spreads > 0].min(initial=1)
    return min(10, max(2, 1 - math.floor(math.log10(smallest))))


def _text(value: float, decimals: int, sign: str = "") -> str:
    """A number with this many decimals, or by its digits where it is very large or very small."""
    usual = value == 0 or 1e-9 <= abs(value) < 1e12
    return "" if value != value else f"{value:{sign}{f'.{decimals}f' if usual else '.6g'}}"


# ---- tables that people have -------------------------------------------------------------------

USUAL = {
    "by": ("module", "attention", "model", "method", "variant", "name", "group", "arm"),
    "value": ("accuracy", "test_accuracy", "acc", "top1", "score", "value"),
    "pair": ("seed", "run", "fold", "split", "repeat", "subject"),
}
WITHIN = ("dataset", "depth")
_SEED = re.compile(rf"({'|'.join(USUAL['pair'])})?[ _-]*\d+", re.IGNORECASE)
"""A column of one seed: seed0, Seed 1, run_2, 3."""


def read_table(path: Path) -> pd.DataFrame:
    """Read a CSV file with a heading, separated by commas, semicolons or tabs; cells stay texts."""
    from spem.files import read_regular

    pd: Any = require("pandas", extra="train", purpose="reading a table")
    content = read_regular(path)
    with rephrased(f"{path} is not a CSV file that can be read"), warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)
        try:
            file = io.StringIO(content.decode("utf-8-sig"), newline=None)
        except UnicodeDecodeError as error:
            raise ValueError("its text is not in UTF-8; save it again in this encoding") from error
        separator = max(",;\t", key=file.readline().count)
        file.seek(0)
        texts: Any = {"dtype": str, "keep_default_na": False, "index_col": False}
        try:
            table = pd.read_csv(file, sep=separator, skipinitialspace=True, **texts)
        except pd.errors.ParserWarning as error:  # it would leave cells out
            said = f"rows have more cells than the heading; quote cells that hold a {separator!r}"
            raise ValueError(said) from error
    if table.empty:
        raise ValueError(f"{path} has a heading and no rows. Pass a file with one run a row.")
    table = table.rename(columns=str.strip).apply(lambda column: column.fillna("").str.strip())
    table.attrs["comma"] = "decimal" if separator != "," else "unclear"
    return table


def choose_columns(
    table: pd.DataFrame,
    *,
    by: Sequence[str] = (),
    value: str | None = None,
    pair: str | None = None,
    within: Sequence[str] | None = None,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The table with numbers in its value column, and the arguments for `compare`.

    Columns that are not named are the usual ones, in capitals or not. A table with a column a seed,
    or a column a group and a row a seed, is turned into one with a row a run.
    """
    decimal = table.attrs.get("comma") == "decimal"  # also before three digits
    row = _find(table, USUAL["pair"] if pair is None else [pair])
    if row and not by and value is None and not _find(table, (*USUAL["by"], *USUAL["value"])):
        kept = [row, *(name for each in within or WITHIN if (name := _find(table, [each])))]
        groups = [name for name in table if name not in kept]
        for name in groups:  # a column of texts is called by its own name
            for cell in table[name]:
                _number(cell, name, decimal=decimal)
        if len(groups) > 1:
            table = table.melt(kept, groups, var_name="module", value_name="value")
    by = [_column(table, "by", name) for name in by or (None,)]
    asked = [_column(table, "within", name) for name in within or ()]
    named = {*by, value, pair, *asked}
    seeds = [name for name in table if _SEED.fullmatch(name) and name not in named]
    if value is None and pair is None and len(seeds) > 1 and not _find(table, USUAL["value"]):
        kept = [name for name in table if name not in seeds]
        table = table.melt(kept, seeds, var_name="seed", value_name="value")
    value, pair = _column(table, "value", value), _column(table, "pair", pair)
    if within is None:
        usual = [_find(table, [name]) for name in WITHIN]
        asked = [name for name in usual if name and name not in (*by, value, pair)]
    chosen = {"by": by, "value": value, "pair": pair, "within": asked}
    taken = [*by, value, pair, *asked]
    if len(set(taken)) < len(taken):
        raise ValueError(f"each column has one meaning, but {chosen} name one of them twice.")
    numbers = [_number(cell, value, decimal=decimal) for cell in table[value]]
    return table.assign(**{value: numbers}), chosen


def _column(table: pd.DataFrame, option: str, asked: str | None) -> str:
    """The column that is asked for, or else one of the usual ones."""
    from spem.stats import no_column

    found = _find(table, USUAL[option] if asked is None else [asked])
    if found is None and asked is not None:
        raise ValueError(no_column(asked, list(table)))
    if found is None:
        what = f"there is no column {USUAL[option][0]!r}"
        raise ValueError(f"{what}. Name one with --{option}: {', '.join(table)}.")
    return found


def _find(table: pd.DataFrame, names: Sequence[str]) -> str | None:
    """The first of these columns that there is, whatever its capitals."""
    known = {name.lower().replace(" ", "_"): name for name in table} | {n: n for n in table}
    return next((known[n] for n in (*names, *map(str.lower, names)) if n in known), None)


def _number(cell: str, column: str, *, decimal: bool) -> float:
    """The number in a cell: 70.5, 70.5 %, 70,5; an empty one is not a number."""
    text = cell.removesuffix("%").strip()
    if text.lower() in ("", "-", "na", "n/a", "none"):
        return float("nan")
    if not decimal and re.fullmatch(r"[+-]?[1-9]\d{0,2},\d{3}", text):
        said = f"{cell!r} in column {column!r} may be a decimal or a number of thousands"
        raise ValueError(f"{said}. Write it without a comma.")
    try:
        return float(text if "." in text else text.replace(",", "."))
    except ValueError:
        raise ValueError(f"{cell!r} in column {column!r} is not a number.") from None
