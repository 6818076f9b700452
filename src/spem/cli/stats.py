"""`spem stats`: paired statistics of any results in a CSV file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from spem.cli.options import RARE, Json, number
from spem.cli.output import decimals_for, plain, print_json, print_table

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
    """Paired differences of any results: a CSV with one run a row, or with a column a seed.

    Runs of two groups that have the same seed are a pair. Below three pairs nothing is concluded; p
    is of the paired t test, from six pairs on also of flipping signs.
    """
    from spem.cli.progress import records
    from spem.stats import compare

    rows = read_table(file)
    try:
        rows, chosen = choose_columns(rows, by=by, value=value, pair=pair, within=within)
        named = (rows[[chosen["by"][0], chosen["pair"]]] != "").all(axis=1)
        table = compare(rows[named], **chosen, baseline=baseline, level=level)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{file}: {str(error.args[0]).removeprefix('compare: ')}") from error
    left, split_by = len(rows) - int(table["n"].sum()), chosen["within"]
    notes = [f"{left} of {len(rows)} rows have no number or no name and are left out."] * bool(left)
    parts = table.groupby(split_by, sort=False, dropna=False) if split_by else [((), table)]
    found: list[dict[str, Any]] = []
    for key, part in parts:
        where = dict(zip(split_by, key, strict=True))
        found.append({"within": where, "groups": records(part.drop(columns=split_by))})
        found[-1]["reading"] = _reading(chosen, part)
    if json:
        print_json({"file": str(file), **chosen, "notes": notes, "tables": found})
        return
    split = f", within {' and '.join(split_by)}" if split_by else ""
    named_by = " and ".join(chosen["by"])
    print(plain(f"{chosen['value']} by {named_by}, paired by {chosen['pair']}{split}."))
    print(*notes, sep="\n", end="\n" * len(notes))
    for one in found:
        print()
        _print(chosen["by"][0], one, level)


def _print(name: str, table: dict[str, Any], level: float) -> None:
    from spem.stats import p_text

    groups = table["groups"]
    decimals = _decimals(groups)
    columns = [name, "n", "mean", "sd", "pairs", f"to {groups[0]['baseline']}"]
    columns += [f"{100 * level:g} % interval", "p", "sign-flip p", "Holm p", "verdict"]
    rows: list[list[str]] = []
    for line in groups:
        numbers = [_text(line[name], decimals) for name in ("mean", "sd")]
        pairs = "" if line["group"] == line["baseline"] else str(line["pairs"])
        difference, low, high = (
            _text(line[name], decimals, sign="+") for name in ("difference", "low", "high")
        )
        cells = [line["group"], str(line["n"]), *numbers, pairs, difference]
        p = ["-" if line[n] is None else p_text(line[n]) for n in ("p", "p_flip", "p_holm")]
        rows.append([*cells, f"[{low}, {high}]" if low else "", *p, line["verdict"]])
    title = plain(", ".join(f"{name}={cell}" for name, cell in table["within"].items()))
    print_table(columns, rows, title=title)
    print(*map(plain, table["reading"]), sep="\n")


def _reading(chosen: dict[str, Any], part: pd.DataFrame) -> list[str]:
    """What a table shows and what it does not, a sentence for each comparison."""
    from spem.stats import REFERENCE, sentence

    percent = "acc" in chosen["value"].lower() and part["mean"].abs().max() > 1.5
    words: Any = {"unit": "points" if percent else "", "pair": chosen["pair"]}
    words["decimals"] = _decimals(part.to_dict("records"))
    lines = part[part["verdict"] != REFERENCE].to_dict("records")
    return [sentence(line, **words) for line in lines] or [
        "There is one group only: nothing is compared."
    ]


def _decimals(lines: list[dict[str, Any]]) -> int:
    spreads = [line[name] for line in lines for name in ("sd", "difference_sd")]
    return decimals_for(spread for spread in spreads if spread == spread)


def _text(value: float | None, decimals: int, sign: str = "") -> str:
    """A number with this many decimals, or by its digits where it is very large or very small."""
    if value is None:
        return ""
    usual = value == 0 or 1e-9 <= abs(value) < 1e12
    return f"{value:{sign}{f'.{decimals}f' if usual else '.6g'}}"


# ---- tables that people have -------------------------------------------------------------------

USUAL = {
    "by": ("module", "attention", "model", "method", "variant", "name", "group", "arm"),
    "value": ("accuracy", "test_accuracy", "acc", "top1", "score", "value"),
    "pair": ("seed", "run", "fold", "split", "repeat", "subject"),
}
WITHIN = ("dataset", "depth")


def read_table(path: Path) -> pd.DataFrame:
    """Read a CSV file with a heading, separated by commas, semicolons or tabs; cells stay texts.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is empty, no table, or no UTF-8 text.
    """
    import pandas as pd

    try:
        with path.open(encoding="utf-8-sig") as file:
            separator = max(",;\t", key=file.readline().count)
        texts: Any = {"dtype": str, "keep_default_na": False, "encoding": "utf-8-sig"}
        table = pd.read_csv(path, sep=separator, skipinitialspace=True, index_col=False, **texts)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text. Pass a CSV file.") from error
    except pd.errors.EmptyDataError as error:
        raise ValueError(f"{path} is empty. Pass a CSV file with a heading.") from error
    except (pd.errors.ParserError, pd.errors.ParserWarning) as error:
        raise ValueError(f"{path} is not a CSV file that can be read: {error}") from error
    if table.empty:
        raise ValueError(f"{path} has a heading and no rows. Pass a file with one run a row.")
    return table.rename(columns=str.strip).apply(lambda column: column.fillna("").str.strip())


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
        ValueError: A column does not exist or none can be guessed, or a cell is not a number.
    """
    by = [_column(table, "by", name) for name in by or (None,)]
    asked = None if within is None else [_column(table, "within", name) for name in within]
    named = {*by, value, pair, *(asked or ())}
    seeds = [name for name in table if _is_seed(name) and name not in named]
    if value is None and pair is None and len(seeds) > 1 and not _find(table, USUAL["value"]):
        kept = [name for name in table if name not in seeds]
        table = table.melt(kept, seeds, var_name="seed", value_name="value")
    value, pair = _column(table, "value", value), _column(table, "pair", pair)
    if asked is None:
        usual = [_find(table, [name]) for name in WITHIN]
        asked = [name for name in usual if name and name not in (*by, value, pair)]
    chosen = {"by": by, "value": value, "pair": pair, "within": asked}
    taken = [*by, value, pair, *asked]
    if len(set(taken)) < len(taken):
        raise ValueError(f"each column has one meaning, but {chosen} name one of them twice.")
    numbers = [_number(cell, value) for cell in table[value]]
    return table.assign(**{value: numbers}), chosen


