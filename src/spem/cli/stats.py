"""`spem stats`: paired statistics of any results in a CSV file."""

from __future__ import annotations

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
    note = f"{left} of {len(rows)} rows have no number or no name and are left out."
    notes = [note] if left else []
    parts = table.groupby(split_by, sort=False, dropna=False) if split_by else [((), table)]
    tables = [(dict(zip(split_by, key, strict=True)), part) for key, part in parts]
    if json:
        found = [
            {
                "within": where,
                "groups": records(part.drop(columns=split_by)),
                "reading": _reading(chosen, part),
            }
            for where, part in tables
        ]
        print_json({"file": str(file), **chosen, "notes": notes, "tables": found})
        return
    split = f", within {' and '.join(split_by)}" if split_by else ""
    named_by = " and ".join(chosen["by"])
    print(
        plain(f"{chosen['value']} by {named_by}, paired by {chosen['pair']}{split}."),
        *notes,
        sep="\n",
    )
    for where, part in tables:
        print()
        _print(chosen, where, part, level)


def _print(chosen: dict[str, Any], where: dict[str, Any], part: pd.DataFrame, level: float) -> None:
    from spem.stats import p_text

    decimals = _decimals(part)
    columns = [chosen["by"][0], "n", "mean", "sd", "pairs", f"to {part['baseline'].iloc[0]}"]
    columns += [f"{100 * level:g} % interval", "p", "sign-flip p", "Holm p", "verdict"]
    rows: list[list[str]] = []
    for line in part.to_dict("records"):
        own = line["group"] == line["baseline"]
        low, high = (_text(line[name], decimals, sign=True) for name in ("low", "high"))
        numbers = [_text(line[name], decimals) for name in ("mean", "sd")]
        difference = _text(line["difference"], decimals, sign=True)
        cells = [line["group"], str(line["n"]), *numbers, "" if own else str(line["pairs"])]
        cells += [difference, f"[{low}, {high}]" if low else ""]
        p = [p_text(line[name]) for name in ("p", "p_flip", "p_holm")]
        rows.append([*cells, *p, line["verdict"]])
    title = plain(", ".join(f"{name}={cell}" for name, cell in where.items()))
    print_table(columns, rows, title=title)
    for text in _reading(chosen, part):
        print(plain(text))


def _reading(chosen: dict[str, Any], part: pd.DataFrame) -> list[str]:
    """What a table shows and what it does not, a sentence for each comparison."""
    from spem.stats import REFERENCE, sentence

    percent = "acc" in chosen["value"].lower() and part["mean"].abs().max() > 1.5
    words: Any = {"unit": "points" if percent else "", "pair": chosen["pair"]}
    lines = part[part["verdict"] != REFERENCE].to_dict("records")
    found = [sentence(line, decimals=_decimals(part), **words) for line in lines]
    return found or ["There is one group only: nothing is compared."]


def _decimals(part: pd.DataFrame) -> int:
    return decimals_for([s for s in (*part["sd"], *part["difference_sd"]) if s == s])


def _text(value: float, decimals: int, *, sign: bool = False) -> str:
    """A number in so many decimals, or by its digits where it is very large or very small."""
    if value != value:
        return ""
    usual = value == 0 or 1e-9 <= abs(value) < 1e12
    return f"{value:{'+' if sign else ''}{f'.{decimals}f' if usual else '.6g'}}"


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
        with Path(path).open(encoding="utf-8-sig") as file:
            separator = max(",;\t", key=file.readline().count)
        texts: Any = {"dtype": str, "keep_default_na": False, "encoding": "utf-8-sig"}
        table = pd.read_csv(path, sep=separator, skipinitialspace=True, index_col=False, **texts)
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
    by = [_column(table, "by", name) for name in by or (None,)]
    within = within if within is None else [_column(table, "within", name) for name in within]
    named = {*by, value, pair, *(within or ())}
    seeds = [name for name in table.columns if _is_seed(name) and name not in named]
    if value is None and pair is None and len(seeds) > 1 and not _find(table, USUAL["value"]):
        kept = [name for name in table.columns if name not in seeds]
        table = table.melt(kept, seeds, var_name="seed", value_name="value")
    chosen_value, chosen_pair = _column(table, "value", value), _column(table, "pair", pair)
    if within is None:
        usual = filter(None, (_find(table, [name]) for name in WITHIN))
        within = [name for name in usual if name not in (*by, chosen_value, chosen_pair)]
    chosen = {"by": by, "value": chosen_value, "pair": chosen_pair, "within": within}
    taken = [*by, chosen_value, chosen_pair, *within]
    if len(set(taken)) < len(taken):
        raise ValueError(f"each column has one meaning, but {chosen} name one of them twice.")
    numbers = [_number(cell, chosen_value) for cell in table[chosen_value]]
    return table.assign(**{chosen_value: numbers}), chosen


def _column(table: pd.DataFrame, option: str, asked: str | None) -> str:
    """The column that is asked for, or else one of the usual ones."""
    from spem.stats import no_column

    found = _find(table, USUAL[option] if asked is None else [asked])
    if found is None and asked is not None:
        raise ValueError(no_column(asked, list(table.columns)))
    if found is None:
        there = ", ".join(map(str, table.columns))
        usual = USUAL[option][0]
        raise ValueError(f"there is no column {usual!r}. Name one with --{option}: {there}.")
    return found


def _find(table: pd.DataFrame, names: Sequence[str]) -> str | None:
    """The first of these columns that there is, whatever its capitals."""
    lower = {column.lower().replace(" ", "_"): column for column in map(str, table.columns)}
    known = lower | {column: column for column in map(str, table.columns)}
    exact = [name for name in names if name in table.columns]
    return next((known[n] for n in (*exact, *map(str.lower, names)) if n in known), None)


def _is_seed(name: str) -> bool:
    """Whether a column is that of one seed: seed0, seed 1, run_2, 3.

    >>> [name for name in ("seed0", "Seed 1", "run_2", "3", "top1", "depth") if _is_seed(name)]
    ['seed0', 'Seed 1', 'run_2', '3']
    """
    text = name.lower()
    for word in USUAL["pair"]:
        text = text.removeprefix(word)
    return text.strip(" _-").isdigit()


def _number(cell: Any, column: str) -> float:
    """The number in a cell: 70.5, 70.5 %, 70,5; an empty one is not a number."""
    text = str(cell).strip().removesuffix("%").strip()
    if text.lower() in ("", "-", "na", "n/a", "none"):
        return float("nan")
    try:
        return float(text if "." in text else text.replace(",", "."))
    except ValueError:
        raise ValueError(f"{cell!r} in column {column!r} is not a number.") from None
