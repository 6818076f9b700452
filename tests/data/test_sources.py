from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from data.samples import hub_table, random_images

from spem.data import load_images

datasets = pytest.importorskip("datasets", reason="no datasets")


def test_unknown_names_list_the_known_and_the_nearest() -> None:
    with pytest.raises(FileNotFoundError, match=r"digits, cifar10.*Did you mean .*cifar10"):
        load_images("cifar-10", "train")
    with pytest.raises(FileNotFoundError, match="nor a folder"):
        load_images("/nowhere/at/all", "train")


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("nothing here")
    with pytest.raises(FileNotFoundError, match="no known layout"):
        load_images(str(tmp_path), "train")


def test_other_splits_and_a_root_for_a_path_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="split='val' is unknown"):
        load_images("digits", "val")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="a root is for named sets"):
        load_images(str(tmp_path), "train", root=tmp_path)


@pytest.mark.parametrize(
    ("name", "hub_id", "label"),
    [("cifar10", "uoft-cs/cifar10", "label"), ("cifar100", "uoft-cs/cifar100", "fine_label")],
)
def test_without_a_local_folder_the_hub_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, hub_id: str, label: str
) -> None:
    images, calls = random_images(5, 4, 6), []

    def record(*arguments: object, **options: object) -> object:
        calls.append((arguments, options))
        return datasets.Dataset(hub_table(images, [0, 1, 2, 1, 0], ["a", "b", "c"], label=label))

    monkeypatch.setattr(datasets, "load_dataset", record)
    monkeypatch.setenv("SPEM_DATA", str(tmp_path))
    for asked in (name, hub_id):
        data = load_images(asked, "test")
        assert np.array_equal(data.images.permute(0, 2, 3, 1).numpy(), images)
        assert data.labels.tolist() == [0, 1, 2, 1, 0]
        assert data.classes == ("a", "b", "c")
        assert data.name == name
    assert calls == [((hub_id,), {"split": "test"})] * 2
    with pytest.raises(ValueError, match="SHA-256 of the test images is"):
        load_images(name, "test", sha256="0" * 64)


def test_a_silent_hub_ends_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> object:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    monkeypatch.delenv("SPEM_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match=r"ConnectionError: no route.*SPEM_DATA or"):
        load_images("cifar10", "train")
