from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from data.samples import encode, random_images, sha256_of, write_image_folder
from PIL import Image

from spem.data import load_images

CATS, DOGS = random_images(3, 5, 7, seed=1), random_images(2, 5, 7, seed=2)


def write_set(root: Path) -> list[Path]:
    write_image_folder(root, "test", {"dog": DOGS[:1], "cat": CATS[:1]})
    return write_image_folder(root, "train", {"dog": DOGS, "cat": CATS})


def test_folders_are_classes_in_the_order_of_their_names(tmp_path: Path) -> None:
    paths = write_set(tmp_path)
    train = load_images(str(tmp_path), "train")
    assert np.array_equal(train.images.permute(0, 2, 3, 1).numpy(), np.concatenate([CATS, DOGS]))
    assert train.labels.tolist() == [0, 0, 0, 1, 1]
    assert train.classes == ("cat", "dog")
    assert load_images(str(tmp_path), "test").labels.tolist() == [0, 1]
    assert load_images(str(tmp_path), "train", sha256=sha256_of(paths)).sha256 == train.sha256
    with pytest.raises(ValueError, match="SHA-256 is"):
        load_images(str(tmp_path), "train", sha256="0" * 64)


def test_deeper_folders_count_and_other_files_do_not(tmp_path: Path) -> None:
    write_set(tmp_path)
    cat = tmp_path / "train" / "cat"
    (cat / "notes.txt").write_text("no image")
    (cat / ".hidden.png").write_text("no image")
    (cat / "more").mkdir()
    (cat / "more" / "x.JPG").write_bytes(encode(CATS[0], "JPEG"))
    (tmp_path / "train" / ".cache").mkdir()
    train = load_images(str(tmp_path), "train")
    assert train.labels.tolist() == [0, 0, 0, 0, 1, 1]
    assert train.classes == ("cat", "dog")


def test_grey_palette_and_transparent_images_become_colour(tmp_path: Path) -> None:
    grey = CATS[0, ..., 0]
    folder = tmp_path / "test" / "a"
    folder.mkdir(parents=True)
    Image.fromarray(grey).save(folder / "0.png")
    Image.fromarray(np.dstack([CATS[0], grey]), "RGBA").save(folder / "1.png")
    Image.fromarray(grey).convert("P").save(folder / "2.png")
    images = load_images(str(tmp_path), "test").images.permute(0, 2, 3, 1).numpy()
    assert np.array_equal(images[0], np.dstack([grey] * 3))
    assert np.array_equal(images[1], CATS[0])
    assert np.array_equal(images[2], np.dstack([grey] * 3))


def test_what_is_missing_or_differs_is_named(tmp_path: Path) -> None:
    write_set(tmp_path)
    (tmp_path / "train" / "eel").mkdir()
    with pytest.raises(ValueError, match="eel is in one only"):
        load_images(str(tmp_path), "train")
    (tmp_path / "test" / "eel").mkdir()
    with pytest.raises(FileNotFoundError, match=r"eel: no image \(.png"):
        load_images(str(tmp_path), "train")
    (tmp_path / "train" / "eel" / "0.png").write_bytes(encode(random_images(1, 9, 9)[0]))
    with pytest.raises(
        ValueError, match=r"eel/0\.png: the image is 9x9, the first of the set is 7x5"
    ):
        load_images(str(tmp_path), "train")
    (tmp_path / "only" / "train").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="holds no folders"):
        load_images(str(tmp_path / "only"), "train")
    with pytest.raises(FileNotFoundError, match="the split has no folder"):
        load_images(str(tmp_path / "only"), "test")


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("side", [5_000, 60_000, 2**31 - 1])
def test_absurd_sizes_are_refused_before_they_fill_memory(tmp_path: Path, side: int) -> None:
    write_set(tmp_path)
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", b"") + png_chunk(b"IEND", b"")
    (tmp_path / "train" / "cat" / "000.png").write_bytes(bomb)
    with pytest.raises(ValueError, match=r"cat/000\.png: not a readable image \(.*pixels"):
        load_images(str(tmp_path), "train")


def test_other_kinds_of_files_are_not_opened(tmp_path: Path) -> None:
    """Pillow would hand some kinds to external programs; the suffix must not decide."""
    write_set(tmp_path)
    Image.fromarray(CATS[0]).save(tmp_path / "x.eps")
    (tmp_path / "x.eps").rename(tmp_path / "train" / "cat" / "000.png")
    with pytest.raises(ValueError, match="not an image of a known kind"):
        load_images(str(tmp_path), "train")
