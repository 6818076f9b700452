"""Damaged files: every one ends in a documented error that names a file, or in the right result."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from data.samples import encode, hub_table, random_images, write_image_folder, write_parquet

from spem.data import decode, load_images

ROUNDS = 60


def write(root: Path, layout: str) -> list[Path]:
    """A training set in a layout; its files."""
    if layout == "parquet":
        table = hub_table(random_images(8, 6, 5), [k % 3 for k in range(8)], ["a", "b", "c"])
        paths = [root / f"train-0000{part}-of-00002.parquet" for part in range(2)]
        for part, path in enumerate(paths):
            write_parquet(path, table.slice(4 * part, 4), compression="snappy")
        return paths
    images = random_images(4, 9, 7)
    write_image_folder(root, "test", {"a": images[:2], "b": images[2:]})
    paths = write_image_folder(root, "train", {"a": images[:2], "b": images[2:]})
    for path, image in zip(paths, images, strict=True):
        path.write_bytes(encode(image, layout))
    return paths


def damage(content: bytes, draw: random.Random) -> tuple[str, bytes]:
    """Cuts a file off, or changes one of its bytes."""
    if draw.random() < 0.5:
        return "cut", content[: draw.randrange(len(content))]
    changed = bytearray(content)
    changed[draw.randrange(len(content))] ^= draw.randrange(1, 256)
    return "flip", bytes(changed)


@pytest.mark.parametrize("sum_is_known", [True, False])
@pytest.mark.parametrize("layout", ["parquet", "PNG", "JPEG"])
def test_damage_is_found_or_harmless(tmp_path: Path, layout: str, sum_is_known: bool) -> None:
    paths = write(tmp_path, layout)
    right = load_images(str(tmp_path), "train")
    draw, counts = random.Random(1), Counter[tuple[str, str]]()
    for _ in range(ROUNDS):
        path = draw.choice(paths)
        content = path.read_bytes()
        kind, damaged = damage(content, draw)
        path.write_bytes(damaged)
        said = str(path)
        try:
            known = right.sha256 if sum_is_known else None
            found = load_images(str(tmp_path), "train", sha256=known)
            same = (found.sha256, found.classes) == (right.sha256, right.classes)
            counts[kind, "right" if same else "other"] += 1
        except (ValueError, FileNotFoundError) as error:
            said = str(error)
            counts[kind, "error"] += 1
        path.write_bytes(content)
        # A known sum is that of all images together; else the damaged file is known.
        assert str(path) in said or "SHA-256" in said
    assert counts["cut", "error"] > ROUNDS / 4
    assert counts["flip", "error"] > 0
    assert counts["cut", "other"] == 0
    if sum_is_known or layout == "PNG":  # each part of a PNG carries a checksum
        assert counts["flip", "other"] == 0


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_an_image_cut_off_anywhere_is_found(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind)[0]
    content = path.read_bytes()
    for length in [*range(0, len(content) - 20, 7), *range(len(content) - 20, len(content))]:
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=path.name):
            load_images(str(tmp_path), "train")


def test_no_flipped_bit_of_a_png_goes_unnoticed() -> None:
    """Decoding alone leaves out checksums of what it has read enough of."""
    ramp = np.add.outer(np.arange(20) * 3, np.arange(30) * 4).astype(np.uint8)
    content = encode(np.dstack([ramp] * 4))
    right = decode("whole", content)
    for i in range(len(content)):
        flipped = bytearray(content)
        flipped[i] ^= 1
        try:
            found = decode("flipped", bytes(flipped))
        except ValueError:
            continue
        assert np.array_equal(found, right), i
