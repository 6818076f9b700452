from __future__ import annotations

import io
import os
import pickle
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from data.samples import (
    md5_of,
    python2_pickle,
    random_images,
    sha256_of,
    write_cifar10,
    write_cifar100,
)

from spem.data import load_images
from spem.data.cifar_folder import PUBLISHED_MD5, load_cifar_folder, restricted_load

IMAGES = random_images(12, 32, 32)
LABELS = [3, 1, 9, 0, 2, 8, 7, 4, 5, 6, 1, 2]
NAMES100 = [f"fine{k}" for k in range(100)]

DUMPS = [python2_pickle, partial(pickle.dumps, protocol=3), partial(pickle.dumps, protocol=4)]


@pytest.mark.parametrize("dump", DUMPS, ids=["python2", "protocol3", "protocol4"])
def test_cifar10_batches_are_joined_in_order(tmp_path: Path, dump) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    write_cifar10(folder, IMAGES, LABELS, dump)
    sums = md5_of(folder)
    train = load_cifar_folder(folder, "train", name="c", known_md5=sums)
    test = load_cifar_folder(folder, "test", name="c", known_md5=sums)
    assert np.array_equal(train.images.permute(0, 2, 3, 1).numpy(), IMAGES[:10])
    assert np.array_equal(test.images.permute(0, 2, 3, 1).numpy(), IMAGES[10:])
    assert train.labels.tolist() + test.labels.tolist() == LABELS
    assert train.classes == test.classes == tuple(f"class{k}" for k in range(10))


@pytest.mark.parametrize("dump", DUMPS, ids=["python2", "protocol3", "protocol4"])
def test_cifar100_has_its_fine_labels(tmp_path: Path, dump) -> None:
    fine = [99, 0, *range(10, 20)]
    for split in ("train", "test"):
        write_cifar100(tmp_path, split, IMAGES, fine, [5] * 12, NAMES100, dump)
        data = load_cifar_folder(tmp_path, split, name="c", known_md5=md5_of(tmp_path))
        assert np.array_equal(data.images.permute(0, 2, 3, 1).numpy(), IMAGES)
        assert data.labels.tolist() == fine
        assert data.classes == tuple(NAMES100)


@pytest.mark.filterwarnings("ignore")  # torchvision's unpickler asks numpy for its old names
def test_torchvision_reads_the_same(tmp_path: Path) -> None:
    torchvision = pytest.importorskip("torchvision.datasets", reason="no torchvision")
    folder = tmp_path / "cifar-10-batches-py"
    write_cifar10(folder, IMAGES, LABELS)
    sums = md5_of(folder)

    members = {
        "train_list": [[f"data_batch_{k}", sums[f"data_batch_{k}"]] for k in range(1, 6)],
        "test_list": [["test_batch", sums["test_batch"]]],
        "meta": {**torchvision.CIFAR10.meta, "md5": sums["batches.meta"]},
    }
    small = type("Small", (torchvision.CIFAR10,), members)
    for split in ("train", "test"):
        theirs = small(str(tmp_path), train=split == "train")
        ours = load_cifar_folder(folder, split, name="c", known_md5=sums)
        assert np.array_equal(ours.images.permute(0, 2, 3, 1).numpy(), theirs.data)
        assert ours.labels.tolist() == theirs.targets
        assert list(ours.classes) == theirs.classes


def test_published_sums_are_those_torchvision_lists() -> None:
    torchvision = pytest.importorskip("torchvision.datasets", reason="no torchvision")
    listed: dict[str, str] = {}
    for kind in (torchvision.CIFAR10, torchvision.CIFAR100):
        listed |= dict(kind.train_list) | dict(kind.test_list)
        listed[kind.meta["filename"]] = kind.meta["md5"]
    assert listed == PUBLISHED_MD5


def test_by_its_path_only_published_files_are_read(tmp_path: Path) -> None:
    write_cifar10(tmp_path / "cifar-10-batches-py", IMAGES, LABELS)
    with pytest.raises(ValueError, match=r"batches\.meta: MD5 is .* published file has 5ff9c542"):
        load_images(str(tmp_path / "cifar-10-batches-py"), "train")
    write_cifar100(tmp_path / "cifar-100-python", "test", IMAGES, LABELS, LABELS, NAMES100)
    with pytest.raises(ValueError, match=r"meta: MD5 is .* published file has 7973b151"):
        load_images(str(tmp_path / "cifar-100-python"), "test")


