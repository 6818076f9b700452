from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from data.samples import encode, hub_table, random_images, write_parquet
from PIL import Image
from torchvision import transforms

from spem.data import load_images

CLASSES = ["cat", "dog", "eel"]
IMAGES = random_images(10, 6, 5)
LABELS = [k % 3 for k in range(10)]


def write_set(root: Path, *, kind: str = "PNG", label: str = "label", **options: object) -> Path:
    """Ten training images in two files, four test images in one."""
    table = hub_table(IMAGES, LABELS, CLASSES, label=label, kind=kind, **options)
    write_parquet(root / "plain_text" / "train-00000-of-00002.parquet", table.slice(0, 7))
    write_parquet(root / "plain_text" / "train-00001-of-00002.parquet", table.slice(7))
    write_parquet(root / "plain_text" / "test-00000-of-00001.parquet", table.slice(2, 4))
    return root


@pytest.mark.parametrize(
    ("kind", "options", "label"),
    [("PNG", {}, "fine_label"), ("WEBP", {"lossless": True, "exact": True}, "label")],
)
def test_files_are_read_in_order_and_decoded(
    tmp_path: Path, kind: str, options: dict, label: str
) -> None:
    folder = write_set(tmp_path / "pets", kind=kind, label=label, **options)
    train, test = load_images(str(folder), "train"), load_images(str(folder), "test")
    assert np.array_equal(train.images.permute(0, 2, 3, 1).numpy(), IMAGES)
    assert train.labels.tolist() == LABELS
    assert np.array_equal(test.images.permute(0, 2, 3, 1).numpy(), IMAGES[2:6])
    assert test.labels.tolist() == LABELS[2:6]
    assert train.classes == test.classes == tuple(CLASSES)
    assert train.name == "pets"
    assert train.images.is_contiguous()
    small = load_images(str(folder), "test", size=4).images.permute(0, 2, 3, 1).numpy()
    bring = transforms.Compose([transforms.Resize(4), transforms.CenterCrop(4)])
    assert all(np.array_equal(small[i], bring(Image.fromarray(IMAGES[2 + i]))) for i in range(4))


def test_other_places_and_columns_do_as_well(tmp_path: Path) -> None:
    folder = write_set(tmp_path)
    inner = load_images(str(folder / "plain_text"), "train")
    assert inner.sha256 == load_images(str(folder), "train").sha256
    table = hub_table(IMAGES, LABELS, CLASSES, label="fine_label")
    table = table.append_column("label", pa.array([0] * 10, pa.int64()))  # the fine one counts
    write_parquet(tmp_path / "other" / "test.parquet", table)
    assert load_images(str(tmp_path / "other"), "test").labels.tolist() == LABELS
    for split in ("train", "validation"):  # as good as test
        write_parquet(tmp_path / "third" / f"{split}-00000-of-00001.parquet", table)
    assert load_images(str(tmp_path / "third"), "test").labels.tolist() == LABELS


def test_jpeg_and_grey_images_become_three_channels(tmp_path: Path) -> None:
    table = hub_table(IMAGES[..., 0], LABELS, CLASSES)
    write_parquet(tmp_path / "test-00000-of-00001.parquet", table)
    grey = load_images(str(tmp_path), "test").images
    assert all(np.array_equal(grey[:, c].numpy(), IMAGES[..., 0]) for c in range(3))
    flat = np.full((1, 16, 16, 3), (200, 60, 30), dtype=np.uint8)
    write_parquet(tmp_path / "jpeg" / "test.parquet", hub_table(flat, [0], CLASSES, kind="JPEG"))
    decoded = load_images(str(tmp_path / "jpeg"), "test").images[0].permute(1, 2, 0).numpy()
    assert np.abs(decoded.astype(int) - flat[0]).max() <= 3


