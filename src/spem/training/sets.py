"""The images of a run: loaded once, and put in order and augmented once an epoch."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spem.attention import ChannelAttention
from spem.data import ImageSet, Split, augment, epoch_plan, hold_out, load_images
from spem.seeding import keyed_generator
from spem.training.config import DataConfig


@dataclass(frozen=True)
class Sets:
    """The images of a run; without validation images the test set selects the best epoch."""

    train: ImageSet
    test: ImageSet
    validation: ImageSet | None


_loader: ContextVar[Callable[..., ImageSet]] = ContextVar("loader", default=load_images)


@contextlib.contextmanager
def images_kept(sets: int = 4) -> Generator[None]:
    """Decode each set of images once for all runs of a `with` block, keeping the last few.

    For processes that train one run after the other: runs read their images and never write them.
    What could not be read is not tried again either, since each try may wait for a network.
    """

    @functools.lru_cache(maxsize=sets)
    def tried(name: str, split: Split, **options: Any) -> ImageSet | Exception:
        try:
            return load_images(name, split, **options)
        except (OSError, ValueError, ImportError) as error:
            return error

    def load(name: str, split: Split, **options: Any) -> ImageSet:
        found = tried(name, split, **options)
        if isinstance(found, Exception):
            raise found
        return found

    before = _loader.set(load)
    try:
        yield
    finally:
        _loader.reset(before)


def load_sets(data: DataConfig, device: torch.device) -> Sets:
    """Load the images of a run onto a device, with validation images and limit taken off.

    Both are fixed choices that do not depend on the run's seed.
    """
    root = None if data.root is None else Path(data.root)
    load = _loader.get()
    train = load(data.name, "train", root=root, size=data.size, sha256=data.sha256)
    validation = None
    if data.val:
        train, validation = hold_out(train, data.val)
        validation = validation.to(device)
    train = _limited(train, data.limit, "limit")
    return Sets(train.to(device), load_test(data).to(device), validation)


def load_test(data: DataConfig) -> ImageSet:
    """Load the test images of a run, in the order of its answers, on the CPU."""
    root = None if data.root is None else Path(data.root)
    test = _loader.get()(data.name, "test", root=root, size=data.size, sha256=data.test_sha256)
    return _limited(test, data.test_limit, "test_limit")


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


def require_batches(model: nn.Module, images: int, batch: int) -> None:
    """Refuse before the first step what would fail at the last one of the epoch.

    Raises:
        ValueError: the smallest batch of an epoch is too small for a module's batch statistics.
    """
    smallest = images % batch or batch
    for module in model.modules():
        if isinstance(module, ChannelAttention) and smallest < module.needs.batch:
            raise ValueError(
                f"train: {images} images in batches of {batch} end in one of {smallest}, but "
                f"{module.name} needs at least {module.needs.batch} images in training. "
                "Change optim.batch, data.limit or data.val."
            )
