"""What a name or a path leads to: the digits, CIFAR's own files, the hub, or a refusal."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from data.samples import (
    hub_table,
    md5_of,
    random_images,
    write_cifar10,
    write_cifar100,
    write_parquet,
)

from spem.data import load_images

hub = pytest.importorskip("huggingface_hub", reason="no huggingface_hub")
IMAGES = random_images(12, 32, 32)
LABELS = [3, 1, 9, 0, 2, 8, 7, 4, 5, 6, 1, 2]


def to_numpy(images: torch.Tensor) -> np.ndarray:
    return images.permute(0, 2, 3, 1).numpy()


def test_what_is_no_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"digits, cifar10.*Did you mean .*cifar10"):
        load_images("cifar-10", "train")
    with pytest.raises(FileNotFoundError, match="nor a folder"):
        load_images("/nowhere/at/all", "train")
    (tmp_path / "readme.txt").write_text("nothing here")
    with pytest.raises(FileNotFoundError, match="no known layout"):
        load_images(str(tmp_path), "train")
    with pytest.raises(ValueError, match="split='val' is unknown"):
        load_images("digits", "val")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="a root is for named sets"):
        load_images(str(tmp_path), "train", root=tmp_path)


@pytest.mark.parametrize(("size", "side"), [(None, 16), (32, 32)])
def test_digits_are_scikit_learns_repeated_in_rows_columns_and_channels(
    size: int | None, side: int
) -> None:
    bunch = pytest.importorskip("sklearn.datasets", reason="no scikit-learn").load_digits()
    for split, part in (("train", slice(0, 1437)), ("test", slice(1437, 1797))):
        data = load_images("digits", split, size=size)
        grey = np.floor(bunch.images[part] * 255 / 16 + 0.5)
        expected = np.kron(grey, np.ones((1, side // 8, side // 8)))
        assert np.array_equal(to_numpy(data.images), np.stack([expected] * 3, axis=-1))
        assert data.labels.tolist() == bunch.target[part].tolist()
        assert (data.classes, data.name) == (tuple("0123456789"), "digits")
    for wrong in (0, 12, 8000):
        with pytest.raises(ValueError, match=f"size={wrong} is not a multiple of 8"):
            load_images("digits", "train", size=wrong)


# ---- CIFAR's own files, read by torchvision


def publish(folder: Path, kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take these files for the published ones."""
    sums = md5_of(folder)
    for name in ("train_list", "test_list"):
        listed = [[file, sums[file]] for file, _ in getattr(kind, name) if file in sums]
        monkeypatch.setattr(kind, name, listed)
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": sums[kind.meta["filename"]]})


@pytest.fixture
def cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_cifar10(tmp_path / "anything", IMAGES, LABELS)
    publish(tmp_path / "anything", torchvision.datasets.CIFAR10, monkeypatch)
    return tmp_path / "anything"


def test_cifar10_batches_are_joined_in_order(
    cifar10: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, test = (load_images(str(cifar10), split) for split in ("train", "test"))
    assert np.array_equal(to_numpy(train.images), IMAGES[:10])
    assert np.array_equal(to_numpy(test.images), IMAGES[10:])
    assert train.labels.tolist() + test.labels.tolist() == LABELS
    assert train.classes == test.classes == tuple(f"class{k}" for k in range(10))
    assert train.name == "anything"
    assert load_images(str(cifar10), "test", size=8).images.shape == (2, 3, 8, 8)
    monkeypatch.setenv("SPEM_DATA", str(cifar10.parent))
    cifar10.rename(cifar10.parent / "cifar10")
    assert torch.equal(load_images("cifar10", "train").images, train.images)
    monkeypatch.chdir(
        cifar10.parent
    )  # a relative path is taken as it is, whatever the variable says
    (cifar10.parent / "cifar10").rename("mine")
    monkeypatch.setenv("SPEM_DATA", str(cifar10.parent / "elsewhere"))
    assert torch.equal(load_images("mine", "train").images, train.images)


def test_cifar100_has_its_fine_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fine, names = [99, 0, *range(10, 20)], [f"fine{k}" for k in range(100)]
    for split in ("train", "test"):
        write_cifar100(tmp_path / "c", split, IMAGES, fine, names)
    publish(tmp_path / "c", torchvision.datasets.CIFAR100, monkeypatch)
    for split in ("train", "test"):
        data = load_images(str(tmp_path / "c"), split)
        assert np.array_equal(to_numpy(data.images), IMAGES)
        assert (data.labels.tolist(), data.classes) == (fine, tuple(names))


class Call:
    """Pickles as a call."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.mkdir, (self.path,)


def test_nothing_but_the_published_files_is_unpickled(tmp_path: Path, cifar10: Path) -> None:
    write_cifar10(tmp_path / "own", IMAGES[:6], LABELS[:6])
    with pytest.raises(ValueError, match=r"own: a file of CIFAR10 is missing or its MD5 sum"):
        load_images(str(tmp_path / "own"), "train")
    trap = pickle.dumps({"data": Call(tmp_path / "made"), "labels": [1]})
    for name in ("test_batch", "data_batch_3", "batches.meta"):
        whole = (cifar10 / name).read_bytes()
        for content in (trap, whole[:-1], whole[:99] + b"x" + whole[100:], b"", None):
            (cifar10 / name).unlink() if content is None else (cifar10 / name).write_bytes(content)
            with pytest.raises(ValueError, match="Unpack the whole archive again"):
                load_images(str(cifar10), "train")
        (cifar10 / name).write_bytes(whole)
    assert not (tmp_path / "made").exists()
    assert len(load_images(str(cifar10), "test")) == 2


# ---- the hub


@pytest.mark.parametrize(
    ("name", "hub_id", "label"),
    [("cifar10", "uoft-cs/cifar10", "label"), ("cifar100", "uoft-cs/cifar100", "fine_label")],
)
def test_without_a_local_folder_the_hub_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, hub_id: str, label: str
) -> None:
    images, calls = random_images(5, 4, 6), []
    table = hub_table(images, [0, 1, 2, 1, 0], ["a", "b", "c"], label=label)
    write_parquet(tmp_path / "kept" / "plain_text" / "test-00000-of-00001.parquet", table)

    def record(*arguments: object, **options: object) -> str:
        calls.append((arguments, options))
        return str(tmp_path / "kept")

    monkeypatch.setattr(hub, "snapshot_download", record)
    monkeypatch.setenv("SPEM_DATA", str(tmp_path))
    for asked in (name, hub_id):
        data = load_images(asked, "test")
        assert np.array_equal(to_numpy(data.images), images)
        assert data.labels.tolist() == [0, 1, 2, 1, 0]
        assert (data.classes, data.name) == (("a", "b", "c"), name)
    assert calls == [((hub_id,), {"repo_type": "dataset", "allow_patterns": "*.parquet"})] * 2
    with pytest.raises(ValueError, match="SHA-256 of the test images is"):
        load_images(name, "test", sha256="0" * 64)


def test_an_unreachable_hub_is_told_in_a_line_and_not_asked_again(
    unreachable_hub: list[float],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("SPEM_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match=r"not be fetched .* SPEM_DATA or") as raised:
        load_images("cifar10", "train")
    assert str(raised.value).count("\n") == sum(unreachable_hub) == 0
    assert capfd.readouterr() == ("", "")
