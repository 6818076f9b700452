"""What came out of a run: `result.json`, written last of all."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import statistics
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spem.attention import attention_parameters
from spem.training.checkpoint import load_json, save_json
from spem.training.config import RunConfig
from spem.training.environment import commit, hardware, versions
from spem.training.log import METRICS
from spem.training.sets import Sets

RESULT = "result.json"


@dataclass(frozen=True)
class Result:
    """What `result.json` holds; accuracies are percent, times seconds.

    `accuracy` and `loss` are those of the last epoch on the test set. `best_accuracy` is the test
    accuracy of `best_epoch`, which was selected on the set named by `best_selected_on`.
    """

    id: str
    seed: int
    dataset: str
    depth: int
    attention: str
    epochs: int
    accuracy: float
    loss: float
    train_accuracy: float
    train_loss: float
    validation_accuracy: float | None
    best_accuracy: float
    best_epoch: int
    best_selected_on: str
    parameters: int
    attention_parameters: int
    flops: int
    steps: int
    train_seconds: float
    evaluation_seconds: float
    step_seconds: float
    """Median over epochs of the time of a training step."""
    images_per_second: float
    hardware: str
    versions: dict[str, str]
    train_sha256: str
    test_sha256: str
    metrics_sha256: str | None = None
    """Of `metrics.jsonl`, from which learning curves are drawn."""
    commit: str | None = None
    """Of the checkout that finished the run, with "-dirty" if it was changed."""
    date: str | None = None
    """UTC, when the run was finished."""
    impl: str | None = None
    """What ran the tails of its blocks (`spem.ops.use_impl`)."""
    step: str | None = None
    """How its steps were taken: "eager", "compile" or "graph"."""


def read_result(folder: Path) -> Result | None:
    """Read `result.json` of a run folder; None if the run has not finished.

    Raises:
        ValueError: the file is damaged, edited, or from another version.
    """
    path = Path(folder) / RESULT
    if not path.exists():
        return None
    values = load_json(path, remedy="Delete it and run the same training again.")
    try:
        return Result(**values)
    except TypeError as error:
        raise ValueError(
            f"load: {path} does not fit this version of spem ({error}). "
            "Delete it and run the same training again."
        ) from error


def write_result(result: Result, folder: Path) -> None:
    """Write `result.json`, which declares the run finished."""
    save_json(dataclasses.asdict(result), folder / RESULT)


def summarise(
    config: RunConfig,
    model: nn.Module,
    sets: Sets,
    history: list[dict[str, Any]],
    folder: Path,
    processes: int = 1,
) -> Result:
    """Put the result of a finished run together from its epochs' lines.

    Args:
        config: of the run, as planned.
        model: the trained network.
        sets: its images.
        history: the lines of `metrics.jsonl`.
        folder: the run folder.
        processes: how many trained it in the end; more than one are told with the hardware.
    """
    machine = hardware(torch.device(config.runtime.device), config.runtime.threads)
    steps = math.ceil(len(sets.train) / config.optim.batch)
    last, best = history[-1], best_line(history)
    train_seconds = sum(line["seconds"] for line in history)
    return Result(
        id=config.id,
        seed=config.seed,
        dataset=config.data.name,
        depth=config.model.depth,
        attention=config.model.attention,
        epochs=config.optim.epochs,
        accuracy=last["test_accuracy"],
        loss=last["test_loss"],
        train_accuracy=last["train_accuracy"],
        train_loss=last["loss"],
        validation_accuracy=last.get("validation_accuracy"),
        best_accuracy=best["test_accuracy"],
        best_epoch=best["epoch"],
        best_selected_on="test" if sets.validation is None else "validation",
        parameters=sum(p.numel() for p in model.parameters()),
        attention_parameters=attention_parameters(model),
        flops=_flops(model, tuple(sets.test.images.shape[1:])),
        steps=steps * config.optim.epochs,
        train_seconds=train_seconds,
        evaluation_seconds=sum(line["evaluation_seconds"] for line in history),
        step_seconds=statistics.median(line["seconds"] for line in history) / steps,
        images_per_second=len(sets.train) * len(history) / train_seconds,
        hardware=machine if processes == 1 else f"{processes} x {machine}",
        versions=versions(),
        train_sha256=sets.train.sha256,
        test_sha256=sets.test.sha256,
        metrics_sha256=hashlib.sha256((folder / METRICS).read_bytes()).hexdigest(),
        commit=commit(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        impl=config.runtime.impl,
        step=config.runtime.step,
    )


def best_line(history: list[dict[str, Any]]) -> dict[str, Any]:
    """The first epoch with the best accuracy, on validation images or, without any, on test."""
    return max(history, key=lambda line: line.get("validation_accuracy", line["test_accuracy"]))


def _flops(model: nn.Module, input_shape: tuple[int, ...]) -> int:
    from spem import cost  # loads torch's counter, which imports much

    return cost.count(model, (1, *input_shape)).flops