def test_named_sets_are_found_under_root_and_in_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_set(tmp_path / "one" / "cifar10")
    write_set(tmp_path / "two" / "cifar10", label="fine_label")
    table = hub_table(IMAGES[:3], [0, 0, 0], CLASSES)
    write_parquet(
        tmp_path / "two" / "cifar10" / "plain_text" / "test-00000-of-00001.parquet", table
    )
    monkeypatch.setenv("SPEM_DATA", str(tmp_path / "two"))
    for name in ("cifar10", "uoft-cs/cifar10"):
        assert len(load_images(name, "test")) == 3
        found = load_images(name, "test", root=tmp_path / "one")
        assert len(found) == 4
        assert found.name == "cifar10"
    with pytest.raises(FileNotFoundError, match="cifar100 does not exist"):
        load_images("cifar100", "test", root=tmp_path / "one")


def test_missing_and_mixed_up_files_are_named(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "a")
    (folder / "plain_text" / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"train-00001-of-00002\.parquet is missing"):
        load_images(str(folder), "train")
    (folder / "plain_text" / "test-00000-of-00001.parquet").unlink()
    with pytest.raises(FileNotFoundError, match="no parquet file of the split 'test'"):
        load_images(str(folder), "test")
    table = hub_table(IMAGES, LABELS, CLASSES)
    write_parquet(folder / "plain_text" / "train-00000-of-00001.parquet", table)
    with pytest.raises(ValueError, match="several versions"):
        load_images(str(folder), "train")
    write_set(tmp_path / "b")
    write_parquet(tmp_path / "b" / "other" / "train-00000-of-00001.parquet", table)
    with pytest.raises(ValueError, match="several folders hold the split 'train'"):
        load_images(str(tmp_path / "b"), "train")
    (tmp_path / "b" / "other" / "train-00000-of-00001.parquet").unlink()
    table = hub_table(IMAGES[:2], [0, 1], ["dog", "cat", "eel"])
    write_parquet(tmp_path / "b" / "plain_text" / "train-00001-of-00002.parquet", table)
    with pytest.raises(ValueError, match="disagree on the classes"):
        load_images(str(tmp_path / "b"), "train")


def rewrite(**changes: object) -> pa.Table:
    """The good table with columns replaced; None drops one."""
    table = hub_table(IMAGES[:3], [0, 1, 2], CLASSES)
    columns = {name: table.column(name) for name in table.column_names}
    columns = {k: v for k, v in {**columns, **changes}.items() if v is not None}
    return pa.table(columns).replace_schema_metadata(table.schema.metadata)


STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
GOOD = {"bytes": encode(IMAGES[0]), "path": None}
WIDE = {"bytes": encode(random_images(1, 6, 7)[0]), "path": None}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (rewrite(img=None), "an image column"),
        (rewrite(label=None), "a label column"),
        (rewrite(img=pa.array(["a", "b", "c"])), "structs with the bytes"),
        (rewrite(img=pa.array([GOOD, GOOD, None], STRUCT)), "structs with the bytes"),
        (rewrite(img=pa.array([GOOD, {"bytes": None}, GOOD], STRUCT)), "structs with the bytes"),
        (rewrite(img=pa.array([GOOD, {"bytes": b"GIF89a"}, GOOD], STRUCT)), "row 1: not an image"),
        (rewrite(img=pa.array([GOOD, GOOD, WIDE], STRUCT)), "2 different sizes"),
        (rewrite(label=pa.array([0, None, 1], pa.int64())), "whose label is none of"),
        (rewrite(label=pa.array([0.5, 1, 1])), "no class names"),
        (rewrite(label=pa.array([0, 3, 1], pa.int64())), "whose label is none of 3 classes"),
        (rewrite().slice(0, 0), "there are no images"),
        (rewrite().replace_schema_metadata(None), "no class names"),
        (rewrite().replace_schema_metadata({"huggingface": "{"}), "not a readable parquet file"),
    ],
)
def test_other_contents_are_refused_with_the_files_name(
    tmp_path: Path, table: pa.Table, message: str
) -> None:
    write_parquet(tmp_path / "train-00000-of-00001.parquet", table)
    with pytest.raises(ValueError, match=message) as raised:
        load_images(str(tmp_path), "train")
    assert str(tmp_path / "train-00000-of-00001.parquet") in str(raised.value)
