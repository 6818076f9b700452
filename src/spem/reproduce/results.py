"""From run folders to tidy CSV and to the table of a comparison."""

import hashlib
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spem.reproduce.inference import Compared, PairedTest, against
from spem.reproduce.rows import Row, epoch_rows, mix_rows, run_row, write_table
from spem.reproduce.statistics import Summary, summarise
from spem.training import Result, RunConfig, read_metrics
from spem.training.log import METRICS
from spem.training.runs import finished


@dataclass(frozen=True)
class Run:
    """A finished run: its config, its result, and its epochs as `metrics.jsonl` holds them."""

    config: RunConfig
    result: Result
    epochs: tuple[dict[str, Any], ...]

    @property
    def attention(self) -> str:
        """Canonical text of the attention, "none" for the plain network."""
        return self.config.model.attention

    @property
    def seed(self) -> int:
        """The seed."""
        return self.config.seed

    @property
    def accuracy(self) -> float:
        """Test accuracy after the last epoch, in percent."""
        return self.result.accuracy

    @property
    def curve(self) -> tuple[float, ...]:
        """Test accuracy after every epoch, in percent."""
        return tuple(line["test_accuracy"] for line in self.epochs)


@dataclass(frozen=True)
class Line:
    """One row of a comparison's table; accuracies in percent.

    Args:
        attention: What is compared.
        last: Test accuracy after the last epoch, over seeds.
        best: Test accuracy at each run's best epoch, over seeds.
        best_selected_on: The set on which the best epoch was chosen.
        difference: Paired difference of `last` to the reference; None for the reference itself.
        adjusted_p: Its p after Holm within the table; None where there is no p.
        parameters: Parameters of the network.
        flops: FLOPs of one image, forward.
        step_ms: Median over runs of the time of a training step.
        step_ratio: `step_ms` over that of the reference.
    """

    attention: str
    last: Summary
    best: Summary
    best_selected_on: str
    difference: PairedTest | None
    adjusted_p: float | None
    parameters: int
    flops: int
    step_ms: float
    step_ratio: float | None

    @property
    def compared(self) -> Compared:
        """What the line says of accuracy, as `spem.reproduce.inference` has it."""
        return Compared(self.attention, self.last, self.difference, self.adjusted_p)


def collect(configs: Iterable[RunConfig], runs: Path) -> list[Run]:
    """Read those of the planned runs that have finished, in the order of the plan.

    Raises:
        ValueError: A file of a run is damaged, or a folder holds another run.
    """
    found = [read_run(config, config.folder(runs)) for config in configs]
    return [run for run in found if run is not None]


def read_run(config: RunConfig, folder: Path) -> Run | None:
    """Read a finished run from its folder; None if it has not finished.

    Raises:
        ValueError: A file of the run is damaged, or the folder holds another run.
    """
    result = finished(config, folder)
    return None if result is None else Run(config, result, _epochs_of(result, folder))


def _epochs_of(result: Result, folder: Path) -> tuple[dict[str, Any], ...]:
    """The lines of a finished run's metrics, if they are those its result was made from."""
    path = folder / METRICS
    sum_now = hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None
    if result.metrics_sha256 not in (None, sum_now):
        raise ValueError(
            f"collect: {path} is damaged or missing: its SHA-256 is not that in result.json. "
            f"Delete {folder} to train this run again."
        )
    epochs = tuple(read_metrics(folder))
    if len(epochs) != result.epochs:
        raise ValueError(
            f"collect: {path} holds {len(epochs)} whole lines, its result says {result.epochs} "
            f"epochs. Delete {folder} to train this run again."
        )
    return epochs


def table(runs: Sequence[Run], reference: str) -> list[Line]:
    """One line for each attention, in the order in which they first appear.

    Accuracies are compared as runs.csv writes them, so that `spem stats` finds the same in there.

    Args:
        runs: Finished runs.
        reference: The attention the others are compared with; without its runs nothing is compared.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.attention, []).append(run)
    accuracies = {name: _by_seed(members) for name, members in groups.items()}
    compared = against(accuracies, reference)
    return [_line(one, groups[one.name], groups.get(reference)) for one in compared]


def _line(compared: Compared, members: Sequence[Run], reference: Sequence[Run] | None) -> Line:
    one = members[0].result
    return Line(
        attention=one.attention,
        last=compared.summary,
        best=summarise([run.result.best_accuracy for run in members]),
        best_selected_on=one.best_selected_on,
        difference=compared.test,
        adjusted_p=compared.adjusted_p,
        parameters=one.parameters,
        flops=one.flops,
        step_ms=_step_ms(members),
        step_ratio=None if reference is None else _step_ms(members) / _step_ms(reference),
    )


def _by_seed(runs: Sequence[Run]) -> dict[int, float]:
    return {run.seed: float(f"{run.accuracy:.7g}") for run in runs}


def _step_ms(runs: Sequence[Run]) -> float:
    return 1000 * statistics.median(run.result.step_seconds for run in runs)


def write_csv(
    runs: Sequence[Run], lines: Sequence[Line], out: Path, *, reference: str
) -> list[Path]:
    """Write runs.csv, epochs.csv, mixes.csv (if a mix was learned) and summary.csv.

    Rows of runs are sorted by data set, depth, attention and seed. Columns that depend on the clock
    or the machine begin with `time_` or `host_`; all others of two equal comparisons on one machine
    are the same bytes. Epochs count from 0.

    Args:
        runs: Finished runs.
        lines: Their table.
        out: Folder to write into.
        reference: The attention the others are compared with.

    Returns:
        The files written.
    """
    ordered = sorted(runs, key=lambda r: (r.result.dataset, r.result.depth, r.attention, r.seed))
    contents = {
        "runs.csv": [run_row(run, run.result.id) for run in ordered],
        "epochs.csv": [row for run in ordered for row in epoch_rows(run, run.result.id)],
        "mixes.csv": [row for run in ordered for row in mix_rows(run, run.result.id)],
        "summary.csv": [_summary_row(line, reference) for line in lines],
    }
    out.mkdir(parents=True, exist_ok=True)
    return [out / name for name, rows in contents.items() if write_table(rows, out / name)]


def _summary_row(line: Line, reference: str) -> Row:
    d = line.difference
    return {
        "attention": line.attention,
        "n": line.last.n,
        "accuracy_mean": line.last.mean,
        "accuracy_sd": line.last.sd,
        "best_accuracy_mean": line.best.mean,
        "best_accuracy_sd": line.best.sd,
        "best_selected_on": line.best_selected_on,
        "difference_to": None if d is None else reference,
        "difference_n": None if d is None else d.n,
        "difference_mean": None if d is None else d.mean,
        "difference_sd": None if d is None else d.sd,
        "difference_low95": None if d is None else d.low,
        "difference_high95": None if d is None else d.high,
        "difference_interval": None if d is None else d.interval,
        "difference_p": None if d is None else d.p,
        "difference_holm_p": line.adjusted_p,
        "parameters": line.parameters,
        "flops": line.flops,
        "time_step_ms": line.step_ms,
        "time_step_ratio": line.step_ratio,
    }
