"""Sets of images in memory, the plan of an epoch, crop and flip, normalisation."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from spem.seeding import keyed_generator

Split = Literal["train", "test"]


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images of one size with their labels; every source returns one.

    Args:
        images: uint8 [n, 3, H, W], red, green, blue, 0 to 255.
        labels: int64 [n], each an index into ``classes``.
        classes: The names of the classes, in the order of their labels.
        name: Short name of the set, for tables and folders.
        sha256: ``checksum(images, labels)``; computed if left empty.

    Raises:
        ValueError: Shapes, dtypes or labels do not fit together.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    name: str
    sha256: str = ""

    def __post_init__(self) -> None:
        images, labels, n = self.images, self.labels, len(self.images)
        kinds = (images.dtype, images.shape[1:-2], labels.dtype, labels.shape)
        if kinds != (torch.uint8, (3,), torch.int64, (n,)):
            found = f"{images.dtype} {[*images.shape]} and {labels.dtype} {[*labels.shape]}"
            raise ValueError(
                f"ImageSet: needs torch.uint8 [n, 3, H, W] and int64 [n], got {found}."
            )
        if n and not 0 <= int(labels.min()) <= int(labels.max()) < len(self.classes):
            found, last = f"labels run from {labels.min()} to {labels.max()}", len(self.classes) - 1
            raise ValueError(f"ImageSet: {found}; with these classes they must lie in 0 to {last}.")
        if not self.sha256:
            object.__setattr__(self, "sha256", checksum(images, labels))

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> ImageSet:
        """The images at these positions (int64 [k]), in this order, with their own checksum."""
        where = indices.to(self.images.device)
        return replace(self, images=self.images[where], labels=self.labels[where], sha256="")

    def require_classes(self, trained: tuple[str, ...]) -> None:
        """Raise ValueError if labels mean something other than the outputs of a network."""
        mine = self.classes
        if mine == trained:
            return
        difference = f"{len(trained)} there, {len(mine)} here"
        if len(mine) == len(trained):
            i = next(i for i in range(len(mine)) if mine[i] != trained[i])
            difference = f"class {i} is {trained[i]!r} there and {mine[i]!r} here"
        raise ValueError(
            f"the network was trained on other classes than those of {self.name} ({difference}). "
            "An accuracy would mean nothing. Use images of the same classes."
        )

    def to(self, device: torch.device | str) -> ImageSet:
        """The same set on another device."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))


def checksum(images: Tensor, labels: Tensor) -> str:
    r"""SHA-256, in hex, of a set's shape, pixels (row-major) and labels.

    **Formula**: sha256(b"uint8 n 3 H W\n" + pixels + labels as little-endian int64). Class names
    are left out: sources spell them differently.
    """
    shape = " ".join(str(size) for size in images.shape)
    digest = hashlib.sha256(f"uint8 {shape}\n".encode())
    digest.update(np.ascontiguousarray(images.cpu().numpy()).data)
    digest.update(labels.cpu().numpy().astype("<i8").data)
    return digest.hexdigest()


def hold_out(train: ImageSet, count: int) -> tuple[ImageSet, ImageSet]:
    """Split training images into (rest, validation), both in the set's order.

    The held-out images depend only on the number of images, not on a run's seed, so that all seeds
    are judged on the same images. ValueError if one of the parts would be empty.
    """
    if not 0 < count < len(train):
        raise ValueError(f"data.val={count} of {len(train)} images. Use 1 to {len(train) - 1}.")
    order = torch.randperm(len(train), generator=keyed_generator(0, "hold_out"), device="cpu")
    return train.take(order[count:].sort().values), train.take(order[:count].sort().values)


class EpochPlan(NamedTuple):
    """All random choices of an epoch; row i is for the i-th image shown.

    Shape:
        permutation: int64 [n], the image shown at position i.
        offsets: int64 [n, 2], row and column of its crop in the padded image, 0 to 2 * pad.
        flips: bool [n], whether it is mirrored.
    """

    permutation: Tensor
    offsets: Tensor
    flips: Tensor


def epoch_plan(seed: int, epoch: int, n: int, *, pad: int = 4) -> EpochPlan:
    """Draw the order, crops (with ``pad`` pixels of padding) and flips of n images.

    A pure function of its arguments, on the CPU, so a resumed run sees the same images.
    """
    generator = keyed_generator(seed, "epoch", epoch)
    permutation = torch.randperm(n, generator=generator, device="cpu")
    offsets = torch.randint(0, 2 * pad + 1, (n, 2), generator=generator, device="cpu")
    flips = torch.randint(0, 2, (n,), generator=generator, device="cpu").bool()
    return EpochPlan(permutation, offsets, flips)


def augment(images: Tensor, offsets: Tensor, flips: Tensor, *, pad: int = 4) -> Tensor:
    """Pad with zeros, crop to the original size and mirror, all images in one gather.

    **Formula**: out[i, c, y, x] = padded[i, c, offsets[i, 0] + y, offsets[i, 1] + x'], where
    x' = W - 1 - x if flips[i], else x. No host synchronisation.

    Shape:
        images: Any dtype, [n, C, H, W]; the result is channels_last.
        offsets, flips: As in an `EpochPlan` drawn with this ``pad``.
    """
    n, channels, height, width = images.shape
    device = images.device
    offsets, flips = (drawn.to(device, non_blocking=True) for drawn in (offsets, flips))
    padded = images.new_zeros((n, height + 2 * pad, width + 2 * pad, channels))
    padded[:, pad : pad + height, pad : pad + width] = images.permute(0, 2, 3, 1)
    across = torch.arange(width, device=device)
    across = torch.where(flips[:, None], width - 1 - across, across)  # [n, W]
    rows = offsets[:, 0, None] + torch.arange(height, device=device)  # [n, H]
    columns = offsets[:, 1, None] + across  # [n, W]
    which = torch.arange(n, device=device)[:, None, None]
    return padded[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def normalise(
    images: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32
) -> Tensor:
    """**Formula**: (images / 255 - mean) / std, in at least float32, then rounded to ``dtype``.

    Shape:
        images: uint8 [n, C, H, W], else ValueError; the result has its shape and memory format.
        mean, std: Per channel, on the scale 0 .. 1.
    """
    if images.dtype != torch.uint8 or not len(mean) == len(std) == images.shape[1]:
        raise ValueError(
            f"normalise: images must be torch.uint8 with a mean and a deviation for each of "
            f"{images.shape[1]} channels, got {images.dtype}, {tuple(mean)} and {tuple(std)}."
        )
    working = torch.promote_types(dtype, torch.float32)
    constants = torch.tensor([list(mean), list(std)], dtype=working)
    constants = constants.to(images.device, non_blocking=True)[:, None, :, None, None]
    scaled = images.to(working).div_(255).sub_(constants[0]).div_(constants[1])
    return scaled.to(dtype)
