"""Small data sets in every layout, written independently of the readers under test."""

from __future__ import annotations

import hashlib
import io
import json
import struct
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


def sha256_of(paths: list[Path]) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def md5_of(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def python2_pickle(value: object) -> bytes:
    """What Python 2 wrote for CIFAR: protocol 2, byte strings, numpy's old module names."""
    return b"\x80\x02" + _python2(value) + b"."


def _python2(value: object) -> bytes:
    if isinstance(value, np.ndarray):
        assert value.dtype == np.uint8
        shape = b"".join(_python2(size) for size in value.shape)
        empty = b"cnumpy.core.multiarray\n_reconstruct\n" + b"cnumpy\nndarray\n"
        empty += _python2(0) + b"\x85" + _python2("b") + b"\x87R"
        state = (
            b"("
            + _python2(3)
            + _python2("|")
            + b"NNN"
            + _python2(-1)
            + _python2(-1)
            + _python2(0)
            + b"t"
        )
        kind = (
            b"cnumpy\ndtype\n"
            + _python2("u1")
            + _python2(0)
            + _python2(1)
            + b"\x87R"
            + state
            + b"b"
        )
        pixels = _python2(value.tobytes())
        return empty + b"(" + _python2(1) + b"(" + shape + b"t" + kind + b"\x89" + pixels + b"tb"
    if isinstance(value, dict):
        items = b"".join(_python2(key) + _python2(item) for key, item in value.items())
        return b"}(" + items + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(_python2(item) for item in value) + b"e"
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    assert isinstance(value, str | bytes)
    text = value.encode("latin1") if isinstance(value, str) else value
    return b"T" + struct.pack("<i", len(text)) + text


def cifar_rows(images: np.ndarray) -> np.ndarray:
    """[n, 32, 32, 3] -> [n, 3072] as CIFAR's files order it: all red, all green, all blue."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), -1)


def write_cifar10(folder: Path, images: np.ndarray, labels: list[int], dump=python2_pickle) -> None:
    """Five training batches and a test batch of equal sizes."""
    folder.mkdir(parents=True)
    size = len(images) // 6
    for index, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        part = slice(index * size, (index + 1) * size)
        batch = {
            "batch_label": name,
            "labels": labels[part],
            "data": cifar_rows(images[part]),
            "filenames": [f"x_{k}.png" for k in range(size)],
        }
        (folder / name).write_bytes(dump(batch))
    names = [f"class{k}" for k in range(10)]
    meta = {"num_cases_per_batch": size, "label_names": names, "num_vis": 3072}
    (folder / "batches.meta").write_bytes(dump(meta))


def write_cifar100(
    folder: Path,
    split: str,
    images: np.ndarray,
    fine: list[int],
    coarse: list[int],
    names: list[str],
    dump=python2_pickle,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    batch = {
        "filenames": [f"x_{k}.png" for k in range(len(fine))],
        "batch_label": f"{split} batch 1 of 1",
        "fine_labels": fine,
        "coarse_labels": coarse,
        "data": cifar_rows(images),
    }
    (folder / split).write_bytes(dump(batch))
    meta = {"fine_label_names": names, "coarse_label_names": [f"coarse{k}" for k in range(20)]}
    (folder / "meta").write_bytes(dump(meta))
