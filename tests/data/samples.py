"""Small data sets in every layout, written independently of the readers under test."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def random_images(n: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Uint8 [n, height, width, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def encode(pixels: np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **options)
    return stream.getvalue()


def hub_table(
    images: np.ndarray,
    labels: list[int],
    classes: list[str],
    *,
    label: str = "label",
    kind: str = "PNG",
    **options: object,
) -> pa.Table:
    """A table as the hub's parquet files hold it, metadata included."""
    rows = [{"bytes": encode(image, kind, **options), "path": None} for image in images]
    struct_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    features = {"img": {"_type": "Image"}, label: {"names": classes, "_type": "ClassLabel"}}
    table = pa.table({"img": pa.array(rows, struct_type), label: pa.array(labels, pa.int64())})
    return table.replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )


def write_parquet(path: Path, table: pa.Table, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **options)


def write_image_folder(root: Path, split: str, images: dict[str, np.ndarray]) -> list[Path]:
    """``root/split/<class>/000.png`` ...; the paths in the order they are read in."""
    paths: list[Path] = []
    for name in sorted(images):
        folder = root / split / name
        folder.mkdir(parents=True)
        for index, image in enumerate(images[name]):
            paths.append(folder / f"{index:03d}.png")
            paths[-1].write_bytes(encode(image))
    return paths


def md5_of(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def cifar_rows(images: np.ndarray) -> np.ndarray:
    """[n, 32, 32, 3] -> [n, 3072] as CIFAR's files order it: all red, all green, all blue."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), -1)


def write_cifar10(folder: Path, images: np.ndarray, labels: list[int]) -> None:
    """Five training batches and a test batch of equal sizes."""
    folder.mkdir(parents=True)
    size = len(images) // 6
    for index, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        part = slice(index * size, (index + 1) * size)
        batch = {"labels": labels[part], "data": cifar_rows(images[part])}
        (folder / name).write_bytes(pickle.dumps(batch, 2))
    names = [f"class{k}" for k in range(10)]
    meta = {"label_names": names}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta, 2))


def write_cifar100(
    folder: Path, split: str, images: np.ndarray, fine: list[int], names: list[str]
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    labels = {"fine_labels": fine, "coarse_labels": [5] * len(fine)}
    (folder / split).write_bytes(pickle.dumps({**labels, "data": cifar_rows(images)}, 2))
    meta = {"fine_label_names": names, "coarse_label_names": [f"coarse{k}" for k in range(20)]}
    (folder / "meta").write_bytes(pickle.dumps(meta, 2))
