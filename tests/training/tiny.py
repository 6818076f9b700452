"""A training of a second or two, and how two of its folders are compared."""

from __future__ import annotations

import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from spem import initialise
from spem.models import ResNet
from spem.training import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    Progress,
    Result,
    RunConfig,
    RuntimeConfig,
    Silent,
    read_metrics,
    read_run,
    train,
)
from spem.training.folder import CHECKPOINT, build_network, load_checkpoint
from spem.training.step import make_optimizer, make_step

CLOCK = {"seconds", "evaluation_seconds", "images_per_second"}
"""Numbers of a metrics line that depend on the clock."""


class Stop(Silent):
    """Progress that sends a signal once, after so many steps."""

    def __init__(self, after: int, number: signal.Signals = signal.SIGTERM) -> None:
        self.left, self.number = after, number
        self.messages: list[str] = []

    def step(self, done: int, total: int, text: str) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.number)

    def message(self, text: str) -> None:
        self.messages.append(text)


def tiny(attention: str = "spem", *, epochs: int = 4, **runtime: Any) -> RunConfig:
    """256 digits of 8x8 pixels in batches of 40, the last one smaller: 7 steps an epoch."""
    settings: dict[str, Any] = {"threads": 1, "device": "cpu", **runtime}
    milestones = (1, 3) if epochs > 3 else (1,)
    return RunConfig(
        model=ModelConfig(depth=11, attention=attention),
        data=DataConfig("digits", size=8, limit=256, pad=1, flip=False, normalisation="digits"),
        optim=OptimConfig(epochs=epochs, batch=40, milestones=milestones),
        runtime=RuntimeConfig(**settings),
        experiment="tiny",
    )


def validated(config: RunConfig, count: int) -> RunConfig:
    """The same run with so many images held out."""
    return replace(config, data=replace(config.data, val=count))


def shortened(config: RunConfig, images: int) -> RunConfig:
    """The same run on fewer images."""
    return replace(config, data=replace(config.data, limit=images))


class Begun(NamedTuple):
    """A network of ten classes before its first step, its optimiser, and what takes its steps."""

    model: ResNet
    optimizer: torch.optim.Optimizer
    step: Any


def begun(config: RunConfig) -> Begun:
    model = build_network(config, classes=10)
    initialise(model, 0)
    optimizer = make_optimizer(model.to(config.runtime.device).train(), config.optim)
    return Begun(model, optimizer, make_step(model, optimizer, config.optim, config.runtime))


def folder_set(root: Path, names: str, seed: int = 0) -> Path:
    """Images of noise in one folder a class, of the same pixels whatever the names are."""
    chance = np.random.default_rng(seed)
    for split in ("train", "test"):
        for name in names:
            (root / split / name).mkdir(parents=True)
            for i in range(4):
                pixels = chance.integers(0, 255, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


class Keep:
    """Progress that keeps a copy of the checkpoint of each epoch, the last one before it goes."""

    def __init__(self, folder: Path, inner: Progress | None) -> None:
        self.folder, self.inner = folder, inner or Silent()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def epoch(self, line: dict[str, Any], epochs: int) -> None:
        shutil.copy(self.folder / CHECKPOINT, kept_checkpoint(self.folder))
        self.inner.epoch(line, epochs)


def kept_checkpoint(folder: Path) -> Path:
    """Beside the run's folder, in which nothing else may lie."""
    return folder.with_name(f"{folder.name}.kept.pt")


def trained(config: RunConfig, folder: Path, progress: Progress | None = None) -> Result:
    """Train, such that `outcome` can look at the momentum afterwards."""
    return train(config, folder, progress=Keep(folder, progress))  # pyright: ignore[reportArgumentType]


def outcome(folder: Path) -> dict[str, Any]:
    """All that a run ends in, but for the clock: weights, momentum, metrics; as files hold it."""
    content = load_checkpoint(kept_checkpoint(folder))
    lines = [{k: v for k, v in line.items() if k not in CLOCK} for line in read_metrics(folder)]
    momenta = content["optimizer"]["state"].items()
    weights = read_run(folder).network().state_dict()
    for name, tensor in content["model"].items():
        assert torch.equal(weights[name], tensor), name
    return {
        "weights": weights,
        "momentum": {i: s["momentum_buffer"] for i, s in momenta},
        "metrics": lines,
    }


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Names of tensors that differ in any bit, and "metrics"; empty if all is equal."""
    found = [
        f"{part} {name}"
        for part in ("weights", "momentum")
        for name in a[part].keys() | b[part].keys()
        if not torch.equal(a[part][name], b[part][name])
    ]
    return found if a["metrics"] == b["metrics"] else [*found, "metrics"]
