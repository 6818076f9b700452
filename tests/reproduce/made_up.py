"""Results folders with made-up runs: rows as a training would leave them, without training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from spem.reproduce.experiments import comparison, experiment, run_configs
from spem.reproduce.tables import COMPARE, FILES, config_row
from spem.training import RunConfig, smoke

Accuracy = Callable[[RunConfig], float]


def steady(start: float = 90.0, **gains: float) -> Accuracy:
    """An accuracy by module and seed, with a little noise that is always the same."""

    def accuracy(config: RunConfig) -> float:
        name = config.model.attention
        noise = np.random.default_rng([config.seed, *name.encode()]).normal()
        return start + 0.3 * config.seed + gains.get(name.partition("(")[0], 0.0) + 0.2 * noise

    return accuracy


def write(
    folder: Path,
    planned: Mapping[RunConfig, Sequence[str]],
    accuracy: Accuracy | None = None,
    *,
    baseline: str | None = None,
    epochs: int = 3,
    classes: int = 10,
) -> Path:
    """Write the four CSV files of a results folder."""
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in FILES}
    for config, names in planned.items():
        reached, key = (accuracy or steady())(config), config_row(config)
        parameters = 127_642 + (0 if config.model.attention == "none" else 1798)
        row = {"experiment": " ".join(names), "baseline": baseline, "status": "finished"}
        row |= {"classes": classes, "accuracy": reached, "best_accuracy": reached + 0.1}
        row |= {"parameters": parameters, "flops": 1e7, "hardware": "a machine"}
        rows["runs.csv"].append(key | row | {"time_train_seconds": 10.0})
        short = {name: key[name] for name in ("module", "depth", "dataset", "config", "seed")}
        for epoch in range(epochs):
            line = {"epoch": epoch, "test_accuracy": reached - 5 * (epochs - 1 - epoch)}
            ends = {"gradient_first": 0.1, "gradient_last": 0.2}
            rows["epochs.csv"].append(short | line | ends)
            if config.model.attention == "spem":
                for block in ("layer1.0", "layer2.0"):
                    mix = {"mix": f"{block}.attention.pool", "lambda": 0.4, "magnitude": 0.1}
                    rows["mixes.csv"].append(short | {"epoch": epoch} | mix)
        if config.model.attention != "none":
            for index in range(3):
                gate = {"index": index, "block": f"layer{index}", "mean": 0.5, "q50": 0.5}
                rows["gates.csv"].append(short | gate | {"sd_images": 0.01})
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in rows.items():
        pd.DataFrame(lines).to_csv(folder / name, index=False)
    return folder


def reproduced(
    folder: Path, *names: str, scale: str = "smoke", seeds: int = 6, **options: Any
) -> Path:
    """A results folder of `spem reproduce`."""
    asked = [experiment(name, scale, seeds=range(seeds)) for name in names]
    return write(folder, run_configs(asked), **options)


def compared(folder: Path, *arms: str, seeds: int = 6, **options: Any) -> Path:
    """A results folder of `spem compare`."""
    configs, baseline = comparison(smoke(), arms, range(seeds))
    planned = {config: [COMPARE] for config in configs}
    return write(folder, planned, baseline=baseline, **options)
