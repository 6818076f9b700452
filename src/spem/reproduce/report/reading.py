"""Reads the CSV files of a results folder; a damaged one is named with its line and a remedy."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from spem.reproduce.agreement import Predictions, read_predictions

AGAIN = "Run `spem reproduce` on this folder again: it writes the file anew from the runs."
SIZES = {"cifar10": (50_000, 10_000), "cifar100": (50_000, 10_000)}
"""Training and test images of a whole set."""
COPY_OF_CIFAR10 = "c6c82dd55698c5e9b34539deaf04c87e44798a9c8b72fafb723e0e6fabac4d84"
"""Checksum of the pixels and labels of a test set of which 23 images are JPEG copies."""
NEEDED = ("epochs", "accuracy", "best_accuracy", "best_selected_on", "parameters", "flops")
"""What every finished run has."""
MACHINE = ("host_commit", "host_hardware", "host_step")
"""Columns `host_...` that are not the version of a package."""


@dataclass(frozen=True)
class Planned:
    """A row of plan.csv: one cell of an experiment, beside what the paper prints there."""

    experiment: str
    row: str
    data: str
    dataset: str
    depth: int | None
    attention: str
    id: str
    seeds: tuple[int, ...]
    reference: str
    paper_row: str
    paper_depth: int | None
    paper_parameters_millions: float | None
    paper_top1: float | None
    note: str
    scale: str = ""


@dataclass(frozen=True)
class RunRow:
    """A row of runs.csv.

    What a run that diverged lacks is None or empty. `train_images` and `test_images` are limits,
    None where there is none.
    """

    dataset: str
    depth: int
    attention: str
    seed: int
    id: str
    status: str
    train_images: int | None
    test_images: int | None
    batch: int
    branch_start: float | None
    penalty: float | None
    precision: str
    impl: str
    message: str
    epochs: int | None = None
    accuracy: float | None = None
    best_accuracy: float | None = None
    best_epoch: int | None = None
    best_selected_on: str = ""
    parameters: int | None = None
    flops: int | None = None
    test_sha256: str = ""
    time_train_seconds: float | None = None
    time_evaluation_seconds: float | None = None
    time_step_ms: float | None = None
    host_hardware: str = ""
    host_commit: str = ""
    versions: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def key(self) -> str:
        """What is unique to a run of a folder; also the anchor of its line in the appendix."""
        return f"{self.id}-{self.seed}"

    @property
    def is_copy(self) -> bool:
        """Whether some of its images are known to differ from the official set's."""
        return self.test_sha256 == COPY_OF_CIFAR10

    @property
    def composed(self) -> bool:
        """Whether it ran in float32 with torch's own operations: a paper table takes no other."""
        return self.precision == "fp32" and self.impl in ("", "reference", "formula")

    @property
    def train_count(self) -> int | None:
        """Number of training images; None if it is not known."""
        return self.train_images or SIZES.get(self.dataset, (None, None))[0]

    @property
    def test_count(self) -> int | None:
        """Number of test images; None if it is not known."""
        return self.test_images or SIZES.get(self.dataset, (None, None))[1]

    @property
    def finished(self) -> bool:
        """Whether it has a result."""
        return self.status == "finished"


@dataclass(frozen=True)
class EpochRow:
    """A row of epochs.csv."""

    seed: int
    id: str
    epoch: int
    loss: float | None
    penalty: float | None
    test_accuracy: float | None


@dataclass(frozen=True)
class MixRow:
    """A row of mixes.csv."""

    seed: int
    id: str
    epoch: int
    mix: str
    lam: float | None = field(metadata={"column": "lambda"})
    magnitude: float | None
    change: float | None


@dataclass(frozen=True)
class GateRow:
    """A row of gates.csv."""

    seed: int
    id: str
    block: str
    index: int
    mean: float
    q05: float
    q25: float
    q50: float
    q75: float
    q95: float
    sd_channels: float
    sd_images: float


@dataclass(frozen=True)
class GradientRow:
    """A row of gradients.csv."""

    seed: int
    id: str
    epoch: int
    block: str
    index: int
    norm: float | None


@dataclass(frozen=True)
class Folder:
    """What a results folder holds."""

    plan: tuple[Planned, ...]
    runs: tuple[RunRow, ...]
    epochs: tuple[EpochRow, ...]
    mixes: tuple[MixRow, ...]
    gates: tuple[GateRow, ...]
    gradients: tuple[GradientRow, ...]
    predictions: Predictions

    @cached_property
    def by_id(self) -> Mapping[str, tuple[RunRow, ...]]:
        """The runs of each config id."""
        found: dict[str, list[RunRow]] = {}
        for run in self.runs:
            found.setdefault(run.id, []).append(run)
        return {key: tuple(runs) for key, runs in found.items()}


