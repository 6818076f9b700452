"""A set of images held whole in memory, its checksum, and how validation images are held out."""

import hashlib
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from spem.seeding import keyed_generator

Split = Literal["train", "test"]


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images of one size with their labels, as every source delivers them.

    Shape:
        images: uint8 [n, 3, H, W], red, green, blue, 0 to 255.
        labels: int64 [n], each an index into ``classes``.

    Args:
        images: The pixels.
        labels: The class of each image.
        classes: The names of the classes, in the order of their labels.
        name: Short name of the set, as tables and folders show it.
        sha256: ``checksum(images, labels)``; computed here when left empty.

    Raises:
        ValueError: Shapes, dtypes, devices or labels do not fit together.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    name: str
    sha256: str = ""

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        shape, n = tuple(images.shape), len(images)
        if images.dtype != torch.uint8 or shape[1:-2] != (3,):
            raise ValueError(
                f"ImageSet: images are {images.dtype} of shape {shape}; they must be torch.uint8 "
                "of shape (n, 3, H, W)."
            )
        if (labels.dtype, labels.shape, labels.device) != (torch.int64, (n,), images.device):
            raise ValueError(
                f"ImageSet: labels are {labels.dtype} of shape {tuple(labels.shape)} on "
                f"{labels.device}; {n} images need torch.int64 of shape ({n},) on {images.device}."
            )
        if n and not 0 <= int(labels.min()) <= int(labels.max()) < len(self.classes):
            raise ValueError(
                f"ImageSet: labels run from {int(labels.min())} to {int(labels.max())}, with "
                f"{len(self.classes)} classes they must lie in 0 to {len(self.classes) - 1}."
            )
        if not self.sha256:
            object.__setattr__(self, "sha256", checksum(self.images, self.labels))

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> "ImageSet":
        """The images at these positions (int64 [k]), in this order, with their own checksum."""
        where = indices.to(self.images.device)
        return replace(self, images=self.images[where], labels=self.labels[where], sha256="")

    def to(self, device: torch.device | str) -> "ImageSet":
        """The same set on another device."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))


def checksum(images: Tensor, labels: Tensor) -> str:
    r"""SHA-256, in hex, of a set's shape, pixels (row-major) and labels, wherever it was read from.

    **Formula**: sha256(b"uint8 n 3 H W\n" + pixels + labels as little-endian int64). With the
    shape in front, sets whose bytes happen to agree in another shape differ. Class names are left
    out: sources spell them differently.
    """
    shape = " ".join(str(size) for size in images.shape)
    digest = hashlib.sha256(f"uint8 {shape}\n".encode())
    digest.update(np.ascontiguousarray(images.cpu().numpy()).data)
    digest.update(labels.cpu().numpy().astype("<i8").data)
    return digest.hexdigest()


def hold_out(train: ImageSet, count: int) -> tuple[ImageSet, ImageSet]:
    """Splits training images into (rest, validation), always in the same way.

    Which images are held out depends on the number of images alone, never on the seed of a run, so
    that runs of several seeds are judged on the same images. Both parts keep the set's order.

    Args:
        train: The training images.
        count: How many to hold out: at least 1, and at least one must remain.

    Raises:
        ValueError: ``count`` is out of range.
    """
    if not 0 < count < len(train):
        raise ValueError(
            f"hold_out: cannot hold out {count} of {len(train)} images. "
            f"Use a number from 1 to {len(train) - 1}."
        )
    order = torch.randperm(len(train), generator=keyed_generator(0, "hold_out"), device="cpu")
    return train.take(order[count:].sort().values), train.take(order[:count].sort().values)
