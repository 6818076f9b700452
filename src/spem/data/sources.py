"""Loading images from every source: by name, or from a folder."""

from __future__ import annotations

import difflib
import os
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spem.data import folder as image_folder
from spem.data.names import DIGITS_SIZE, HUB_IDS, known_name
from spem.extras import rephrased, require

if TYPE_CHECKING:
    from spem.data.images import ImageSet, Split

_COLUMNS = ("img", "image"), ("fine_label", "label")
"""Names of the columns of images, and of labels: CIFAR-100 has coarse ones next to the fine."""
_Read = tuple[Iterable[image_folder.Source], list[int], tuple[str, ...]]
"""What a reader found: images, labels, classes."""


def check_images(
    name_or_path: str,
    *,
    root: str | Path | None = None,
    size: int | None = None,
    test: float | None = None,
    skip_broken: bool = False,
) -> None:
    """Refuse right away what `load_images` would refuse later, without loading torch.

    An image folder is checked down to every file's header; parquet and CIFAR files only for
    existence. The hub is not asked until the images are fetched. Raises as `load_images` does.
    """
    files: dict[str, Any] = {}
    if known_name(name_or_path) == "digits":
        _magnified(size)
    elif (where := _where(name_or_path, root)) is not None:
        kind = _kind(where)
        if kind == "folder":
            files = image_folder.look(where, test or image_folder.TEST_SHARE).files
        for split in ("train", "test") if kind == "parquet" else ():
            _shards(where, split)
    if test is not None and "all" not in files:
        said = f"has a split for the test, so data.test={test} has no effect"
        raise ValueError(f"{name_or_path}: {said}. Leave it out.")
    paths = [path for split in files.values() for path, _ in split]
    image_folder.check_files(paths, size=size, skip_broken=skip_broken)


def load_images(
    name_or_path: str,
    split: Split,
    *,
    root: str | Path | None = None,
    size: int | None = None,
    test: float | None = None,
    skip_broken: bool = False,
    sha256: str | None = None,
) -> ImageSet:
    """Load one split of a set of images into memory, from any source.

    - ``digits``: scikit-learn's bundled digits, no network.
    - ``cifar10``, ``cifar100`` or their hub ids: ``root/<name>`` if a root is given, else
      ``$SPEM_DATA/<name>`` if it exists, else the hub.
    - A folder with ``train-*.parquet`` and ``test-*.parquet`` (or ``validation-*``), in it or one
      level down (the hub's).
    - ``cifar-10-batches-py``, ``cifar-100-python``: read by torchvision, which checks MD5 sums.
    - A folder with ``train/<class>/`` and ``test/<class>/`` (or ``val/``), or ``<class>/`` alone,
      of which a fixed share is held out for testing (`spem.data.folder.look`).

    All give the same tensors; `ImageSet.sha256` is the checksum of what was decoded.

    Args:
        name_or_path: one of the above.
        split: "train" or "test".
        root: folder that holds named sets, each under its short name.
        size: height and width in pixels. Digits are magnified (to a multiple of 8, by default 16);
            other images are resized and cropped as torchvision does (`decode`).
        test: share of each class held out if a folder has no splits; None is a fifth.
        skip_broken: leave out image files that cannot be read.
        sha256: expected `ImageSet.sha256`, in hex.

    Raises:
        FileNotFoundError: there is no such name or folder, or files are missing.
        ValueError: files are damaged, differ in size, fail the checksum; an argument does not fit.
        OSError: a file exists but cannot be opened.
        ImportError: an extra is missing.
    """
    import torch

    from spem.data.images import ImageSet

    if split not in ("train", "test"):
        raise ValueError(f"load_images: split={split!r} is unknown. Use 'train' or 'test'.")
    short = name = known_name(name_or_path) or ""
    if short == "digits":
        sources, labels, classes = _digits(split, size := _magnified(size))
    else:
        where = _where(name_or_path, root) or _fetched(HUB_IDS[short])
        share = test or image_folder.TEST_SHARE
        sources, labels, classes = _READERS[_kind(where)](where, split, share)
        name = short or where.resolve().name
    how: Any = {"size": size, "skip_broken": skip_broken}
    pixels, kept = image_folder.decode_all(sources, len(labels), **how)
    tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    found = [labels[i] for i in kept]
    if lost := set(labels).difference(found):
        few = f"none of the {split} images of the class {classes[min(lost)]} can be read"
        raise ValueError(f"{name_or_path}: {few}. Repair some, or take the class away.")
    images = ImageSet(tensor, torch.tensor(found, dtype=torch.int64), classes, name)
    if sha256 is not None and images.sha256 != sha256.lower():
        found = f"the SHA-256 of the {split} images is {images.sha256}"
        raise ValueError(f"{name_or_path}: {found}, expected {sha256}. They are others or damaged.")
    return images


