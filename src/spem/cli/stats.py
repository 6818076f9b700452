"""`spem stats`: paired statistics of any results in a CSV file."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from spem.cli.options import RARE, Json, number
from spem.cli.output import decimals_for, plain, print_json, print_table

if TYPE_CHECKING:
    import pandas as pd


def run(
    file: Annotated[Path, "FILE", "for example runs.csv of `spem compare`"],
    *,
    by: Annotated[Sequence[str], "COLUMN", "columns that name a group"] = (),
    value: Annotated[str | None, "COLUMN", "column of the number that is compared"] = None,
    pair: Annotated[str | None, "COLUMN", "column that makes two runs a pair"] = None,
    baseline: Annotated[
        str | None, "GROUP", "what the others are compared with; none, or else the first"
    ] = None,
    within: Annotated[
        Sequence[str] | None, "COLUMN", "columns that split the file into tables"
    ] = None,
    level: Annotated[float, "X", "of the intervals", number(0), RARE] = 0.95,
    json: Json = False,
) -> None:
    """Paired differences of any results: a CSV with one run a row, or with a column a seed.

    Runs of two groups that have the same seed are a pair. Below three pairs nothing is concluded; p
    is of the paired t test, from six pairs on also of flipping signs.
    """
    from spem.stats import compare

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
        plain(
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
        rows.append([plain(cell) for cell in [*cells, line["verdict"]]])
    title = plain(", ".join(f"{name}={cell}" for name, cell in where.items()))
    print_table([plain(name) for name in columns], rows, align="lrrrrrlrrrl", title=title)
    for text in _reading(chosen, part, decimals):
        print(plain(text))


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


# ---- tables that people have -------------------------------------------------------------------

BY = ("module", "attention", "model", "method", "variant", "name", "group", "arm")
VALUE = ("accuracy", "test_accuracy", "acc", "top1", "score", "value")
PAIR = ("seed", "run", "fold", "split", "repeat", "subject")
WITHIN = ("dataset", "depth")


def read_table(path: Path) -> pd.DataFrame:
    """Read a CSV file with a heading, separated by commas, semicolons or tabs; cells stay texts.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is empty, no table, or no UTF-8 text.
    """
    import pandas as pd

    try:
        with Path(path).open(encoding="utf-8-sig") as file:
            heading = file.readline()
        separator = max(",;\t", key=heading.count)
        table = pd.read_csv(
            path,
            sep=separator,
            dtype=str,
            keep_default_na=False,
            encoding="utf-8-sig",
            skipinitialspace=True,
            index_col=False,
        )
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text. Pass a CSV file.") from error
    except pd.errors.EmptyDataError as error:
        raise ValueError(f"{path} is empty. Pass a CSV file with a heading.") from error
    except (pd.errors.ParserError, pd.errors.ParserWarning) as error:
        raise ValueError(f"{path} is no CSV file that can be read: {error}") from error
    table.columns = [str(name).strip() for name in table.columns]
    if table.empty:
        raise ValueError(f"{path} has a heading and no rows. Pass a file with one run a row.")
    return table.apply(lambda column: column.fillna("").str.strip())


def choose_columns(
    table: pd.DataFrame,
    *,
    by: Sequence[str] = (),
    value: str | None = None,
    pair: str | None = None,
    within: Sequence[str] | None = None,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The table with numbers in its value column, and the arguments for `compare`.

    Columns that are not named are the usual ones, in capitals or not. A table with a column a seed
    is turned into one with a row a run.

    Raises:
        ValueError: A column does not exist or none can be guessed, or a cell is no number.
    """
    from spem.stats import no_column

    named = [*by, *filter(None, [value, pair]), *(within or ())]
    for name in named:
        if _find(table, [name]) is None:
            raise ValueError(no_column(name, list(table.columns)))
    by = [str(_find(table, [name])) for name in by]
    if not by:
        by = [_guess(table, "by", BY)]
    seeds = [name for name in table.columns if _is_seed(name) and name not in named]
    if value is None and pair is None and len(seeds) > 1 and _find(table, VALUE) is None:
        kept = [name for name in table.columns if name not in seeds]
        table = table.melt(kept, seeds, var_name="seed", value_name="value")
    chosen_value = str(_find(table, [value])) if value else _guess(table, "value", VALUE)
    chosen_pair = str(_find(table, [pair])) if pair else _guess(table, "pair", PAIR)
    taken = {*by, chosen_value, chosen_pair}
    if within is None:
        within = [f for n in WITHIN if (f := _find(table, [n])) is not None and f not in taken]
    else:
        within = [str(_find(table, [name])) for name in within]
    chosen = {"by": by, "value": chosen_value, "pair": chosen_pair, "within": within}
    if len({*by, chosen_value, chosen_pair, *within}) < len(by) + 2 + len(within):
        raise ValueError(f"each column has one meaning, but {chosen} name one of them twice.")
    numbers = [_number(cell, chosen_value) for cell in table[chosen_value]]
    return table.assign(**{chosen_value: numbers}), chosen


def _find(table: pd.DataFrame, names: Sequence[str]) -> str | None:
    """The first of these columns that there is, whatever its capitals."""
    lower = {str(column).lower().replace(" ", "_"): str(column) for column in table.columns}
    exact = (name for name in names if name in table.columns)
    return next(exact, None) or next((lower[n.lower()] for n in names if n.lower() in lower), None)


def _guess(table: pd.DataFrame, option: str, usual: Sequence[str]) -> str:
    found = _find(table, usual)
    if found is None:
        raise ValueError(
            f"there is no column {usual[0]!r}. Name one with --{option}: "
            f"{', '.join(map(str, table.columns))}."
        )
    return found


def _is_seed(name: str) -> bool:
    """Whether a column is that of one seed: seed0, seed 1, run_2, 3.

    >>> [name for name in ("seed0", "Seed 1", "run_2", "3", "top1", "depth") if _is_seed(name)]
    ['seed0', 'Seed 1', 'run_2', '3']
    """
    text = name.lower()
    for word in PAIR:
        text = text.removeprefix(word)
    return text.strip(" _-").isdigit()


def _number(cell: Any, column: str) -> float:
    """The number in a cell: 70.5, 70.5 %, 70,5; an empty one is not a number."""
    text = str(cell).strip().removesuffix("%").strip()
    if text.lower() in ("", "-", "na", "n/a", "none"):
        return float("nan")
    if "," in text and "." not in text:
        text = text.replace(",", ".")
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{cell!r} in column {column!r} is not a number.") from None
