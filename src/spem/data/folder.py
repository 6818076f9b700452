"""Image files in one folder per class, and decoding of any image file; torch is not needed.

A folder is checked in full first, so that everything wrong with it is reported before work begins.
"""

from __future__ import annotations

import io
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from spem.extras import require

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM")
"""Pillow's formats that hold only pixels; some of its others start programs."""
SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"),
    *(".jfif", ".jpe"),
)
"""torchvision's, and what browsers call a JPEG."""
_UNREAD = (
    *(".gif", ".heic", ".heif", ".avif", ".jp2", ".jxl", ".dng", ".cr2", ".nef", ".svg"),
    *(".apng", ".arw", ".cr3", ".dcm", ".exr", ".psd", ".raf", ".tga"),
)
"""Images that are not read: reported, or they would be missing unnoticed."""
SPLITS = {
    "train": ("train", "training"),
    "test": ("test", "testing", "val", "valid", "validation"),
}
"""Folders of splits, in capitals or not; the first that there is."""
TEST_SHARE = 0.2
"""Share of each class held out if a folder has no splits."""
_LISTED = 10
_TRAIN = {"extra": "train", "purpose": "reading images"}

Source = tuple[str, "bytes | Path | NDArray[np.uint8]"]
"""An image's name in messages, and its bytes, its file or its pixels [H, W, 3]."""


class Listing(NamedTuple):
    """Names of the classes, sorted; files and labels of each split ("all" without splits)."""

    classes: tuple[str, ...]
    files: dict[str, list[tuple[Path, int]]]


def is_image_folder(folder: Path) -> bool:
    """Whether a folder holds splits, or classes that contain images."""
    paths = _folders(folder).values()
    kinds = (*SUFFIXES, *_UNREAD)  # what is not read is reported by name, not as another layout
    inside = (file for path in paths for file in _files(path, set()))
    return bool(_splits(folder)) or any(file.suffix.lower() in kinds for file in inside)


def _splits(folder: Path) -> dict[str, Path]:
    inside = {name.lower(): path for name, path in _folders(folder).items()}
    found = {k: [inside[name] for name in names if name in inside] for k, names in SPLITS.items()}
    return {split: paths[0] for split, paths in found.items() if paths}


def look(folder: Path, share: float = TEST_SHARE) -> Listing:
    """List the images of ``folder/train/<class>/**`` and ``folder/test/<class>/**``.

    A folder of classes alone has no splits; a share of each class must be enough for a test. Links
    are followed; hidden files, ``__MACOSX`` and files without an image suffix are skipped. All that
    is wrong with the folder is said in one ValueError.
    """
    splits = _splits(folder) or {"all": folder}
    if len(splits) == 1 and "all" not in splits:
        ((split, path),) = splits.items()
        lacking = "test" if split == "train" else "train"
        remedy = "Put a folder per class into both, or the classes straight into the folder itself."
        raise FileNotFoundError(f"{folder}: there is {path.name}/ but no {lacking}/. {remedy}")
    found = {split: _folders(where) for split, where in splits.items()}
    classes = tuple(sorted({name for names in found.values() for name in names}))
    faults: list[str] = []
    if len(classes) < 2:
        there = f"one folder alone ({classes[0]})" if classes else "no folders"
        where = ", ".join(map(str, splits.values()))
        faults.append(f"{where} holds {there}; two or more are needed, one a class")
    files: dict[str, list[tuple[Path, int]]] = {split: [] for split in splits}
    for split, where in splits.items():
        strays = [path.name for path in _entries(where) if path.suffix.lower() in SUFFIXES]
        if strays and split != "all":
            faults.append(f"{where} holds images that lie in no class ({_few(strays)})")
        for label, name in enumerate(classes):
            if name not in found[split]:
                faults.append(f"the class {name} is missing in {where}")
                continue
            paths = sorted(_files(where / name, set()))
            images = [(path, label) for path in paths if _is_image(path)]
            files[split] += images
            if others := [path.name for path in paths if path.suffix.lower() in _UNREAD]:
                unread = f"{where / name} holds images of a kind that is not read ({_few(others)})"
                faults.append(f"{unread}: convert them or take them away")
            elif not images:
                faults.append(f"{where / name} holds no image ({', '.join(SUFFIXES)})")
            elif split == "all" and held_out(len(images), share) >= len(images):
                few = f"of {len(images)} image(s) none would be left to train on"
                faults.append(f"{where / name}: {few}: add some, or make train/ and test/")
    if faults:
        raise ValueError(f"{folder}: " + "; ".join(faults) + ".")
    return Listing(classes, files)


def held_out(count: int, share: float) -> int:
    """How many of a class's images are for the test."""
    return max(1, round(share * count))


def _entries(folder: Path) -> list[Path]:
    """What lies in a folder, without what programs leave there."""
    return sorted(p for p in folder.iterdir() if p.name[0] != "." and p.name != "__MACOSX")


def _folders(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in _entries(folder) if path.is_dir()}


def _files(folder: Path, seen: set[Path]) -> Generator[Path]:
    """All files below a folder, links followed, each real folder once (links may lead back)."""
    if (real := folder.resolve()) not in seen:
        seen.add(real)
        for path in _entries(folder):
            yield from _files(path, seen) if path.is_dir() else [path]