def _where(name_or_path: str, root: str | Path | None) -> Path | None:
    """The folder of a set; None if it comes from the hub."""
    short = known_name(name_or_path)
    if short is None and root is not None:
        said = f"a root is for named sets ({', '.join(HUB_IDS)})"
        raise ValueError(f"{name_or_path}: {said}. Give the whole path instead.")
    base = root or os.environ.get("SPEM_DATA")
    if short is not None and not base:
        return None
    # Not Path's own, which raises for somebody unknown (~nobody).
    folder = Path(os.path.expanduser(Path(base or "", short) if short else name_or_path))  # noqa: PTH111
    if folder.is_dir():
        return folder
    if root is not None:
        remedy = f"Give as root= the folder that holds {short}/, or leave it out."
        raise FileNotFoundError(f"{short}: {folder} does not exist. {remedy}")
    if short is not None:
        return None
    known = ["digits", *HUB_IDS, *HUB_IDS.values()]
    near = " or ".join(difflib.get_close_matches(name_or_path, known, n=2))
    said = f"neither a known set ({', '.join(known)}) nor a folder."
    raise FileNotFoundError(f"{name_or_path}: {said}" + f" Did you mean {near}?" * bool(near))


def _kind(folder: Path) -> str:
    """The layout of a folder of images."""
    if (folder / "batches.meta").is_file() or (folder / "data_batch_1").is_file():
        return "CIFAR10"
    if (folder / "meta").is_file() and (folder / "train").is_file():
        return "CIFAR100"
    if any(folder.glob("*.parquet")) or any(folder.glob("*/*.parquet")):
        return "parquet"
    if image_folder.is_image_folder(folder):
        return "folder"
    raise FileNotFoundError(
        f"{folder}: holds no known layout. Wanted: train/<class>/ and test/<class>/ with images, "
        "or <class>/ alone; train-*.parquet and test-*.parquet; or torchvision's CIFAR files."
    )


def _fetched(hub_id: str) -> Path:
    """A set's files from the hub, whose client keeps a copy that works offline too."""
    hub = require("huggingface_hub", extra="train", purpose=f"fetching {hub_id}")
    said = f"no local folder, and {hub_id} could not be fetched from the hub"
    remedy = "Point SPEM_DATA or root= at a folder that holds the set."
    with rephrased(said, remedy, kind=FileNotFoundError):
        return Path(hub.snapshot_download(hub_id, repo_type="dataset", allow_patterns="*.parquet"))


def _image_folder(folder: Path, split: Split, share: float) -> _Read:
    """Read a split; without splits, a fixed share of each class, whatever the run's seed."""
    from torch import randperm

    from spem.seeding import keyed_generator

    classes, listed = image_folder.look(folder, share)
    files = listed.get(split, [])
    for label in range(len(classes) if "all" in listed else 0):
        of_class = [file for file in listed["all"] if file[1] == label]
        count = image_folder.held_out(len(of_class), share)
        generator = keyed_generator(0, "test split", label)
        order = randperm(len(of_class), generator=generator, device="cpu").tolist()
        chosen = order[:count] if split == "test" else order[count:]
        files += [of_class[i] for i in sorted(chosen)]
    return ((str(path), path) for path, _ in files), [label for _, label in files], classes


def _parquet(folder: Path, split: Split, share: float) -> _Read:
    """Read a folder in the hub's layout with pyarrow, which `datasets` brings."""
    shards = {path: _shard(path) for path in _shards(folder, split)}
    images = [
        (f"{path}, row {row}", blob)
        for path, (blobs, *_) in shards.items()
        for row, blob in enumerate(blobs)
    ]
    labels = [label for _, values, _ in shards.values() for label in values]
    classes, *others = {named for *_, named in shards.values()}
    if others:
        raise ValueError(f"{folder}: files of {split} disagree on the classes. Fetch them again.")
    if not labels:
        raise ValueError(f"{next(iter(shards))}: there are no images. Fetch the set again.")
    return images, labels, classes


