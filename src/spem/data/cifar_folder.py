"""CIFAR's own Python version, as torchvision keeps it, read without running what it contains."""

import hashlib
import io
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from spem.data.files import describe, read_files
from spem.data.images import ImageSet, Split

_SIDE = 32
_VALUES = 3 * _SIDE * _SIDE


@dataclass(frozen=True)
class _Layout:
    train: tuple[str, ...]
    test: tuple[str, ...]
    meta: str
    labels: str
    names: str
    classes: int


_CIFAR10 = _Layout(
    train=tuple(f"data_batch_{number}" for number in range(1, 6)),
    test=("test_batch",),
    meta="batches.meta",
    labels="labels",
    names="label_names",
    classes=10,
)
_CIFAR100 = _Layout(
    train=("train",),
    test=("test",),
    meta="meta",
    labels="fine_labels",
    names="fine_label_names",
    classes=100,
)

PUBLISHED_MD5: dict[str, str] = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
    "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
    "train": "16019d7e3df5f24257cddd939b257f8d",
    "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
    "meta": "7973b15100ade9c7d40fb424638fde48",
}
"""MD5 sums of the original files, as the sets' page and torchvision list them."""


def is_cifar_folder(folder: Path) -> bool:
    """Whether a folder holds files named like those of CIFAR-10's or CIFAR-100's Python version."""
    return _layout(folder) is not None


def load_cifar_folder(
    folder: Path,
    split: Split,
    *,
    name: str,
    sha256: str | None = None,
    known_md5: Mapping[str, str] = PUBLISHED_MD5,
) -> ImageSet:
    """Reads one split of ``cifar-10-batches-py`` or ``cifar-100-python`` (the fine labels).

    The files are pickles. Each is compared with its MD5 sum before it is read, and the reader
    builds nothing but plain values and arrays of bytes (``restricted_load``).

    Args:
        folder: The folder itself, not the one it lies in.
        split: ``"train"`` or ``"test"``.
        name: Name of the set.
        sha256: Expected SHA-256 of the split's files and the file of class names, one after
            another, sorted by name.
        known_md5: File name -> MD5 sum in hex; every file that is read must be listed.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A sum differs, or a file's content is not what the layout says.
    """
    layout = _layout(folder)
    if layout is None:
        raise FileNotFoundError(
            f"{folder}: holds none of CIFAR's files ({_CIFAR10.meta}, data_batch_1 ...; "
            f"{_CIFAR100.meta}, train, test)."
        )
    batches = layout.train if split == "train" else layout.test
    paths = [folder / file for file in sorted((*batches, layout.meta))]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"{describe(missing)}: missing. Unpack the whole archive again.")
    contents = read_files(paths, sha256=sha256)
    decoded: dict[str, dict[str, Any]] = {}
    for path, content in zip(paths, contents, strict=True):
        _check_md5(path, content, known_md5)
        decoded[path.name] = _read_pickle(path, content)
    classes = _class_names(folder / layout.meta, decoded[layout.meta], layout)
    parts = [_read_batch(folder / file, decoded[file], layout) for file in batches]
    images = np.concatenate([pixels for pixels, _ in parts])
    labels = np.concatenate([labels for _, labels in parts])
    return ImageSet(torch.from_numpy(images), torch.from_numpy(labels), classes, name)


def restricted_load(data: bytes) -> object:
    """Reads a pickle that holds plain values and arrays of bytes, and nothing else.

    A pickle is a program; this reader knows three names it may call on, as CIFAR's files do for
    their arrays, and answers them itself without touching numpy's own. Any other name ends the
    reading.

    Raises:
        pickle.UnpicklingError: The pickle names anything else.
        Exception: Damaged bytes can end in almost any error.
    """
    return _Reader(io.BytesIO(data), encoding="latin1").load()


class _Reader(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> object:
        full = f"{module_name}.{global_name}"
        if full in ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"):
            return _empty_array
        if full == "numpy.dtype":
            return _byte_dtype
        if full == "numpy.ndarray":
            return _ARRAY  # only ever an argument of _reconstruct: not a type that could be called
        raise pickle.UnpicklingError(f"it asks for {full}, which no CIFAR file needs")


_ARRAY = "numpy.ndarray"


def _empty_array(kind: object, shape: object, code: object) -> NDArray[np.uint8]:
    """Numpy's ``_reconstruct``: an empty array, filled afterwards from the pickle's own bytes."""
    if kind != _ARRAY or shape != (0,) or code not in ("b", b"b"):
        raise pickle.UnpicklingError(f"it asks for an array of kind {kind!r}, shape {shape!r}")
    return np.empty(0, dtype=np.uint8)


def _byte_dtype(code: object, align: object = False, copy: object = True) -> np.dtype[np.uint8]:
    """A fresh dtype of unsigned bytes, the only one that CIFAR's arrays have."""
    del align, copy
    if code not in ("u1", b"u1"):
        raise pickle.UnpicklingError(f"it asks for an array of type {code!r}")
    return np.dtype("u1", align=False, copy=True)


def _layout(folder: Path) -> _Layout | None:
    for layout in (_CIFAR10, _CIFAR100):
        if any((folder / file).is_file() for file in (*layout.train, *layout.test, layout.meta)):
            return layout
    return None


def _check_md5(path: Path, content: bytes, known: Mapping[str, str]) -> None:
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if path.name not in known:
        raise ValueError(f"{path}: no MD5 sum is known for {path.name}, so it is not read.")
    if found != known[path.name]:
        raise ValueError(
            f"{path}: MD5 is {found}, the published file has {known[path.name]}. "
            "It is damaged or another file: unpack the archive again."
        )


def _read_pickle(path: Path, content: bytes) -> dict[str, Any]:
    try:
        value = restricted_load(content)
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to mean
        raise ValueError(
            f"{path}: not a CIFAR file ({error}). Unpack the archive again."
        ) from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__}, a CIFAR file holds a dict.")
    return cast(dict[str, Any], value)


def _class_names(path: Path, meta: dict[str, Any], layout: _Layout) -> tuple[str, ...]:
    names: object = meta.get(layout.names)
    if not isinstance(names, list):
        raise ValueError(f"{path}: holds no list {layout.names!r}.")
    words = cast(list[object], names)
    if len(words) != layout.classes or not all(isinstance(word, str) for word in words):
        raise ValueError(f"{path}: {layout.names!r} must be {layout.classes} words.")
    return tuple(str(word) for word in words)


def _read_batch(
    path: Path, batch: dict[str, Any], layout: _Layout
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Pixels [n, 3, 32, 32] and labels [n] of one file."""
    pixels: object = batch.get("data")
    labels: object = batch.get(layout.labels)
    if not isinstance(pixels, np.ndarray) or not isinstance(labels, list):
        raise ValueError(f"{path}: lacks an array 'data' or a list {layout.labels!r}.")
    array = cast(NDArray[np.uint8], pixels)
    numbers = cast(list[object], labels)
    if array.dtype != np.uint8 or array.shape != (len(numbers), _VALUES) or not len(numbers):
        raise ValueError(
            f"{path}: 'data' is {array.dtype} of shape {array.shape}; "
            f"{len(numbers)} labels need uint8 of shape ({len(numbers)}, {_VALUES})."
        )
    if not all(isinstance(n, int) and 0 <= n < layout.classes for n in numbers):
        raise ValueError(
            f"{path}: {layout.labels!r} must be numbers from 0 to {layout.classes - 1}."
        )
    return array.reshape(-1, 3, _SIDE, _SIDE), np.asarray(numbers, dtype=np.int64)
