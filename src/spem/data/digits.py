"""Scikit-learn's handwritten digits: real images that are there without any network."""

from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from spem.data.images import ImageSet, Split, check_split
from spem.extras import require

TRAIN = 1437
"""Images of the training split; the other 360 are the test split."""

_SOURCE = 8
DEFAULT_SIZE = 16


def load_digits(split: Split, *, size: int | None = None) -> ImageSet:
    """The 1797 handwritten digits that come with scikit-learn, as colour images.

    They are 8x8 grey pixels, scaled up and repeated to three channels. The first 1437 images are
    the training split, the last 360 the test split. The order is kept on purpose: images come
    writer by writer, so the last fifth is by other hands than the rest. A shuffled split would show
    the network every test writer beforehand, and its accuracy would say little of new ones.

    Values 0 .. 16 become 0 .. 255, rounded. Each pixel becomes a square of ``size / 8`` pixels,
    without interpolation: no information is added, and the map is large enough for the stages of a
    CIFAR network.

    Args:
        split: ``"train"`` or ``"test"``.
        size: Height and width of the images, a multiple of 8; 16 if left out.

    Raises:
        ValueError: ``size`` is not a positive multiple of 8, or the split is unknown.
        ImportError: scikit-learn is not installed.
    """
    check_split(split)
    size = DEFAULT_SIZE if size is None else size
    if size < _SOURCE or size % _SOURCE or size > 512:
        raise ValueError(
            f"digits: size={size} is not a multiple of 8 from 8 to 512. Use 8, 16, 24 or 32."
        )
    sklearn = require("sklearn.datasets", extra="train", purpose="the digits data set")
    bunch = sklearn.load_digits()
    grey = cast(NDArray[np.float64], bunch.images)  # [1797, 8, 8], whole numbers 0 .. 16
    chosen = slice(None, TRAIN) if split == "train" else slice(TRAIN, None)
    pixels = np.rint(grey[chosen] * (255 / 16)).astype(np.uint8)
    scale = size // _SOURCE
    large = torch.from_numpy(pixels.repeat(scale, axis=1).repeat(scale, axis=2))
    return ImageSet(
        images=large[:, None].repeat(1, 3, 1, 1),
        labels=torch.from_numpy(np.asarray(bunch.target)[chosen].astype(np.int64)),
        classes=tuple(str(name) for name in bunch.target_names),
        name="digits",
    )