def _column(table: pd.DataFrame, option: str, asked: str | None) -> str:
    """The column that is asked for, or else one of the usual ones."""
    from spem.stats import no_column

    found = _find(table, USUAL[option] if asked is None else [asked])
    if found is not None:
        return found
    if asked is not None:
        raise ValueError(no_column(asked, list(table)))
    usual, there = USUAL[option][0], ", ".join(table)
    raise ValueError(f"there is no column {usual!r}. Name one with --{option}: {there}.")


def _find(table: pd.DataFrame, names: Sequence[str]) -> str | None:
    """The first of these columns that there is, whatever its capitals."""
    known = {name.lower().replace(" ", "_"): name for name in table} | {
        name: name for name in table
    }
    exact = [name for name in names if name in table]
    return next((known[name] for name in (*exact, *map(str.lower, names)) if name in known), None)


def _is_seed(name: str) -> bool:
    """Whether a column is that of one seed: seed0, Seed 1, run_2, 3."""
    text = name.lower()
    for word in USUAL["pair"]:
        text = text.removeprefix(word)
    return text.strip(" _-").isdigit()


def _number(cell: str, column: str) -> float:
    """The number in a cell: 70.5, 70.5 %, 70,5; an empty one is not a number."""
    text = cell.removesuffix("%").strip()
    if text.lower() in ("", "-", "na", "n/a", "none"):
        return float("nan")
    try:
        return float(text if "." in text else text.replace(",", "."))
    except ValueError:
        raise ValueError(f"{cell!r} in column {column!r} is not a number.") from None