def _is_image(path: Path) -> bool:
    """Also a link that leads nowhere, which is reported as broken; no pipe."""
    return path.suffix.lower() in SUFFIXES and (path.is_file() or not path.exists())


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def check_files(paths: Sequence[Path], *, size: int | None, skip_broken: bool) -> None:
    """Read every image file's header, which is quick, and refuse all unusable ones."""
    faults: list[str] = []
    sizes: dict[str, str] = {}
    for path in paths:
        try:
            with _reading(str(path)) as opened, opened(path) as image:
                turned = image.getexif().get(0x0112) in (5, 6, 7, 8)
                width, height = image.size[:: -1 if turned else 1]
                sizes.setdefault(f"{width}x{height}", str(path))
        except ValueError as error:
            faults.append(str(error))
    _refuse([] if skip_broken else faults, sizes if size is None else {})


def _refuse(faults: Sequence[str], sizes: dict[str, str]) -> None:
    """Report broken images and differing sizes (an example of each) in one message."""
    if faults:
        told = f"{len(faults)} image{'s' * (len(faults) > 1)} cannot be read. Repair or remove them"
        more = [f"... and {len(faults) - _LISTED} more"] * (len(faults) > _LISTED)
        lines = [f"{told}, or leave them out with skip_broken=True:", *faults[:_LISTED], *more]
        raise ValueError("\n".join(lines))
    if len(sizes) > 1:
        few = _few([f"{size} ({where})" for size, where in sizes.items()])
        told = f"the images have {len(sizes)} different sizes: {few}"
        raise ValueError(f"{told}. Give one size for all: size=32.")


def decode_all(
    sources: Iterable[Source], count: int, *, size: int | None, skip_broken: bool
) -> tuple[NDArray[np.uint8], list[int]]:
    """Decode images into uint8 [n, H, W, 3]; also return the positions of those kept."""
    import numpy as np

    pixels: NDArray[np.uint8] | None = None
    kept: list[int] = []
    faults: list[str] = []
    sizes: dict[str, str] = {}
    for index, (label, source) in enumerate(sources):
        try:
            coded = isinstance(source, (bytes, Path))
            image = decode(label, source, size=size) if coded else fit(source, size)
        except ValueError as error:
            faults.append(str(error))
            continue
        if pixels is None:
            pixels = np.empty((count, *image.shape), dtype=np.uint8)
        sizes.setdefault(f"{image.shape[1]}x{image.shape[0]}", label)
        if len(sizes) == 1:
            pixels[len(kept)] = image
            kept.append(index)
    _refuse([] if skip_broken else faults, sizes)
    if pixels is None:
        raise ValueError(" ".join(["no image can be read.", *faults[:1]]))
    return pixels[: len(kept)], kept


def decode(label: str, source: bytes | Path, *, size: int | None = None) -> NDArray[np.uint8]:
    """Decode one image file, or its bytes, to uint8 [H, W, 3], upright.

    The EXIF rotation is applied, transparency becomes white, and 16-bit grey is scaled to 8 bits.
    With a size, the shorter side is resized to it (bilinear, like torchvision's `Resize`) and the
    centre is cropped (`CenterCrop`).

    Raises:
        ValueError: not an image of an allowed format, broken, incomplete or too large; the message
            calls it ``label``.
    """
    import numpy as np

    with _reading(label) as opened:
        data = source.read_bytes() if isinstance(source, Path) else source
        image = opened(io.BytesIO(data))
        if image.format == "PNG":
            if b"IEND\xaeB`\x82" not in data:
                raise ValueError("its end is missing")
            image.verify()  # checksums of all parts, which decoding skips; uses the image up
            image = opened(io.BytesIO(data))
        return fit(np.asarray(_colour(image)), size)


def fit(pixels: NDArray[np.uint8], size: int | None) -> NDArray[np.uint8]:
    """Resize one image [H, W, 3] as `decode` does."""
    import numpy as np

    height, width = pixels.shape[:2]
    if size is None or height == width == size:
        return pixels
    pillow = require("PIL.Image", **_TRAIN)
    transforms = require("torchvision.transforms.functional", **_TRAIN)
    most = pillow.MAX_IMAGE_PIXELS  # which Pillow holds only files to; the strip may be far larger
    if most and max(height, width) / min(height, width) * size**2 > 2 * most:
        raise ValueError(f"{width}x{height} is too narrow to be brought to {size}x{size}")
    scaled = transforms.resize(pillow.fromarray(pixels), size)
    return np.asarray(transforms.center_crop(scaled, [size]))


@contextmanager
def _reading(label: str) -> Generator[Any]:
    """Pillow's `open`; any error that a damaged file raises becomes one sentence."""
    pillow = require("PIL.Image", **_TRAIN)
    try:
        yield partial(pillow.open, formats=FORMATS)
    except pillow.UnidentifiedImageError as error:
        kinds = ", ".join(FORMATS)
        raise ValueError(f"{label}: not an image of a known kind ({kinds})") from error
    except Exception as error:
        why = str(error) or type(error).__name__
        raise ValueError(f"{label}: not a readable image ({why})") from error


def _colour(image: Any) -> Any:
    """The image as 8-bit RGB, upright."""
    import numpy as np

    pillow = require("PIL.Image", **_TRAIN)
    kind = image.format  # which a turned image has no more
    image = require("PIL.ImageOps", **_TRAIN).exif_transpose(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and kind != "TIFF"):
        values = np.asarray(image).astype(np.float64)
        image = pillow.fromarray(np.rint(values / 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        unknown = f"its values have 32 bits (mode {image.mode}), black and white are unknown"
        raise ValueError(f"{unknown}: save it with 8 or 16 bits")
    if {"A", "a"} & {*image.getbands()} or "transparency" in image.info:
        image = image.convert("RGBA")
        white = pillow.new("RGBA", image.size, (255, 255, 255, 255))
        image = pillow.alpha_composite(white, image)
    return image.convert("RGB")
