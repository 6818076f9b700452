"""Image files to pixels, with Pillow, refusing what is broken or absurd."""

import io
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spem.data.images import Progress
from spem.extras import require

# Formats that are one image and nothing else; Pillow knows others that start external programs.
FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 4096 * 4096
MAX_BYTES = 32 * 2**30
"""A set is held whole in memory; beyond these a file is taken for damaged."""

_REPORT_EVERY = 500
_PNG_END = b"IEND\xaeB`\x82"


def decode_all(
    sources: Iterable[tuple[str, bytes]], count: int, *, progress: Progress | None = None
) -> Tensor:
    """Decodes images of one size into uint8 [n, 3, H, W].

    Args:
        sources: (what to call it in a message, the bytes of the image file), ``count`` of them.
        count: How many there are.
        progress: Called with (done, count) now and then.

    Raises:
        ValueError: An image is broken, absurdly large, or of another size than the first.
    """
    pillow = require("PIL.Image", extra="train", purpose="reading images")
    pixels: NDArray[np.uint8] | None = None
    for index, (label, data) in enumerate(sources):
        image = decode(label, data, pillow)
        if pixels is None:
            if count * image.size > MAX_BYTES:
                raise ValueError(
                    f"{label}: {count} images of {image.shape[1]}x{image.shape[0]} would take "
                    f"{count * image.size / 2**30:.0f} GiB; at most "
                    f"{MAX_BYTES // 2**30} are held in memory. Scale the images down."
                )
            pixels = np.empty((count, *image.shape), dtype=np.uint8)
        if image.shape != pixels.shape[1:]:
            raise ValueError(
                f"{label}: the image is {image.shape[1]}x{image.shape[0]}, the first of the set is "
                f"{pixels.shape[2]}x{pixels.shape[1]}. All images of a set must have one size."
            )
        pixels[index] = image
        if progress is not None and ((index + 1) % _REPORT_EVERY == 0 or index + 1 == count):
            progress(index + 1, count)
    if pixels is None:
        raise ValueError("decode_all: there are no images to decode.")
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def decode(label: str, data: bytes, pillow: ModuleType) -> NDArray[np.uint8]:
    """Decodes one image file to uint8 [H, W, 3].

    Args:
        label: What to call it in a message.
        data: The bytes of the file.
        pillow: The module ``PIL.Image``.

    Raises:
        ValueError: The bytes are no image of an admitted format, are broken or incomplete, or too
            large.
    """
    try:
        with pillow.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            kind = image.format
            if width * height > MAX_PIXELS:
                raise ValueError(f"{width}x{height} pixels are more than {MAX_PIXELS}")
            if kind != "PNG":
                return _colour(image)
            if _PNG_END not in data:
                raise ValueError("its end is missing")
            image.verify()  # checksums of all parts, which decoding skips; uses the image up
        with pillow.open(io.BytesIO(data), formats=FORMATS) as image:
            return _colour(image)
    except pillow.UnidentifiedImageError as error:
        raise ValueError(
            f"{label}: not an image of a known kind ({', '.join(FORMATS)}). Fetch the file again."
        ) from error
    # Damaged bytes make the decoders raise almost anything (OSError, SyntaxError, struct.error,
    # zlib.error ...).
    except Exception as error:
        raise ValueError(
            f"{label}: not a readable image ({error}). Fetch the file again."
        ) from error


def _colour(image: Any) -> NDArray[np.uint8]:
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
