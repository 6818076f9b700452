"""From the run folders of a results folder to its tidy tables and its predictions."""

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from spem.reproduce.agreement import read_predictions
from spem.reproduce.plan_file import Planned, name_of, read_plan
from spem.reproduce.results import Run, read_run
from spem.reproduce.rows import (
    Row,
    diverged_row,
    epoch_rows,
    gate_rows,
    gradient_rows,
    mix_rows,
    run_row,
    write_table,
)
from spem.training.checkpoint import load_answers, load_json, write_atomic
from spem.training.config import DataConfig, RunConfig
from spem.training.diverged import Divergence, read_diverged
from spem.training.log import read_metrics
from spem.training.runs import ANSWERS, GATES, read_config
from spem.training.sets import load_test

RUNS, PREDICTIONS = "runs", "predictions.npz"
Array = np.ndarray[Any, Any]


class Gathered(NamedTuple):
    """What came of gathering.

    Args:
        files: The files written.
        damaged: One sentence for each run folder that could not be read and was left out.
    """

    files: list[Path]
    damaged: list[str]


@dataclass(frozen=True)
class _Ended:
    """A run of the plan that has come to an end, read whole."""

    config: RunConfig
    run: Run | None
    """None for one that diverged."""
    epochs: tuple[dict[str, Any], ...]
    gates: list[dict[str, Any]]
    answers: Array | None
    diverged: Divergence | None

    @property
    def name(self) -> str:
        return name_of(self.config)

    @property
    def order(self) -> tuple[str, int, str, str, int]:
        model, config = self.config.model, self.config
        dataset = Path(config.data.name).name
        return (dataset, model.depth, model.attention, self.name, config.seed)

    def row(self) -> Row:
        """Its row of runs.csv."""
        if self.run is not None:
            return run_row(self.run, self.name)
        # Not the sentence for people: it names folders, and what it says of checkpoints and norms
        # depends on when somebody looked.
        epoch = 0 if self.diverged is None else self.diverged.epoch
        message = f"the loss became infinite or NaN in epoch {epoch}, counted from 0"
        return diverged_row(self.config, self.name, message)


def gather(out: Path) -> Gathered:
    """Write the tables and predictions of a results folder from the runs its plan names.

    runs.csv, epochs.csv, mixes.csv, gates.csv, gradients.csv and predictions.npz. Runs that
    diverged have a row without numbers, and the epochs before. A folder whose files are damaged is
    left out and told; it hides no other run.

    Args:
        out: The results folder; runs lie in `out/runs`.

    Raises:
        FileNotFoundError: There is no plan.
        ValueError: The plan or the predictions of before are damaged.
        OSError: A file cannot be written.
    """
    found, damaged = _ended(read_plan(out), out / RUNS)
    tables: dict[str, Iterable[Row]] = {
        "runs.csv": [one.row() for one in found],
        "epochs.csv": (row for one in found for row in epoch_rows(one, one.name)),
        "mixes.csv": (row for one in found for row in mix_rows(one, one.name)),
        "gates.csv": (row for one in found for row in gate_rows(one, one.name, one.gates)),
        "gradients.csv": (row for one in found for row in gradient_rows(one, one.name)),
    }
    files = [out / name for name, rows in tables.items() if write_table(rows, out / name)]
    answers = {
        f"{one.name}-{one.config.seed}": one.answers for one in found if one.answers is not None
    }
    if answers:
        write_atomic(out / PREDICTIONS, _npz(answers | _labels(found, out)))
        files.append(out / PREDICTIONS)
    else:
        (out / PREDICTIONS).unlink(missing_ok=True)
    return Gathered(files, damaged)


def _ended(plan: Sequence[Planned], runs: Path) -> tuple[list[_Ended], list[str]]:
    """Every run of the plan that is finished or has diverged, once, in the order of tables."""
    wanted: dict[tuple[str, str], set[int]] = {}
    for row in plan:
        if row.id:
            seeds = wanted.setdefault((row.folder, row.id), set())
            seeds |= {int(seed) for seed in row.seeds.split()}
    found: list[_Ended] = []
    damaged: list[str] = []
    for (arm, name), seeds in wanted.items():
        for parent in sorted((runs / arm).glob(f"*-{name.partition('-')[0]}")):
            for seed in sorted(seeds):
                try:
                    one = _read(parent / f"seed{seed}")
                except (ValueError, OSError) as error:
                    damaged.append(str(error))
                else:
                    found += [] if one is None else [one]
    return sorted(found, key=lambda one: one.order), damaged


def _read(folder: Path) -> _Ended | None:
    """Read all of a run's files; None if it has not come to an end."""
    config = read_config(folder)
    if config is None:
        return None
    run = read_run(config, folder)
    if run is None:
        diverged = read_diverged(config, folder)
        epochs = tuple(read_metrics(folder))
        return None if diverged is None else _Ended(config, None, epochs, [], None, diverged)
    answers = load_answers(folder / ANSWERS) if (folder / ANSWERS).exists() else None
    return _Ended(config, run, run.epochs, _gates(folder), answers, None)


def _gates(folder: Path) -> list[dict[str, Any]]:
    if not (folder / GATES).exists():  # of a run from before they were written down
        return []
    return load_json(folder / GATES, remedy="Delete the run's folder to train it again.")["gates"]


def _labels(found: Iterable[_Ended], out: Path) -> dict[str, Array]:
    """The classes of the test images, under `labels-<id>`, for every configuration.

    They are taken from the predictions written before, where those have them, so that the tables
    can be made again on a machine without the images; where neither is at hand they are left out.
    """
    path = out / PREDICTIONS
    before = read_predictions(path).labels if path.exists() else {}
    known: dict[DataConfig, Array | None] = {}
    labels: dict[str, Array] = {}
    for one in found:
        key, data = f"labels-{one.name}", one.config.data
        if one.answers is None or key in labels:
            continue
        if one.name not in before and data not in known:
            known[data] = _load_labels(data)
        classes = before.get(one.name, known.get(data))
        if classes is not None:
            labels[key] = classes
    return labels


def _load_labels(data: DataConfig) -> Array | None:
    try:
        labels = load_test(data).labels.numpy()
    except (OSError, ValueError, ImportError):
        return None  # McNemar's test is left out then, and the report says so
    return labels.astype(np.min_scalar_type(int(labels.max())))


def _npz(arrays: dict[str, Array]) -> bytes:
    content = io.BytesIO()
    ordered: dict[str, Any] = {name: arrays[name] for name in sorted(arrays)}
    np.savez_compressed(content, **ordered)
    return content.getvalue()
