"""From the run folders of a results folder to its tidy tables and its predictions."""

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

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
from spem.training.runs import ANSWERS, GATES, read_config
from spem.training.sets import load_test

RUNS, PREDICTIONS, DIVERGED = "runs", "predictions.npz", "diverged.json"
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class _Found:
    """A run of the plan that has come to an end, in its folder."""

    folder: Path
    config: RunConfig
    run: Run | None
    """None for one that diverged."""

    @property
    def name(self) -> str:
        return name_of(self.config)

    @property
    def order(self) -> tuple[str, int, str, str, int]:
        model, config = self.config.model, self.config
        dataset = Path(config.data.name).name
        return (dataset, model.depth, model.attention, self.name, config.seed)


def gather(out: Path) -> list[Path]:
    """Write the tables and predictions of a results folder from the runs its plan names.

    runs.csv, epochs.csv, mixes.csv, gates.csv, gradients.csv, predictions.npz (see README of a
    results folder in the docs of `spem reproduce`).

    Args:
        out: The results folder; runs lie in `out/runs`.

    Returns:
        The files written.

    Raises:
        FileNotFoundError: There is no plan.
        ValueError: A file of a run is damaged; the message names it.
    """
    found = sorted(_ended(read_plan(out), out / RUNS), key=lambda one: one.order)
    finished = [(one.run, one.name, one.folder) for one in found if one.run is not None]
    tables: dict[str, Iterable[Row]] = {
        "runs.csv": [_run_row(one) for one in found],
        "epochs.csv": (row for run, name, _ in finished for row in epoch_rows(run, name)),
        "mixes.csv": (row for run, name, _ in finished for row in mix_rows(run, name)),
        "gates.csv": (
            row for run, name, folder in finished for row in gate_rows(run, name, _gates(folder))
        ),
        "gradients.csv": (row for run, name, _ in finished for row in gradient_rows(run, name)),
    }
    written = [out / name for name, rows in tables.items() if write_table(rows, out / name)]
    answers = {
        f"{name}-{run.seed}": load_answers(folder / ANSWERS)
        for run, name, folder in finished
        if (folder / ANSWERS).exists()
    }
    if answers:
        labels = _labels([(run, name) for run, name, _ in finished], out)
        write_atomic(out / PREDICTIONS, _npz(answers | labels))
        written.append(out / PREDICTIONS)
    return written


def _ended(plan: Sequence[Planned], runs: Path) -> Iterable[_Found]:
    """Every run of the plan that is finished or has diverged, once."""
    wanted: dict[tuple[str, str], set[int]] = {}
    for row in plan:
        if row.id:
            seeds = wanted.setdefault((row.folder, row.id), set())
            seeds |= {int(seed) for seed in row.seeds.split()}
    for (arm, name), seeds in wanted.items():
        for parent in sorted((runs / arm).glob(f"*-{name.partition('-')[0]}")):
            for seed in sorted(seeds):
                folder = parent / f"seed{seed}"
                config = read_config(folder)
                if config is None:
                    continue
                run = read_run(config, folder)
                if run is not None or (folder / DIVERGED).exists():
                    yield _Found(folder, config, run)


def _run_row(one: _Found) -> Row:
    if one.run is not None:
        return run_row(one.run, one.name)
    remedy = "Delete it to train the run again."
    message = str(load_json(one.folder / DIVERGED, remedy=remedy).get("message", ""))
    return diverged_row(one.config, one.name, message.splitlines()[0] if message else "")


def _gates(folder: Path) -> list[dict[str, Any]]:
    if not (folder / GATES).exists():  # of a run from before they were written down
        return []
    return load_json(folder / GATES, remedy="Delete the run's folder to train it again.")["gates"]


def _labels(runs: Iterable[tuple[Run, str]], out: Path) -> dict[str, Array]:
    """The classes of the test images, under `labels-<id>`, for every configuration.

    They are taken from the predictions written before, where those have them, so that the tables
    can be made again on a machine without the images; where neither is at hand they are left out.
    """
    before = read_predictions(out) if (out / PREDICTIONS).exists() else {}
    known: dict[DataConfig, Array | None] = {}
    labels: dict[str, Array] = {}
    for run, name in runs:
        key = f"labels-{name}"
        data = run.config.data
        if key not in labels and key in before:
            labels[key] = before[key]
        if key in labels:
            continue
        if data not in known:
            known[data] = _load_labels(data)
        classes = known[data]
        if classes is not None:
            labels[key] = classes
    return labels


def _load_labels(data: DataConfig) -> Array | None:
    try:
        labels = load_test(data).labels.numpy()
    except (OSError, ValueError, ImportError):
        return None  # McNemar's test is left out then, and the report says so
    return labels.astype(np.min_scalar_type(int(labels.max())))


def read_predictions(out: Path) -> dict[str, Array]:
    """Read `predictions.npz`: answers under `<id>-<seed>`, classes under `labels-<id>`.

    Raises:
        ValueError: The file is damaged.
    """
    path = out / PREDICTIONS
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except Exception as error:  # zipfile and zlib have their own exception types
        raise ValueError(
            f"reproduce: {path} is damaged ({error}). Delete it and run `spem reproduce` again."
        ) from error


def _npz(arrays: dict[str, Array]) -> bytes:
    content = io.BytesIO()
    ordered: dict[str, Any] = {name: arrays[name] for name in sorted(arrays)}
    np.savez_compressed(content, **ordered)
    return content.getvalue()
