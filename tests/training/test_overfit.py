"""Every attention lets a small network learn 64 real images by heart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from training.tiny import tiny

from spem import initialise
from spem.data import NORMALISATION, load_images, normalise
from spem.training.folder import build_network
from spem.training.step import execution, make_optimizer, make_step

STEPS = 300


@pytest.fixture(scope="module")
def batch(data_root: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """64 test images of CIFAR-10 and their labels; at half their size a step takes a fourth."""
    images = load_images("cifar10", "test", root=data_root).take(torch.arange(64))
    x = normalise(images.images, *NORMALISATION["paper"])
    return nn.functional.avg_pool2d(x, 2), images.labels


@pytest.mark.parametrize(
    "attention",
    [
        *("none", "scale", "se", "cbam", "eca", "srm", "sge"),
        *("spem", "spem(form=figure)", "spem(form=code)"),
    ],
)
def test_64_images_are_learnt_by_heart(attention: str, batch: tuple[torch.Tensor, torch.Tensor]):
    config = tiny(attention)
    model = build_network(config, classes=10)
    initialise(model, 0)
    model.train()
    step = make_step(model, make_optimizer(model, config.optim), config.optim, config.runtime)
    losses: list[float] = []
    with execution(config.runtime):
        while len(losses) < STEPS and (not losses or losses[-1] >= 0.1):
            losses.append(float(step(*batch).loss))
    assert losses[0] > 1
    assert losses[-1] < 0.1
