"""Finished runs as rows of tidy tables, and tables as CSV.

Rows are sorted by data set, depth, attention, id and seed. Columns that depend on the clock or the
machine begin with `time_` or `host_`; all others are the same bytes however often a run was
interrupted. Epochs and blocks count from 0.
"""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from spem.training import Result, RunConfig
from spem.training.checkpoint import write_atomic

if TYPE_CHECKING:
    from spem.reproduce.results import Run

Cell = str | int | float | None
Row = Mapping[str, Cell]


class Trained(Protocol):
    """A run with the epochs it has behind it, whatever it ended in."""

    @property
    def config(self) -> RunConfig:
        """What was trained."""
        ...

    @property
    def epochs(self) -> tuple[dict[str, Any], ...]:
        """The lines of its `metrics.jsonl`."""
        ...


def run_key(config: RunConfig, name: str) -> dict[str, Cell]:
    """The columns that name a run; `name` is its id as this table writes it."""
    return {
        "dataset": Path(config.data.name).name,
        "depth": config.model.depth,
        "attention": config.model.attention,
        "seed": config.seed,
        "id": name,
    }


def run_row(run: "Run", name: str) -> Row:
    """A finished run in one row."""
    result, config = run.result, run.config
    return {
        **run_key(config, name),
        "status": "finished",
        "epochs": result.epochs,
        "steps": result.steps,
        **_settings(config),
        "accuracy": result.accuracy,
        "loss": result.loss,
        "train_accuracy": result.train_accuracy,
        "train_loss": result.train_loss,
        "validation_accuracy": result.validation_accuracy,
        "best_accuracy": result.best_accuracy,
        "best_epoch": result.best_epoch,
        "best_selected_on": result.best_selected_on,
        "parameters": result.parameters,
        "attention_parameters": result.attention_parameters,
        "flops": result.flops,
        "train_sha256": result.train_sha256,
        "test_sha256": result.test_sha256,
        "message": None,
        "time_train_seconds": result.train_seconds,
        "time_evaluation_seconds": result.evaluation_seconds,
        "time_step_ms": 1000 * result.step_seconds,
        "time_images_per_second": result.images_per_second,
        "time_date": result.date,
        **_host(result),
    }


def diverged_row(config: RunConfig, name: str, message: str) -> Row:
    """A run whose loss became infinite or NaN, in the columns of `run_row`."""
    key = run_key(config, name)
    return {**key, "status": "diverged", **_settings(config), "message": message}


def _settings(config: RunConfig) -> dict[str, Cell]:
    return {
        "train_images": config.data.limit,
        "test_images": config.data.test_limit,
        "batch": config.optim.batch,
        "branch_start": config.model.branch_start,
        "penalty": config.optim.penalty,
        "precision": config.runtime.precision,
        "impl": config.runtime.impl,
    }


def _host(result: Result) -> dict[str, Cell]:
    return {
        "host_commit": result.commit,
        "host_hardware": result.hardware,
        "host_step": result.step,
        **{f"host_{name}": number for name, number in sorted(result.versions.items())},
    }


def epoch_rows(run: Trained, name: str) -> Iterable[Row]:
    """A row for each epoch of a run."""
    for line in run.epochs:
        numbers = {_column(k): v for k, v in line.items() if not isinstance(v, (dict, list))}
        ordered = dict(sorted(numbers.items(), key=lambda item: is_machine(item[0])))
        yield {**run_key(run.config, name), **ordered}


def mix_rows(run: Trained, name: str) -> Iterable[Row]:
    """A row for each epoch and learned mix of a run."""
    for line in run.epochs:
        for mix, numbers in line["mixes"].items():
            yield {**run_key(run.config, name), "epoch": line["epoch"], "mix": mix, **numbers}


def gradient_rows(run: Trained, name: str) -> Iterable[Row]:
    """A row for each epoch and block: the gradient norm at the epoch's last step."""
    for line in run.epochs:
        # Runs of the first versions did not write it down.
        for index, (block, norm) in enumerate(line.get("gradients", {}).items()):
            place = {"epoch": line["epoch"], "block": block, "index": index}
            yield {**run_key(run.config, name), **place, "norm": norm}


def gate_rows(run: Trained, name: str, gates: Sequence[Mapping[str, Any]]) -> Iterable[Row]:
    """A row for each block of a run that has a gate (see `spem.training.inside`)."""
    for index, gate in enumerate(gates):
        key = run_key(run.config, name)
        yield {**key, "block": gate["block"], "index": index, **dict(gate)}


def write_table(rows: Iterable[Row], path: Path) -> bool:
    """Write a CSV file, atomically; without rows, remove what an earlier table left there.

    Returns:
        Whether there is a table now.
    """
    rows = list(rows)
    if rows:
        write_atomic(path, csv_text(rows).encode())
    else:
        path.unlink(missing_ok=True)
    return bool(rows)


def csv_text(rows: Sequence[Row]) -> str:
    """Rows as CSV; columns in the order in which they first appear, None as the empty cell."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([_text(row.get(column)) for column in columns])
    return text.getvalue()


def is_machine(column: str) -> bool:
    """Whether a column depends on the clock or the machine."""
    return column.startswith(("time_", "host_"))


def _column(name: str) -> str:
    """A metric's name as a column; what depends on the clock or the machine says so in front."""
    if "second" in name:
        return f"time_{name}"
    return f"host_{name}" if "memory" in name else name


def _text(cell: Cell) -> str:
    if cell is None:
        return ""
    return f"{cell:.7g}" if isinstance(cell, float) else str(cell)
