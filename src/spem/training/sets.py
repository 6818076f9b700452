"""The images of a run: loaded once, and put in order and augmented once an epoch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from spem.data import ImageSet, augment, epoch_plan, hold_out, load_images
from spem.seeding import keyed_generator
from spem.training.config import DataConfig


@dataclass(frozen=True)
class Sets:
    """The images of a run; without validation images the test set selects the best epoch."""

    train: ImageSet
    test: ImageSet
    validation: ImageSet | None


def load_sets(data: DataConfig, device: torch.device) -> Sets:
    """Load the images of a run onto a device, with validation images and limit taken off.

    Both are fixed choices that do not depend on the run's seed.
    """
    root = None if data.root is None else Path(data.root)
    train = load_images(data.name, "train", root=root, size=data.size, sha256=data.sha256)
    test = load_images(data.name, "test", root=root, size=data.size, sha256=data.test_sha256)
    validation = None
    if data.val:
        train, validation = hold_out(train, data.val)
        validation = validation.to(device)
    train, test = (
        _limited(train, data.limit, "limit"),
        _limited(test, data.test_limit, "test_limit"),
    )
    return Sets(train.to(device), test.to(device), validation)


def _limited(images: ImageSet, limit: int | None, purpose: str) -> ImageSet:
    if limit is None or limit >= len(images):
        return images
    order = torch.randperm(len(images), generator=keyed_generator(0, purpose), device="cpu")
    return images.take(order[:limit])


def epoch_images(train: ImageSet, data: DataConfig, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
    """Put an epoch's images in the order they are shown, augmented in one gather.

    Shape:
        images: uint8 [n, 3, H, W], and labels: int64 [n], on the device of `train`.
    """
    pad = data.pad if data.augment else 0
    plan = epoch_plan(seed, epoch, len(train), pad=pad)
    order = plan.permutation.to(train.images.device)
    images = train.images[order]
    if data.augment:
        flips = plan.flips if data.flip else torch.zeros_like(plan.flips)
        images = augment(images, plan.offsets, flips, pad=pad)
    return images, train.labels[order]
