"""One door to every source of images: by name, or by the path of a folder."""

import difflib
import os
from pathlib import Path

from spem.data.cifar_folder import is_cifar_folder, load_cifar_folder
from spem.data.digits import load_digits
from spem.data.image_folder import load_image_folder
from spem.data.images import ImageSet, Progress, Split, check_split
from spem.data.parquet import load_hub, load_parquet

HUB_IDS = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100"}
"""Short name of a set -> its id on the Hugging Face hub."""


def load_images(
    name_or_path: str,
    split: Split,
    *,
    root: Path | None = None,
    size: int | None = None,
    sha256: str | None = None,
    progress: Progress | None = None,
) -> ImageSet:
    """Loads one split of a set of images into memory, from wherever it lies.

    - ``digits``: scikit-learn's bundled digits, no network.
    - ``cifar10``, ``cifar100`` or their hub ids: ``root/<name>`` if a root is given, else
      ``$SPEM_DATA/<name>`` if that is there, else the hub.
    - A folder with ``train-*.parquet`` and ``test-*.parquet``, here or one folder below: the hub's
      layout.
    - ``cifar-10-batches-py``, ``cifar-100-python``: torchvision's folders, compared with the
      published MD5 sums.
    - A folder with ``train/<class>/`` and ``test/<class>/``: image files, one folder a class.

    All end in the same tensors. ``ImageSet.sha256`` is the sum of what was decoded. ``sha256=`` is
    another sum: that of the raw files of the split (``cat train-*.parquet | sha256sum``, image
    files in the order of their paths, a CIFAR folder's files of class names included), compared
    before anything is decoded. Without a known sum, files that are cut off or broken in structure
    are refused, but a changed byte inside an image can pass unseen.

    Args:
        name_or_path: One of the above.
        split: ``"train"`` or ``"test"``.
        root: Folder in which named sets lie, each under its short name.
        size: Height and width in pixels. The digits are scaled to it (multiples of 8, 16 if left
            out); of other sets it must be the size, since sources never change images.
        sha256: Expected SHA-256 of the raw files of the split, in hex.
        progress: Called with (images done, images in all) while image files are decoded.

    Raises:
        FileNotFoundError: There is no such name or folder, or files of it are missing.
        ValueError: A file is damaged or its sum is another one, or an argument does not fit.
        OSError: A file is there and cannot be opened.
        ImportError: An extra is missing; the message ends in the line that installs it.
    """
    check_split(split)
    if name_or_path == "digits":
        if sha256 is not None:
            raise ValueError(
                "digits: sha256= is for data files; these come with scikit-learn. Leave it out."
            )
        return load_digits(split, size=size)
    images = _load(name_or_path, split, root, sha256, progress)
    height, width = images.images.shape[2:]
    if size is not None and (height, width) != (size, size):
        raise ValueError(
            f"{name_or_path}: images are {width}x{height}, size={size} was asked for, "
            "and only digits are scaled. Leave size out."
        )
    return images


def _load(
    name_or_path: str,
    split: Split,
    root: Path | None,
    sha256: str | None,
    progress: Progress | None,
) -> ImageSet:
    name = {hub_id: short for short, hub_id in HUB_IDS.items()}.get(name_or_path, name_or_path)
    if name not in HUB_IDS:
        if root is not None:
            raise ValueError(
                f"{name_or_path}: root= is for named sets ({', '.join(HUB_IDS)}). "
                "Give the whole path instead."
            )
        folder = Path(name_or_path).expanduser()
        return _load_folder(folder, folder.resolve().name, split, sha256, progress)
    folder = _local_folder(name, root)
    if folder is not None:
        return _load_folder(folder, name, split, sha256, progress)
    if sha256 is not None:
        raise ValueError(
            f"{name}: sha256= is for data files; the hub's are checked when they are "
            "fetched. Leave it out."
        )
    return load_hub(HUB_IDS[name], split, name=name, progress=progress)


def _local_folder(name: str, root: Path | None) -> Path | None:
    """Where a named set lies on this machine, or None."""
    if root is not None:
        folder = root.expanduser() / name
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{name}: {folder} is not there. "
                f"Give the folder that holds {name}/ as root=, or leave it out."
            )
        return folder
    base = os.environ.get("SPEM_DATA")
    if not base:
        return None
    folder = Path(base).expanduser() / name
    return folder if folder.is_dir() else None


def _load_folder(
    folder: Path, name: str, split: Split, sha256: str | None, progress: Progress | None
) -> ImageSet:
    if not folder.is_dir():
        known = ["digits", *HUB_IDS, *HUB_IDS.values()]
        near = difflib.get_close_matches(str(folder), known, n=2)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise FileNotFoundError(
            f"{folder}: neither a known set ({', '.join(known)}) nor a folder.{hint}"
        )
    if is_cifar_folder(folder):
        return load_cifar_folder(folder, split, name=name, sha256=sha256)
    if any(folder.glob("*.parquet")) or any(folder.glob("*/*.parquet")):
        return load_parquet(folder, split, name=name, sha256=sha256, progress=progress)
    if (folder / "train").is_dir() or (folder / "test").is_dir():
        return load_image_folder(folder, split, name=name, sha256=sha256, progress=progress)
    raise FileNotFoundError(
        f"{folder}: holds no known layout. Wanted: train-*.parquet and test-*.parquet "
        "(here or one folder below), torchvision's CIFAR files, or train/<class>/ and "
        "test/<class>/ with images."
    )
