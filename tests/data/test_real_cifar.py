"""CIFAR-10 and CIFAR-100 as they are known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from spem.data import NORMALISATION, ImageSet, load_images


def check_training_set(data: ImageSet, classes: int, first: str, last: str) -> None:
    assert data.images.shape == (50_000, 3, 32, 32)
    assert data.labels.bincount().tolist() == [50_000 // classes] * classes
    assert (len(data.classes), data.classes[0], data.classes[-1]) == (classes, first, last)
    mean, std = NORMALISATION[data.name]
    # The whole set as exact integers: sums of values and of their squares.
    values = torch.stack([data.images[:, c].flatten().bincount(minlength=256) for c in range(3)])
    scale = torch.arange(256, dtype=torch.float64) / 255
    shares = values / values.sum(dim=1, keepdim=True)
    means = (shares * scale).sum(dim=1)
    deviations = ((shares * scale**2).sum(dim=1) - means**2).sqrt()
    assert [round(float(m), 4) for m in means] == list(mean)
    assert [round(float(d), 4) for d in deviations] == list(std)


def test_cifar10(data_root: Path) -> None:
    train = load_images("cifar10", "train", root=data_root)
    check_training_set(train, 10, "airplane", "truck")
    assert train.labels[:6].tolist() == [6, 9, 9, 4, 1, 1]  # frog, truck, truck, deer, car, car


@pytest.mark.slow
def test_cifar100(data_root: Path) -> None:
    train = load_images("cifar100", "train", root=data_root)
    check_training_set(train, 100, "apple", "worm")
    assert train.labels[:5].tolist() == [19, 29, 0, 11, 1]
