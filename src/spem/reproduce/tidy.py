"""Anybody's results: a tidy CSV with one run a row, into tables of groups with paired runs."""

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from spem.reproduce.inference import Compared, Equivalence, against, equivalence

BY = ("attention", "model", "module", "method", "variant", "name", "group")
VALUE = ("accuracy", "test_accuracy", "acc", "top1", "score", "value")
PAIR = ("seed", "run", "fold", "split", "repeat", "subject")
WITHIN = ("dataset", "depth")
SETTINGS = (
    "epochs",
    "train_images",
    "test_images",
    "batch",
    "precision",
    "impl",
    "branch_start",
    "penalty",
    "train_sha256",
    "test_sha256",
)
"""Columns of runs.csv that compared runs should have in common unless they are what is compared."""


@dataclass(frozen=True)
class Rows:
    """A CSV file: its columns, and of each row the line it stands on and its cells by column."""

    path: Path
    columns: tuple[str, ...]
    rows: tuple[tuple[int, Mapping[str, str]], ...]


@dataclass(frozen=True)
class Question:
    """Which columns are meant.

    Args:
        by: The columns that name a group; their cells are joined.
        value: The number compared.
        pair: What makes two rows a pair, such as the seed.
        within: Columns that split the file into tables of their own.
        notes: What was guessed, in sentences.
    """

    by: tuple[str, ...]
    value: str
    pair: str
    within: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Part:
    """One table: groups of runs that may be compared with one another.

    Args:
        within: The cells of the columns that split the file.
        groups: Name of a group -> pair -> number, in the order of the file.
        notes: Missing pairs and settings that differ, in sentences.
    """

    within: Mapping[str, str]
    groups: Mapping[str, Mapping[str, float]]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    """One table with its statistics.

    Args:
        part: The runs.
        baseline: The group the others are compared with.
        lines: A row for each group, the baseline first.
        equivalences: Group -> two one-sided tests; empty where no margin was given.
    """

    part: Part
    baseline: str
    lines: tuple[Compared, ...]
    equivalences: Mapping[str, Equivalence] = field(default_factory=dict[str, Equivalence])


