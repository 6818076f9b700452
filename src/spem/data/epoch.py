"""Between memory and network: the epoch's plan, crop and flip, normalisation."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spem.seeding import keyed_generator


class EpochPlan(NamedTuple):
    """All random choices of one epoch; row i belongs to the i-th image the epoch shows.

    Shape:
        permutation: int64 [n], which image is shown at position i.
        offsets: int64 [n, 2], row and column of its crop in the padded image, 0 to 2 * pad.
        flips: bool [n], whether it is mirrored.
    """

    permutation: Tensor
    offsets: Tensor
    flips: Tensor


def epoch_plan(seed: int, epoch: int, n: int, *, pad: int = 4) -> EpochPlan:
    """Draws one epoch's order, crops and flips on the CPU: a pure function of its arguments.

    Nothing is carried over from earlier epochs, so a resumed run sees what an undisturbed one sees.

    Args:
        seed: The seed of the run.
        epoch: The number of the epoch.
        n: How many images the epoch has.
        pad: Width of the padding that the crops move in, in pixels.
    """
    generator = keyed_generator(seed, "epoch", epoch)
    permutation = torch.randperm(n, generator=generator, device="cpu")
    offsets = torch.randint(0, 2 * pad + 1, (n, 2), generator=generator, device="cpu")
    flips = torch.randint(0, 2, (n,), generator=generator, device="cpu").bool()
    return EpochPlan(permutation, offsets, flips)


def augment(images: Tensor, offsets: Tensor, flips: Tensor, *, pad: int = 4) -> Tensor:
    """Pads with zeros, crops to the old size and mirrors, all images in one gather.

    **Formula**: out[i, c, y, x] = padded[i, c, offsets[i, 0] + y, offsets[i, 1] + x'], where
    x' = W - 1 - x if flips[i], else x. Bit for bit what padding, cropping and flipping image by
    image gives. No host synchronisation.

    Shape:
        images: uint8 (any dtype) [n, C, H, W], any memory format; n = 0 is fine.
        offsets: int64 [n, 2]. flips: bool [n].
        result: [n, C, H, W], channels_last.

    Args:
        images: The images, in the order of the plan's rows.
        offsets: Row and column of each crop in the padded image, 0 to 2 * pad.
        flips: Which crops to mirror.
        pad: Width of the padding, in pixels; the one the plan was drawn with.
    """
    n, channels, height, width = images.shape
    device = images.device
    offsets = offsets.to(device, non_blocking=True)
    flips = flips.to(device, non_blocking=True)
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
    """Scales pixels to 0 .. 1, subtracts the mean and divides by the deviation of each channel.

    **Formula**: (images / 255 - mean) / std, in at least float32 and rounded to ``dtype`` once at
    the end.

    Shape:
        images: uint8 [n, C, H, W]; the result has the same shape and memory format.
        mean, std: Of each channel, on the scale 0 .. 1.

    Raises:
        ValueError: Images are not uint8, or mean and std do not fit their channels.
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