def test_a_given_sum_covers_the_splits_files_and_the_names(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    write_cifar10(folder, IMAGES, LABELS)
    sums = md5_of(folder)
    right = sha256_of([folder / "batches.meta", folder / "test_batch"])
    load_cifar_folder(folder, "test", name="c", known_md5=sums, sha256=right)
    with pytest.raises(ValueError, match="SHA-256 is"):
        load_cifar_folder(folder, "train", name="c", known_md5=sums, sha256=right)


def test_missing_and_unlisted_files_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    write_cifar10(folder, IMAGES, LABELS)
    sums = md5_of(folder)
    short = {name: value for name, value in sums.items() if name != "data_batch_3"}
    with pytest.raises(ValueError, match="no MD5 sum is known for data_batch_3"):
        load_cifar_folder(folder, "train", name="c", known_md5=short)
    (folder / "data_batch_4").unlink()
    with pytest.raises(FileNotFoundError, match="data_batch_4: missing"):
        load_cifar_folder(folder, "train", name="c", known_md5=sums)
    assert len(load_cifar_folder(folder, "test", name="c", known_md5=sums)) == 2
    with pytest.raises(FileNotFoundError, match="none of CIFAR's files"):
        load_cifar_folder(tmp_path, "test", name="c", known_md5=sums)


GOOD = {"data": np.zeros((2, 3072), dtype=np.uint8), "labels": [1, 2]}


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([1, 2], "holds a list"),
        ({"labels": [1, 2]}, "lacks an array 'data'"),
        ({**GOOD, "data": b"abc"}, "lacks an array 'data'"),
        ({**GOOD, "labels": 3}, "a list 'labels'"),
        ({**GOOD, "labels": [1, 2, 3]}, "3 labels need uint8"),
        ({**GOOD, "labels": []}, "0 labels need"),
        ({**GOOD, "data": np.zeros((2, 3071), dtype=np.uint8)}, r"shape \(2, 3071\)"),
        ({**GOOD, "labels": [1, 10]}, "numbers from 0 to 9"),
        ({**GOOD, "labels": [-1, 1]}, "numbers from 0 to 9"),
        ({**GOOD, "labels": ["a", 1]}, "numbers from 0 to 9"),
    ],
)
def test_other_contents_are_refused_with_the_files_name(
    tmp_path: Path, batch: object, message: str
) -> None:
    folder = tmp_path / "c"
    write_cifar10(folder, IMAGES, LABELS)
    (folder / "test_batch").write_bytes(python2_pickle(batch))
    with pytest.raises(ValueError, match=message) as raised:
        load_cifar_folder(folder, "test", name="c", known_md5=md5_of(folder))
    assert str(folder / "test_batch") in str(raised.value)


@pytest.mark.parametrize("names", [None, "abc", ["a"] * 9, [1] * 10])
def test_other_class_names_are_refused(tmp_path: Path, names: object) -> None:
    folder = tmp_path / "c"
    write_cifar10(folder, IMAGES, LABELS)
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}, protocol=2))
    with pytest.raises(ValueError, match=r"batches\.meta: .*'label_names'"):
        load_cifar_folder(folder, "test", name="c", known_md5=md5_of(folder))


class Call:
    """Pickles as a call of anything."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.call


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "function", [os.mkdir, eval, getattr, io.open, np.load, np.frombuffer, np.asarray, np.ndarray]
)
def test_a_pickle_that_calls_anything_is_refused_and_nothing_runs(
    tmp_path: Path, function: object, protocol: int
) -> None:
    folder = tmp_path / "c"
    write_cifar10(folder, IMAGES, LABELS)
    trap = {"data": Call(function, str(tmp_path / "made")), "labels": [1]}
    (folder / "test_batch").write_bytes(pickle.dumps(trap, protocol=protocol))
    with pytest.raises(ValueError, match="test_batch: not a CIFAR file"):
        load_cifar_folder(folder, "test", name="c", known_md5=md5_of(folder))
    assert not (tmp_path / "made").exists()


def array_call(kind: bytes, shape: bytes, code: bytes) -> bytes:
    """Numpy's reconstruction of an array with chosen arguments, as Python 2 wrote it."""
    head = b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n"
    return head + kind + shape + b"U" + bytes([len(code)]) + code + b"\x87R."


NDARRAY = b"cnumpy\nndarray\n"
ZERO, HUGE = b"K\x00\x85", b"\x8a\x06" + (10**13).to_bytes(6, "little") + b"\x85"


def test_arrays_of_another_kind_size_or_type_are_refused() -> None:
    assert np.array_equal(restricted_load(array_call(NDARRAY, ZERO, b"b")), np.empty(0, np.uint8))
    for call in (
        array_call(NDARRAY, HUGE, b"b"),  # would take ten terabytes
        array_call(NDARRAY, ZERO, b"O"),
        array_call(b"K\x01", ZERO, b"b"),
    ):
        with pytest.raises(pickle.UnpicklingError, match="asks for an array"):
            restricted_load(call)
    for code in (b"O8", b"f8", b"V99"):
        kind = b"\x80\x02cnumpy\ndtype\nU" + bytes([len(code)]) + code + b"K\x00K\x01\x87R."
        with pytest.raises(pickle.UnpicklingError, match="array of type"):
            restricted_load(kind)
