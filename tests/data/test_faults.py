"""Damaged files: every one ends in a documented error that names a file, or in the right result."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from data.samples import encode, hub_table, random_images, write_image_folder, write_parquet

from spem.data import ImageSet, load_images

ROUNDS = 60
Load = Callable[[str | None], ImageSet]
Case = tuple[Path, list[Path], Load]


def parquet_case(root: Path, kind: str, compression: str) -> Case:
    table = hub_table(random_images(8, 6, 5), [k % 3 for k in range(8)], ["a", "b", "c"], kind=kind)
    paths = [root / f"train-0000{part}-of-00002.parquet" for part in range(2)]
    for part, path in enumerate(paths):
        write_parquet(path, table.slice(4 * part, 4), compression=compression)
    return root, paths, lambda sum_: load_images(str(root), "train", sha256=sum_)


def folder_case(root: Path, kind: str) -> Case:
    images = random_images(4, 9, 7)
    write_image_folder(root, "test", {"a": images[:2], "b": images[2:]})
    paths = write_image_folder(root, "train", {"a": images[:2], "b": images[2:]})
    for path, image in zip(paths, images, strict=True):
        path.write_bytes(encode(image, kind))
    return root, paths, lambda sum_: load_images(str(root), "train", sha256=sum_)


CASES: dict[str, Callable[[Path], Case]] = {
    "parquet-png": lambda root: parquet_case(root, "PNG", "snappy"),
    "folder-png": lambda root: folder_case(root, "PNG"),
    "folder-jpeg": lambda root: folder_case(root, "JPEG"),
}


def damage(content: bytes, draw: random.Random) -> tuple[str, bytes]:
    """Cuts a file off, or changes one of its bytes."""
    if draw.random() < 0.5:
        return "cut", content[: draw.randrange(len(content))]
    changed = bytearray(content)
    changed[draw.randrange(len(content))] ^= draw.randrange(1, 256)
    return "flip", bytes(changed)


def outcomes(case: Case, sum_: str | None, seed: int) -> Counter[tuple[str, str]]:
    """Damages one file at a time and counts (damage, "error" | "right" | "other")."""
    _, paths, load = case
    right = load(sum_)
    draw, counts = random.Random(seed), Counter()
    for _ in range(ROUNDS):
        path = draw.choice(paths)
        content = path.read_bytes()
        kind, damaged = damage(content, draw)
        path.write_bytes(damaged)
        try:
            found, message = load(sum_), None
        except (ValueError, FileNotFoundError) as error:
            found, message = None, str(error)
        path.write_bytes(content)
        if found is None:
            # A known sum is that of all images together; else the damaged file is known.
            assert str(path) in str(message) or "SHA-256" in str(message)
            counts[kind, "error"] += 1
        else:
            same = (found.sha256, found.classes) == (right.sha256, right.classes)
            counts[kind, "right" if same else "other"] += 1
    assert sum(counts.values()) == ROUNDS
    return counts


@pytest.mark.parametrize("name", CASES)
def test_with_a_known_sum_every_damage_is_found_or_harmless(tmp_path: Path, name: str) -> None:
    case = CASES[name](tmp_path)
    counts = outcomes(case, case[2](None).sha256, seed=1)
    assert counts["cut", "other"] == counts["flip", "other"] == 0
    assert counts["cut", "error"] + counts["flip", "error"] > ROUNDS / 2


@pytest.mark.parametrize("name", CASES)
def test_without_a_sum_cut_off_files_are_found(tmp_path: Path, name: str) -> None:
    counts = outcomes(CASES[name](tmp_path), None, seed=3)
    assert counts["cut", "error"] > ROUNDS / 4
    assert counts["cut", "right"] == counts["cut", "other"] == 0
    assert counts["flip", "error"] > 0
    if name == "folder-png":  # each part of a PNG carries a checksum
        assert counts["flip", "other"] == 0


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_an_image_cut_off_anywhere_is_found(tmp_path: Path, kind: str) -> None:
    _, paths, load = folder_case(tmp_path, kind)
    content = paths[0].read_bytes()
    for length in [*range(0, len(content) - 20, 7), *range(len(content) - 20, len(content))]:
        paths[0].write_bytes(content[:length])
        with pytest.raises(ValueError, match=paths[0].name):
            load(None)