def _shard(path: Path) -> tuple[list[bytes], list[int], tuple[str, ...]]:
    """Encoded images, labels and class names of one parquet file."""
    parquet = require("pyarrow.parquet", extra="train", purpose="reading parquet files")
    datasets = require("datasets", extra="train", purpose="reading parquet files")
    # On damaged bytes pyarrow raises its own errors, OSError, ValueError, MemoryError ...
    with rephrased(f"{path}: not a readable parquet file", "Fetch the file again."):
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            names = file.schema_arrow.names
            image, label = (next((c for c in known if c in names), None) for known in _COLUMNS)
            table = file.read(columns=[c for c in (image, label) if c], use_threads=False)
            table.validate(full=True)
        # The hub keeps class names in the file's schema.
        features = datasets.Features.from_arrow_schema(file.schema_arrow)
    if image is None or label is None:
        wanted = "an image column ({}) and a label column ({})".format(*map(" or ".join, _COLUMNS))
        raise ValueError(f"{path}: {wanted} are needed. It holds {', '.join(names)}.")
    classes = getattr(features[label], "names", None)
    if not classes:
        remedy = "Write it with datasets' Dataset.to_parquet and a ClassLabel column."
        raise ValueError(f"{path}: column {label!r} carries no class names. {remedy}")
    rows, labels = table.column(image).to_pylist(), table.column(label).to_pylist()
    blobs: list[Any] = [row.get("bytes") if isinstance(row, dict) else None for row in rows]
    if not all(isinstance(blob, bytes) for blob in blobs):
        raise ValueError(f"{path}: column {image!r} must hold structs with the bytes of an image.")
    if not all(isinstance(value, int) and 0 <= value < len(classes) for value in labels):
        said = f"has rows whose label is none of {len(classes)} classes"
        raise ValueError(f"{path}: column {label!r} {said}.")
    return blobs, labels, tuple(classes)


def _shards(folder: Path, split: str) -> list[Path]:
    """The parquet files of one split, in order, from the folder itself or one folder below it."""
    for name in image_folder.SPLITS[split]:
        named = f"{name}[-.]*parquet"
        if shards := sorted(folder.glob(named)) or sorted(folder.glob(f"*/{named}")):
            break
    else:
        wanted = f"no parquet file of the split {split!r} ({split}-*.parquet), here or one below"
        raise FileNotFoundError(f"{folder}: {wanted}. Fetch the whole set.")
    where, names = shards[0].parent, {path.name for path in shards}
    if len({path.parent for path in shards}) > 1:
        raise ValueError(f"{folder}: several folders hold the split {split!r}. Name one of them.")
    if numbered := re.search(r"-of-(\d+)\.parquet$", shards[0].name):
        total = int(numbered[1])
        wanted = {f"{name}-{i:05}-of-{total:05}.parquet" for i in range(total)}
        if lacking := wanted - names:
            raise FileNotFoundError(f"{where}: {min(lacking)} is missing. Fetch the whole set.")
        if names != wanted:
            raise ValueError(f"{where}: holds several versions of {split!r}. Keep one version.")
    return shards


def _cifar(folder: Path, split: Split, share: float) -> _Read:
    """Let torchvision read its folder; only published files are ever unpickled."""
    datasets = require("torchvision.datasets", extra="train", purpose="reading CIFAR's own files")
    kind = _kind(folder)
    reader = type(kind, (getattr(datasets, kind),), {"base_folder": folder.resolve().name})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy has moved since they were written
            found = reader(str(folder.resolve().parent), train=split == "train")
    except RuntimeError as error:
        wrong = f"a file of {kind} is missing or its MD5 sum is not that of the published one"
        raise ValueError(f"{folder}: {wrong}. Unpack the whole archive again.") from error
    images = ((f"{folder}, image {i}", image) for i, image in enumerate(found.data))
    return images, found.targets, tuple(found.classes)


_READERS = {"folder": _image_folder, "parquet": _parquet, "CIFAR10": _cifar, "CIFAR100": _cifar}


def _digits(split: Split, size: int) -> _Read:
    """The 1797 handwritten 8x8 digits of scikit-learn, as colour images, each pixel a square."""
    import numpy as np

    bunch = require("sklearn.datasets", extra="train", purpose="reading the digits").load_digits()
    # Not shuffled: images come writer by writer, so other people wrote the last 360.
    chosen = slice(None, 1437) if split == "train" else slice(1437, None)
    pixels = np.rint(bunch.images[chosen] * (255 / 16)).astype(np.uint8)  # from 0 .. 16
    large = pixels.repeat(size // 8, axis=1).repeat(size // 8, axis=2)
    labels = [int(label) for label in bunch.target[chosen]]
    images = (("digits", image) for image in np.stack([large] * 3, axis=-1))
    return images, labels, tuple(map(str, bunch.target_names))


def _magnified(size: int | None) -> int:
    """The side of the digits; ValueError unless it is a multiple of theirs."""
    size = DIGITS_SIZE if size is None else size
    if size not in range(8, 513, 8):
        raise ValueError(f"digits: size={size} is not a multiple of 8 from 8 to 512. Use 16 or 32.")
    return size
