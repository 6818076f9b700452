"""CIFAR-10 and CIFAR-100 as they are known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from data.samples import md5_of, write_cifar100

from spem.data import NORMALISATION, ImageSet, load_images
from spem.data.cifar_folder import load_cifar_folder


def check_training_set(data: ImageSet, classes: int, first: str, last: str) -> None:
    assert data.images.shape == (50_000, 3, 32, 32)
    assert data.labels.bincount().tolist() == [50_000 // classes] * classes
    assert (len(data.classes), data.classes[0], data.classes[-1]) == (classes, first, last)
    mean, std = NORMALISATION[data.name]
    # The whole set as exact integers: sums of values and of their squares.
    values = torch.stack([data.images[:, c].flatten().bincount(minlength=256) for c in range(3)])
    scale = torch.arange(256, dtype=torch.float64) / 255
    shares = values / values.sum(dim=1, keepdim=True)
    means = (shares * scale).sum(dim=1)
    deviations = ((shares * scale**2).sum(dim=1) - means**2).sqrt()
    assert [round(float(m), 4) for m in means] == list(mean)
    assert [round(float(d), 4) for d in deviations] == list(std)


def test_cifar10(data_root: Path) -> None:
    reports: list[tuple[int, int]] = []
    train = load_images(
        "cifar10",
        "train",
        root=data_root,
        progress=lambda done, count: reports.append((done, count)),
    )
    check_training_set(train, 10, "airplane", "truck")
    assert train.labels[:6].tolist() == [6, 9, 9, 4, 1, 1]  # frog, truck, truck, deer, car, car
    assert reports[-1] == (50_000, 50_000)


def test_cifar100(data_root: Path) -> None:
    train = load_images("cifar100", "train", root=data_root)
    check_training_set(train, 100, "apple", "worm")
    assert train.labels[:5].tolist() == [19, 29, 0, 11, 1]


def test_cifar100_from_its_pickles_equals_the_parquet_files(
    data_root: Path, tmp_path: Path
) -> None:
    data = load_images("cifar100", "test", root=data_root)
    assert data.labels.bincount().tolist() == [100] * 100
    path = data_root / "cifar100" / "cifar100" / "test-00000-of-00001.parquet"
    table = pq.read_table(path, columns=["fine_label", "coarse_label"])
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    pixels = np.moveaxis(data.images.numpy(), 1, 3)
    fine, coarse = (table.column(name).to_pylist() for name in ("fine_label", "coarse_label"))
    write_cifar100(tmp_path, "test", pixels, fine, coarse, features["fine_label"]["names"])
    pickled = load_cifar_folder(tmp_path, "test", name="cifar100", known_md5=md5_of(tmp_path))
    assert pickled.sha256 == data.sha256
    assert pickled.classes == data.classes
    assert torch.equal(pickled.images, data.images)
