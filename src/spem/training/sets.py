"""The images of a run: loaded once, shuffled and augmented a few batches at a time."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spem.attention import ChannelAttention
from spem.data import ImageSet, Split, augment, epoch_plan, hold_out, load_images
from spem.seeding import keyed_generator
from spem.training.config import DataConfig

AT_ONCE = 8  # batches that are augmented together


@dataclass(frozen=True)
class Sets:
    """The images of a run; without validation images, the test set selects the best epoch."""

    train: ImageSet
    test: ImageSet
    validation: ImageSet | None

    def to(self, device: torch.device) -> Sets:
        """The same images on another device."""
        validation = self.validation and self.validation.to(device)
        return Sets(self.train.to(device), self.test.to(device), validation)


def load_sets(data: DataConfig, seed: int = 0) -> Sets:
    """Load the images of a run; every seed gets the same subsets, unless `limit_seed` is set."""
    train, validation = _loaded(data, "train", data.sha256), None
    if data.val:
        train, validation = hold_out(train, data.val)
    train = _limited(train, data.limit, "limit", seed if data.limit_seed else 0)
    test = load_test(data)
    if test.classes != train.classes:
        raise ValueError(
            f"{data.name}: the training images have other classes than the test images "
            f"({len(train.classes)} and {len(test.classes)}). Their labels would differ in meaning."
        )
    return Sets(train, test, validation)


def load_test(data: DataConfig) -> ImageSet:
    """Load the test images of a run, in their fixed order, on the CPU."""
    return _limited(_loaded(data, "test", data.test_sha256), data.test_limit, "test_limit")


def _loaded(data: DataConfig, split: Split, sha256: str | None) -> ImageSet:
    how = {name: getattr(data, name) for name in ("root", "size", "test", "skip_broken")}
    return load_images(data.name, split, sha256=sha256, **how)


def _limited(images: ImageSet, limit: int | None, purpose: str, seed: int = 0) -> ImageSet:
    if limit is None or limit >= len(images):
        return images
    order = torch.randperm(len(images), generator=keyed_generator(seed, purpose), device="cpu")
    return images.take(order[:limit])


def epoch_batches(
    train: ImageSet, data: DataConfig, seed: int, epoch: int, *, batch: int, first: int = 0
) -> Generator[tuple[Tensor, Tensor]]:
    """The batches of an epoch from step `first` on, on the device of `train`.

    Images are uint8 [batch, 3, H, W], labels int64 [batch]. One gather augments several batches;
    the plan covers the full epoch, so the bits do not depend on their number.
    """
    pad = data.pad if data.augment else 0
    plan = epoch_plan(seed, epoch, len(train), pad=pad)
    order, offsets, flips = (part.to(train.images.device) for part in plan)
    if not data.flip:
        flips = torch.zeros_like(flips)
    for start in range(first * batch, len(train), AT_ONCE * batch):
        here = slice(start, start + AT_ONCE * batch)
        images, labels = train.images[order[here]], train.labels[order[here]]
        if data.augment:
            images = augment(images, offsets[here], flips[here], pad=pad)
        yield from zip(images.split(batch), labels.split(batch), strict=True)


def require_batches(model: nn.Module, images: int, batch: int) -> None:
    """Raise ValueError early if the epoch's last batch is too small for a module."""
    smallest = images % batch or batch
    for module in model.modules():
        if isinstance(module, ChannelAttention) and smallest < module.needs.batch:
            raise ValueError(
                f"train: {images} images in batches of {batch} end in one of {smallest}, but "
                f"{module.name} needs at least {module.needs.batch} images in training. "
                "Change optim.batch, data.limit or data.val."
            )
