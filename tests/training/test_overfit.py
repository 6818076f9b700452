"""Every attention lets a small network learn 64 real images by heart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from training.tiny import begun, tiny

from spem.data import NORMALISATION, load_images, normalise
from spem.training.step import execution

STEPS = 300


@pytest.fixture(scope="module")
def batch(data_root: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """64 test images of CIFAR-10 and their labels; at half their size a step takes a fourth."""
    images = load_images("cifar10", "test", root=data_root).take(torch.arange(64))
    x = normalise(images.images, *NORMALISATION["paper"])
    return nn.functional.avg_pool2d(x, 2), images.labels


@pytest.mark.parametrize("attention", ["none", "se", "cbam", "srm", "spem(form=figure)"])
def test_64_images_are_learnt_by_heart(attention: str, batch: tuple[torch.Tensor, torch.Tensor]):
    config = tiny(attention)
    step = begun(config).step
    losses: list[float] = []
    with execution(config.runtime):
        while len(losses) < STEPS and (not losses or losses[-1] >= 0.1):
            losses.append(float(step(*batch).loss))
    assert losses[0] > 1
    assert losses[-1] < 0.1
