"""Finished runs made up for tests: folders as a training leaves them, without training."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from spem.reproduce import Run
from spem.training import Result, RunConfig, smoke
from spem.training.checkpoint import save_json


def config(attention: str, seed: int, **changes: Any) -> RunConfig:
    return replace(smoke(attention=attention, epochs=2), seed=seed, **changes)


def result(asked: RunConfig, accuracy: float, **changes: Any) -> Result:
    values: dict[str, Any] = {
        "id": asked.id,
        "seed": asked.seed,
        "dataset": asked.data.name,
        "depth": asked.model.depth,
        "attention": asked.model.attention,
        "epochs": 2,
        "accuracy": accuracy,
        "loss": 0.5,
        "train_accuracy": 90.0,
        "train_loss": 0.25,
        "validation_accuracy": None,
        "best_accuracy": accuracy + 1,
        "best_epoch": 0,
        "best_selected_on": "test",
        "parameters": 127642,
        "attention_parameters": 0,
        "flops": 10_000_000,
        "steps": 46,
        "train_seconds": 3.0,
        "evaluation_seconds": 0.5,
        "step_seconds": 0.02,
        "images_per_second": 1000.0,
        "hardware": "a machine",
        "versions": {"python": "3.11.0", "torch": "2.15.0"},
        "train_sha256": "a" * 64,
        "test_sha256": "b" * 64,
    }
    return Result(**(values | changes))


def epochs(accuracy: float, *, mixes: bool = False) -> list[dict[str, Any]]:
    mix = {"layer1.0.attention.pool": {"lambda": 0.25, "magnitude": 0.5, "change": 0.125}}
    return [
        {
            "epoch": epoch,
            "lr": 0.1,
            "loss": 1.5,
            "test_accuracy": accuracy + 1 - epoch,
            "seconds": 1.5,
            "evaluation_seconds": 0.25,
            "images_per_second": 1000.0,
            "mixes": mix if mixes else {},
        }
        for epoch in range(2)
    ]


def run(attention: str, seed: int, accuracy: float, **changes: Any) -> Run:
    asked = config(attention, seed)
    lines = epochs(accuracy, mixes=attention.startswith("spem"))
    return Run(asked, result(asked, accuracy, **changes), tuple(lines))


def write(finished: Run, runs: Path) -> Path:
    """Put a run into its folder."""
    folder = finished.config.folder(runs)
    folder.mkdir(parents=True)
    save_json(asdict(finished.result), folder / "result.json")
    lines = "".join(json.dumps(line) + "\n" for line in finished.epochs)
    (folder / "metrics.jsonl").write_text(lines)
    return folder
