"""Image files sorted into one folder a class: ``train/cat/1.png``, ``test/dog/7.jpg``."""

from pathlib import Path

import torch

from spem.data.decode import decode_all
from spem.data.files import read_files
from spem.data.images import ImageSet, Progress, Split, check_split

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def load_image_folder(
    folder: Path,
    split: Split,
    *,
    name: str,
    sha256: str | None = None,
    progress: Progress | None = None,
) -> ImageSet:
    """Reads ``folder/<split>/<class>/**``: one class a folder.

    Classes are sorted by name, the images of a class by path. Every folder below the split counts;
    files that are no images by their suffix, and hidden ones, are left out. Grey, palette and
    transparent images become plain red, green and blue.

    Args:
        folder: Holds ``train/`` and ``test/``.
        split: ``"train"`` or ``"test"``.
        name: Name of the set.
        sha256: Expected SHA-256 of the split's image files, one after another in the order they are
            read in.
        progress: Called with (done, count) while images are decoded.

    Raises:
        FileNotFoundError: The split's folder, or any image in a class, is missing.
        ValueError: The two splits disagree on the classes, an image is damaged or of another size,
            or the sum of the files is another one.
        ImportError: Pillow is not installed.
    """
    check_split(split)
    classes = _classes(folder / split)
    other = folder / ("test" if split == "train" else "train")
    if other.is_dir() and _classes(other) != classes:
        unmatched = sorted(set(classes) ^ set(_classes(other)))
        raise ValueError(
            f"{folder}: train/ and test/ must hold the same classes; "
            f"{', '.join(unmatched[:5])} is in one only. Labels would differ in meaning."
        )
    paths: list[Path] = []
    labels: list[int] = []
    for label, class_name in enumerate(classes):
        found = sorted(path for path in (folder / split / class_name).rglob("*") if _is_image(path))
        if not found:
            raise FileNotFoundError(
                f"{folder / split / class_name}: no image ({', '.join(SUFFIXES)}). "
                "Add some or remove the folder."
            )
        paths += found
        labels += [label] * len(found)
    contents = read_files(paths, sha256=sha256)
    sources = ((str(path), content) for path, content in zip(paths, contents, strict=True))
    images = decode_all(sources, len(paths), progress=progress)
    return ImageSet(images, torch.tensor(labels, dtype=torch.int64), classes, name)


def _classes(folder: Path) -> tuple[str, ...]:
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: the split has no folder. Put one folder a class into it."
        )
    classes = tuple(
        sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    )
    if not classes:
        raise FileNotFoundError(f"{folder}: holds no folders. Put one folder a class into it.")
    return classes


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.name[0] != "." and path.is_file()
