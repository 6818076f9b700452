"""Parquet files as the Hugging Face hub lays them out: images, labels, names in the schema."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from spem.data.decode import MAX_BYTES, decode_all
from spem.data.files import describe, read_files
from spem.data.images import ImageSet, Progress, Split
from spem.extras import require

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("fine_label", "label")  # CIFAR-100 has a coarse one beside the fine one

_SHARD = re.compile(r"-(\d+)-of-(\d+)\.parquet$")


def find_shards(folder: Path, split: Split) -> list[Path]:
    """The parquet files of one split, in order, from the folder itself or one folder below it.

    Raises:
        FileNotFoundError: There is none, or one of ``-00000-of-00002`` is missing.
        ValueError: Several folders below hold the split, so which is meant is open.
    """
    pattern = f"{split}*.parquet"
    shards = sorted(folder.glob(pattern)) or sorted(folder.glob(f"*/{pattern}"))
    shards = [path for path in shards if re.match(rf"{split}[-.]", path.name)]
    if not shards:
        raise FileNotFoundError(
            f"{folder}: no parquet file of the split {split!r} ({split}-*.parquet), "
            "here or one folder below. Fetch the whole set."
        )
    parents = sorted({path.parent for path in shards})
    if len(parents) > 1:
        raise ValueError(
            f"{folder}: several folders hold the split {split!r} ({describe(parents)}). "
            "Name one of them."
        )
    numbers = [match for path in shards if (match := _SHARD.search(path.name))]
    if numbers:
        found = {int(number[1]) for number in numbers}
        totals = {int(number[2]) for number in numbers}
        if len(totals) > 1 or len(numbers) != len(shards):
            raise ValueError(
                f"{parents[0]}: files of several versions of {split!r} lie side by side "
                f"({describe(shards)}). Keep one version."
            )
        total = totals.pop()
        missing = sorted(set(range(total)) - found) if total <= 10**5 else [total]
        if missing:
            raise FileNotFoundError(
                f"{parents[0]}: part {missing[0]} of {total} of the split {split!r} is missing "
                f"(found {describe(shards)}). Fetch the whole set."
            )
    return shards


def load_parquet(
    folder: Path,
    split: Split,
    *,
    name: str,
    sha256: str | None = None,
    progress: Progress | None = None,
) -> ImageSet:
    """Reads one split of a folder in the hub's layout.

    Args:
        folder: Holds ``train-*.parquet`` and ``test-*.parquet``, or one folder below that does.
        split: ``"train"`` or ``"test"``.
        name: Name of the set.
        sha256: Expected SHA-256 of the split's files, one after another in the order of their
            names.
        progress: Called with (done, count) while images are decoded.

    Raises:
        FileNotFoundError: A file of the split is missing.
        ValueError: A file is damaged, has another layout, or its sum is another one.
        ImportError: pyarrow or Pillow is not installed.
    """
    shards = find_shards(folder, split)
    contents = read_files(shards, sha256=sha256)
    pieces = [_read_shard(path, content) for path, content in zip(shards, contents, strict=True)]
    names = {classes for _, _, classes in pieces}
    if len(names) > 1:
        raise ValueError(
            f"{describe(shards)}: the files disagree on the classes. Fetch the set again."
        )
    return _assemble(
        [
            (str(path), blobs, labels)
            for path, (blobs, labels, _) in zip(shards, pieces, strict=True)
        ],
        names.pop(),
        name=name,
        progress=progress,
    )


def load_hub(hub_id: str, split: Split, *, name: str, progress: Progress | None = None) -> ImageSet:
    """Fetches one split from the hub with ``datasets``, which keeps a copy and checks its own sums.

    Raises:
        FileNotFoundError: The hub does not answer, and there is no copy.
        ValueError: The set has another layout or a broken image.
        ImportError: datasets is not installed.
    """
    datasets = require("datasets", extra="train", purpose=f"fetching {hub_id}")
    try:
        data = datasets.load_dataset(hub_id, split=split)
        table = data.with_format("arrow")[:]
    # What a missing network raises depends on where it is noticed, and on the versions of four
    # libraries.
    except Exception as error:
        raise FileNotFoundError(
            f"{name}: no local folder, and {hub_id} could not be fetched from the hub "
            f"({type(error).__name__}: {error}). "
            f"Point SPEM_DATA or root= at a folder that holds {name}/."
        ) from error
    image, label = _columns(hub_id, table.column_names)
    classes = getattr(data.features[label], "names", None)
    if not classes:
        raise ValueError(f"{hub_id}: column {label!r} carries no class names.")
    blobs, labels = _read_columns(hub_id, table, image, label)
    return _assemble([(hub_id, blobs, labels)], tuple(classes), name=name, progress=progress)


_Piece = tuple[list[bytes], NDArray[np.int64], tuple[str, ...]]


def _read_shard(path: Path, content: bytes) -> _Piece:
    """The encoded images, labels and class names of one file."""
    arrow = require("pyarrow", extra="train", purpose="reading parquet files")
    parquet = require("pyarrow.parquet", extra="train", purpose="reading parquet files")
    # Damaged bytes make pyarrow raise its own errors, OSError, ValueError, MemoryError and more.
    try:
        with parquet.ParquetFile(
            arrow.BufferReader(content), pre_buffer=False, page_checksum_verification=True
        ) as file:
            sizes = [file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups)]
            if sum(sizes) > MAX_BYTES or min(sizes, default=0) < 0:
                raise ValueError(f"it claims to hold {sum(sizes)} bytes")
            metadata = cast(dict[bytes, bytes], file.schema_arrow.metadata or {})
            names = cast(list[str], file.schema_arrow.names)
            table = file.read(
                columns=[c for c in names if c in IMAGE_COLUMNS + LABEL_COLUMNS], use_threads=False
            )
            table.validate(full=True)
    except Exception as error:
        raise ValueError(
            f"{path}: not a readable parquet file ({error}). Fetch the file again."
        ) from error
    image, label = _columns(str(path), table.column_names)
    return *_read_columns(str(path), table, image, label), _class_names(path, metadata, label)


def _columns(source: str, names: Sequence[str]) -> tuple[str, str]:
    image = next((column for column in IMAGE_COLUMNS if column in names), None)
    label = next((column for column in LABEL_COLUMNS if column in names), None)
    if image is None or label is None:
        raise ValueError(
            f"{source}: columns are {', '.join(names) or 'none that are known'}; "
            f"an image column ({' or '.join(IMAGE_COLUMNS)}) and a label column "
            f"({' or '.join(LABEL_COLUMNS)}) are needed."
        )
    return image, label


def _read_columns(
    source: str, table: Any, image: str, label: str
) -> tuple[list[bytes], NDArray[np.int64]]:
    """Encoded images and labels of a pyarrow table."""
    try:
        blobs = [row["bytes"] for row in table.column(image).to_pylist()]
        labels = table.column(label).to_pylist()
    except Exception as error:
        raise ValueError(
            f"{source}: column {image!r} must hold structs with the bytes of an image ({error})."
        ) from error
    if not all(isinstance(blob, bytes) for blob in blobs):
        raise ValueError(f"{source}: column {image!r} has rows without the bytes of an image.")
    if not all(isinstance(value, int) and value >= 0 for value in labels):
        raise ValueError(f"{source}: column {label!r} has rows without a label.")
    return blobs, np.asarray(labels, dtype=np.int64)


def _class_names(path: Path, metadata: dict[bytes, bytes], label: str) -> tuple[str, ...]:
    """The class names that the hub writes into the schema."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        names = features[label]["names"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: the schema has no class names for {label!r} (the hub's feature metadata). "
            "Write the file with datasets' Dataset.to_parquet and a ClassLabel column."
        ) from error
    if not isinstance(names, list) or not all(
        isinstance(n, str) for n in cast(list[object], names)
    ):
        raise ValueError(f"{path}: the class names of {label!r} are not a list of words.")
    return tuple(cast(list[str], names))


def _assemble(
    pieces: list[tuple[str, list[bytes], NDArray[np.int64]]],
    classes: tuple[str, ...],
    *,
    name: str,
    progress: Progress | None,
) -> ImageSet:
    labels = np.concatenate([part for _, _, part in pieces])
    sources = ", ".join(source for source, _, _ in pieces)
    if not len(labels):
        raise ValueError(f"{sources}: there are no images. Fetch the set again.")
    if labels.max() >= len(classes):
        raise ValueError(
            f"{sources}: label {labels.max()} found, but there are only {len(classes)} classes."
        )

    def blobs() -> Iterator[tuple[str, bytes]]:
        for source, encoded, _ in pieces:
            for row, blob in enumerate(encoded):
                yield f"{source}, row {row}", blob

    images = decode_all(blobs(), len(labels), progress=progress)
    return ImageSet(images, torch.from_numpy(labels), classes, name)