def read_folder(out: Path) -> Folder:
    """Read what `spem reproduce` collected in a folder.

    Raises:
        ValueError: There is no plan.csv, or a file is damaged; the message names file and line.
    """
    if not (out / "plan.csv").exists():
        raise ValueError(
            f"report: {out / 'plan.csv'} does not exist, so nothing says what belongs into the "
            "report. Name the folder that `spem reproduce ... --results` wrote."
        )
    plan = tuple(_rows(out / "plan.csv", Planned))
    if not plan:
        raise ValueError(f"report: {out / 'plan.csv'} holds no rows. {AGAIN}")
    return Folder(
        plan,
        tuple(_checked_runs(out / "runs.csv")),
        tuple(_rows(out / "epochs.csv", EpochRow)),
        tuple(_rows(out / "mixes.csv", MixRow)),
        tuple(_rows(out / "gates.csv", GateRow)),
        tuple(_rows(out / "gradients.csv", GradientRow)),
        _predictions(out / "predictions.npz"),
    )


def _checked_runs(path: Path) -> Iterator[RunRow]:
    """The runs, each with the numbers that its status promises."""
    for line, cells, run in _pairs(path, RunRow):
        if run.status not in ("finished", "diverged"):
            raise _damaged(path, line, f"status {run.status!r} is neither finished nor diverged")
        for name in NEEDED if run.finished else ():
            if name not in cells:
                raise _damaged(path, 1, f"the column {name} is missing")
            if not cells[name]:
                raise _damaged(path, line, f"column {name} is empty for a finished run")
            if getattr(run, name) is None:
                raise _damaged(path, line, f"column {name} is no finite number")
        versions = {
            name.removeprefix("host_"): cells[name]
            for name in sorted(cells)
            if name.startswith("host_") and name not in MACHINE and cells[name]
        }
        yield dataclasses.replace(run, versions=versions)


T = TypeVar("T")


def _rows(path: Path, kind: type[T]) -> Iterator[T]:
    return (row for _, _, row in _pairs(path, kind))


def _pairs(path: Path, kind: type[T]) -> Iterator[tuple[int, dict[str, str], T]]:
    """Line, cells and dataclass of each row of a CSV file; nothing for a missing file."""
    if not path.exists():
        return
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"report: {path} is no UTF-8 text ({error.reason}). {AGAIN}") from error
    reader = csv.reader(io.StringIO(text, newline=""))
    header = next(reader, [])
    columns = _columns(path, kind, header)
    for cells in reader:
        line = reader.line_num
        if len(cells) != len(header):
            finding = f"{len(cells)} cells stand under {len(header)} headings"
            raise _damaged(path, line, finding)
        named = dict(zip(header, cells, strict=True))
        values = {
            name: _value(path, line, column, named[column], wanted)
            for name, (column, wanted) in columns.items()
        }
        yield line, named, kind(**values)


def _columns(path: Path, kind: type[Any], header: list[str]) -> dict[str, tuple[str, str]]:
    """Field -> (column, type as written in the class), of the fields that the file has."""
    found: dict[str, tuple[str, str]] = {}
    for one in dataclasses.fields(kind):
        column = str(one.metadata.get("column", one.name))
        if column in header:
            found[one.name] = (column, str(one.type))
        elif one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING:
            raise _damaged(path, 1, f"the column {column} is missing")
    return found


def _value(path: Path, line: int, column: str, cell: str, wanted: str) -> Any:
    """A cell as the type its field declares."""
    if wanted == "str":
        return cell
    if wanted.startswith("tuple"):
        if not re.fullmatch(r"(\d+( \d+)*)?", cell):
            raise _damaged(path, line, f"column {column} holds {cell!r}, which is no list of seeds")
        return tuple(int(part) for part in cell.split())
    if not cell and "None" in wanted:
        return None
    whole = wanted.startswith("int")
    try:
        number = float(cell)
        if math.isfinite(number) and (not whole or number == int(number)):
            return int(number) if whole else number
    except ValueError:
        number = None
    if number is not None and not whole and "None" in wanted:
        return None  # infinite or NaN: the last numbers of a run that diverged
    what = "whole number" if whole else "number"
    raise _damaged(path, line, f"column {column} holds {cell!r}, which is no {what}")


def _predictions(path: Path) -> Predictions:
    """The stored answers; none if there is no such file."""
    return read_predictions(path) if path.exists() else Predictions({}, {})


def _damaged(path: Path, line: int, finding: str) -> ValueError:
    return ValueError(f"report: {path}, line {line}: {finding}. {AGAIN}")
