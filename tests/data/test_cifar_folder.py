"""CIFAR's own files, read by torchvision: the published ones, and nothing else is unpickled."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from data.samples import md5_of, random_images, write_cifar10, write_cifar100

from spem.data import load_images

IMAGES = random_images(12, 32, 32)
LABELS = [3, 1, 9, 0, 2, 8, 7, 4, 5, 6, 1, 2]
NAMES100 = [f"fine{k}" for k in range(100)]


def publish(folder: Path, kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take these files for the published ones."""
    sums = md5_of(folder)
    for name in ("train_list", "test_list"):
        listed = [[file, sums[file]] for file, _ in getattr(kind, name) if file in sums]
        monkeypatch.setattr(kind, name, listed)
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": sums[kind.meta["filename"]]})


def cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "anything"
    write_cifar10(folder, IMAGES, LABELS)
    for name in ("train_list", "test_list"):
        assert len(getattr(torchvision.datasets.CIFAR10, name)) in (1, 5)
    publish(folder, torchvision.datasets.CIFAR10, monkeypatch)
    return folder


def test_cifar10_batches_are_joined_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = cifar10(tmp_path, monkeypatch)
    train, test = (load_images(str(folder), split) for split in ("train", "test"))
    assert np.array_equal(train.images.permute(0, 2, 3, 1).numpy(), IMAGES[:10])
    assert np.array_equal(test.images.permute(0, 2, 3, 1).numpy(), IMAGES[10:])
    assert train.labels.tolist() + test.labels.tolist() == LABELS
    assert train.classes == test.classes == tuple(f"class{k}" for k in range(10))
    assert train.name == "anything"
    assert load_images(str(folder), "test", size=8).images.shape == (2, 3, 8, 8)
    monkeypatch.setenv("SPEM_DATA", str(tmp_path))
    folder.rename(tmp_path / "cifar10")
    assert torch.equal(load_images("cifar10", "train").images, train.images)


def test_cifar100_has_its_fine_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fine = [99, 0, *range(10, 20)]
    for split in ("train", "test"):
        write_cifar100(tmp_path / "c", split, IMAGES, fine, [5] * 12, NAMES100)
    publish(tmp_path / "c", torchvision.datasets.CIFAR100, monkeypatch)
    for split in ("train", "test"):
        data = load_images(str(tmp_path / "c"), split)
        assert np.array_equal(data.images.permute(0, 2, 3, 1).numpy(), IMAGES)
        assert data.labels.tolist() == fine
        assert data.classes == tuple(NAMES100)


class Call:
    """Pickles as a call."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.mkdir, (self.path,)


def test_nothing_but_the_published_files_is_unpickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cifar10(tmp_path / "own", IMAGES, LABELS)
    with pytest.raises(ValueError, match=r"own: a file of CIFAR10 is missing or its MD5 sum"):
        load_images(str(tmp_path / "own"), "train")
    folder = cifar10(tmp_path, monkeypatch)
    trap = pickle.dumps({"data": Call(tmp_path / "made"), "labels": [1]})
    for name in ("test_batch", "data_batch_3", "batches.meta"):
        whole = (folder / name).read_bytes()
        for content in (trap, whole[:-1], whole[:99] + b"x" + whole[100:], b""):
            (folder / name).write_bytes(content)
            with pytest.raises(ValueError, match="Unpack the whole archive again"):
                load_images(str(folder), "train")
        (folder / name).unlink()
        with pytest.raises(ValueError, match="Unpack the whole archive again"):
            load_images(str(folder), "test")
        (folder / name).write_bytes(whole)
    assert not (tmp_path / "made").exists()
    assert len(load_images(str(folder), "test")) == 2