def read_rows(path: Path) -> Rows:
    """Read a CSV file with a heading, separated by commas, semicolons or tabs.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is empty, no table, or no UTF-8 text.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            heading = file.readline()
            file.seek(0)
            separator = max(",;\t", key=heading.count)
            reader = csv.reader(file, delimiter=separator, strict=True)
            lines = [(reader.line_num, cells) for cells in reader if cells]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text. Pass a CSV file.") from error
    except csv.Error as error:
        raise ValueError(f"{path} is no CSV file that can be read: {error}.") from error
    if not lines:
        raise ValueError(f"{path} is empty. Pass a CSV file with a heading and one run a row.")
    columns = tuple(cell.strip() for cell in lines[0][1])
    if len(set(columns)) < len(columns):
        twice = next(name for name in columns if columns.count(name) > 1)
        raise ValueError(f"{path} has two columns named {twice!r}. Rename one.")
    if len(lines) == 1:
        raise ValueError(f"{path} has a heading and no rows. Pass a file with one run a row.")
    for number, cells in lines[1:]:
        if len(cells) != len(columns):
            raise ValueError(
                f"{path}, line {number}: {len(cells)} cells under {len(columns)} columns. "
                "Correct this line."
            )
    rows = tuple(
        (number, dict(zip(columns, (cell.strip() for cell in cells), strict=True)))
        for number, cells in lines[1:]
    )
    return Rows(path, columns, rows)


def ask(
    rows: Rows,
    *,
    by: Sequence[str] = (),
    value: str | None = None,
    pair: str | None = None,
    within: Sequence[str] | None = None,
) -> Question:
    """The columns meant: those named, else those of runs.csv, else the one usual name there is.

    Raises:
        ValueError: A column does not exist, or none was named and none can be guessed.
    """
    notes: list[str] = []
    chosen = {
        "by": tuple(by) or (_guess(rows, "by", BY, notes),),
        "value": (value or _guess(rows, "value", VALUE, notes),),
        "pair": (pair or _guess(rows, "pair", PAIR, notes),),
    }
    taken = {name for names in chosen.values() for name in names}
    if within is None:
        within = [name for name in WITHIN if name in rows.columns and name not in taken]
    chosen["within"] = tuple(within)
    seen: dict[str, str] = {}
    for option, names in chosen.items():
        for name in names:
            if name not in rows.columns:
                raise ValueError(f"{rows.path}: {_no_column(name, rows.columns)}")
            if name in seen:
                raise ValueError(
                    f"column {name!r} is named by --{seen[name]} and by --{option}. Each column "
                    "has one meaning."
                )
            seen[name] = option
    return Question(
        chosen["by"], chosen["value"][0], chosen["pair"][0], chosen["within"], tuple(notes)
    )


def _guess(rows: Rows, option: str, usual: Sequence[str], notes: list[str]) -> str:
    """The first usual name among the columns; a name other than that of runs.csv is told."""
    for name in usual:
        if name in rows.columns:
            if name != usual[0]:
                notes.append(f"--{option} was not given: {name} is taken.")
            return name
    raise ValueError(
        f"{rows.path} has no column {usual[0]!r}. Name one with --{option}: "
        f"{', '.join(rows.columns)}."
    )


def _no_column(name: str, columns: Sequence[str]) -> str:
    nearest = get_close_matches(name, columns, n=3, cutoff=0.5)
    hint = f" Nearest: {', '.join(nearest)}." if nearest else ""
    return f"no column {name!r}.{hint} Columns: {', '.join(columns)}."


def split(rows: Rows, question: Question) -> tuple[list[Part], list[str]]:
    """The tables of a file, and a sentence for each kind of rows that is left out.

    Rows without a finite number, and rows whose group or pair is empty, are left out and counted.

    Raises:
        ValueError: A cell is no number, a pair occurs twice in a group, or no row is left.
    """
    parts: dict[tuple[str, ...], dict[str, dict[str, tuple[int, float]]]] = {}
    empty: list[str] = []
    nameless: list[int] = []
    cells = dict(rows.rows)
    for line, row in rows.rows:
        name = group_name(row, question.by)
        number = _number(row[question.value], rows.path, line, question.value)
        if not row[question.by[0]] or not row[question.pair]:
            nameless.append(line)
        elif not math.isfinite(number):
            empty.append(f"{name}, {question.pair} {row[question.pair]}")
        else:
            key = tuple(row[column] for column in question.within)
            members = parts.setdefault(key, {}).setdefault(name, {})
            if row[question.pair] in members:
                other = members[row[question.pair]][0]
                raise ValueError(_twice(rows, question, other, line))
            members[row[question.pair]] = line, number
    if not parts:
        raise ValueError(
            f"{rows.path}: no row holds a number in {question.value!r} and a name in "
            f"{question.by[0]!r} and {question.pair!r}."
        )
    told: list[str] = []
    if empty:
        shown = "; ".join(empty[:5]) + (" ..." if len(empty) > 5 else "")
        told.append(
            f"{_rows_of(len(empty), rows)} left out, no finite {question.value}: {shown}. "
            "If those runs diverged, the means of their groups flatter."
        )
    if nameless:
        shown = ", ".join(map(str, nameless[:5])) + (" ..." if len(nameless) > 5 else "")
        told.append(
            f"{_rows_of(len(nameless), rows)} left out, no {question.by[0]} or no "
            f"{question.pair}: line {shown}."
        )
    found = [
        Part(
            dict(zip(question.within, key, strict=True)),
            {
                name: {label: number for label, (_, number) in members.items()}
                for name, members in groups.items()
            },
            (
                *_missing(groups, question.pair),
                *_unlike(
                    [cells[line] for members in groups.values() for line, _ in members.values()],
                    question,
                ),
            ),
        )
        for key, groups in parts.items()
    ]
    return found, told


def group_name(row: Mapping[str, str], by: Sequence[str]) -> str:
    """The name of a row's group: the first cell, then the others with the names of their columns.

    >>> group_name({"attention": "se", "penalty": "0.1"}, ["attention", "penalty"])
    'se, penalty=0.1'
    """
    first, *others = by
    return ", ".join([row[first], *(f"{column}={row[column] or '-'}" for column in others)])


def _number(text: str, path: Path, line: int, column: str) -> float:
    """The number in a cell; an empty one is not a number."""
    try:
        return float(text or "nan")
    except ValueError:
        raise ValueError(
            f"{path}, line {line}: {text!r} in column {column!r} is not a number."
        ) from None


def _rows_of(count: int, rows: Rows) -> str:
    return f"{count} of {len(rows.rows)} rows {'is' if count == 1 else 'are'}"


def _twice(rows: Rows, question: Question, one: int, other: int) -> str:
    """The sentence for two rows with the same group and pair, with what could tell them apart."""
    cells = dict(rows.rows)
    a, b = cells[one], cells[other]
    used = {*question.by, question.value, question.pair, *question.within}
    # What is different in nearly every row is a result, not a setting.
    apart = [
        column
        for column in rows.columns
        if a[column] != b[column]
        and column not in used
        and not column.startswith(("time_", "host_"))
        and len({row[column] for _, row in rows.rows}) <= max(2, len(rows.rows) // 2)
    ]
    what = (
        f"{group_name(a, question.by)} with {question.pair} {a[question.pair]} stands on line "
        f"{one} and on line {other}"
    )
    if not apart:
        return f"{rows.path}: {what}. Remove one, or name the column that tells them apart."
    columns = ", ".join(apart[:5])
    by = " ".join((*question.by, apart[0]))
    return (
        f"{rows.path}: {what}. They differ in {columns}: compare along one of them too "
        f"(--by {by}) or split by it (--within {' '.join((*question.within, apart[0]))})."
    )


def _missing(groups: Mapping[str, Mapping[str, object]], pair: str) -> Iterable[str]:
    labels = dict.fromkeys(label for members in groups.values() for label in members)
    for name, members in groups.items():
        lacking = [label for label in labels if label not in members]
        if lacking:
            yield f"{name} has no {pair} {', '.join(lacking)}; it is compared without."


def _unlike(rows: Sequence[Mapping[str, str]], question: Question) -> Iterable[str]:
    for column in SETTINGS:
        if column in question.by or column not in rows[0]:
            continue
        found = list(dict.fromkeys(row[column] or "-" for row in rows))
        if len(found) > 1:
            shown = ", ".join(text[:12] for text in found[:5])
            yield (
                f"Not all runs compared here have the same {column} ({shown}): a difference can "
                "be due to it."
            )


def answer(
    parts: Sequence[Part],
    *,
    baseline: str | None = None,
    margin: float | None = None,
    level: float = 0.95,
) -> list[Answer]:
    """The statistics of each table.

    Args:
        parts: The tables.
        baseline: A group; its first cell is enough where it names one group alone. None takes
            "none" where there is such a group and the first of each table where not.
        margin: Also test whether differences are smaller than this.
        level: Level of the intervals.

    Raises:
        ValueError: No table has such a baseline, or several groups answer to its name.
    """
    if baseline is not None and not any(_named(part, baseline) for part in parts):
        names = list(dict.fromkeys(name for part in parts for name in part.groups))
        nearest = get_close_matches(baseline, names, n=3, cutoff=0.5)
        hint = f" Nearest: {', '.join(nearest)}." if nearest else ""
        raise ValueError(f"no group {baseline!r} for --baseline.{hint} Groups: {', '.join(names)}.")
    return [_answer(part, baseline, margin, level) for part in parts]


def _named(part: Part, baseline: str) -> list[str]:
    """The groups that a name stands for: the one of that name, else those it begins."""
    if baseline in part.groups:
        return [baseline]
    return [name for name in part.groups if name.startswith(f"{baseline}, ")]


def _answer(part: Part, baseline: str | None, margin: float | None, level: float) -> Answer:
    found = _named(part, "none" if baseline is None else baseline)
    if baseline is None:
        reference = (found or list(part.groups))[0]
    elif len(found) > 1:
        raise ValueError(
            f"--baseline {baseline!r} stands for several groups: {'; '.join(found)}. Name one."
        )
    else:
        reference = found[0] if found else baseline
    labels = dict.fromkeys(label for members in part.groups.values() for label in members)
    index = {label: i for i, label in enumerate(labels)}
    groups = {
        name: {index[label]: number for label, number in part.groups[name].items()}
        for name in sorted(part.groups, key=lambda name: name != reference)
    }
    equivalences: dict[str, Equivalence] = {}
    if margin is not None and reference in groups:
        equivalences = {
            name: equivalence(numbers, groups[reference], margin)
            for name, numbers in groups.items()
            if name != reference
        }
    return Answer(part, reference, tuple(against(groups, reference, level)), equivalences)
