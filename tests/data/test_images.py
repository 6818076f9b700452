from __future__ import annotations

import hashlib
import struct
from typing import Any

import pytest
import torch

from spem.data import ImageSet, checksum, hold_out


def make(n: int = 10, **changes: object) -> ImageSet:
    fields: dict[str, Any] = {
        "images": torch.randint(0, 256, (n, 3, 4, 5), dtype=torch.uint8),
        "labels": torch.arange(n) % 3,
        "classes": ("a", "b", "c"),
        "name": "made",
    }
    return ImageSet(**{**fields, **changes})


def test_checksum_is_sha256_of_shape_pixels_and_labels() -> None:
    data = make(4)
    pixels = bytes(data.images.flatten().tolist())
    labels = struct.pack("<4q", *data.labels.tolist())
    expected = hashlib.sha256(b"uint8 4 3 4 5\n" + pixels + labels).hexdigest()
    assert data.sha256 == expected == checksum(data.images, data.labels)


def test_checksum_does_not_depend_on_memory_format_but_on_shape_pixels_and_labels() -> None:
    data = make()
    same = data.images.contiguous(memory_format=torch.channels_last)
    assert checksum(same, data.labels) == data.sha256
    reshaped = data.images.reshape(10, 3, 5, 4)
    changed = data.images.clone()
    changed[3, 1, 2, 2] ^= 1
    relabelled = data.labels.flip(0)
    sums = [(reshaped, data.labels), (changed, data.labels), (data.images, relabelled)]
    assert len({data.sha256, *(checksum(*pair) for pair in sums)}) == 4


def test_take_keeps_order_and_has_a_checksum_of_its_own() -> None:
    data = make()
    part = data.take(torch.tensor([7, 2, 2]))
    assert torch.equal(part.images, torch.stack([data.images[k] for k in (7, 2, 2)]))
    assert part.labels.tolist() == [1, 2, 2]
    assert (part.classes, part.name, len(part)) == (data.classes, data.name, 3)
    assert part.sha256 == checksum(part.images, part.labels) != data.sha256
    assert len(data.take(torch.empty(0, dtype=torch.int64))) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": torch.zeros(10, 3, 4, 5)}, "torch.float32"),
        ({"images": torch.zeros(10, 1, 4, 5, dtype=torch.uint8)}, r"\(10, 1, 4, 5\)"),
        ({"labels": torch.zeros(9, dtype=torch.int64)}, r"\(9,\)"),
        ({"labels": torch.zeros(10, dtype=torch.int32)}, "torch.int32"),
        ({"labels": torch.full((10,), 3)}, "run from 3 to 3"),
    ],
)
def test_what_does_not_fit_together_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_hold_out_parts_are_disjoint_complete_in_order_and_always_the_same() -> None:
    numbers = torch.arange(100)
    images = numbers.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    data = ImageSet(images, torch.zeros(100, dtype=torch.int64), ("a",), "numbered")
    rest, validation = hold_out(data, 30)
    shown = [part.images[:, 0, 0, 0].tolist() for part in (rest, validation)]
    assert [len(part) for part in shown] == [70, 30]
    assert sorted(shown[0] + shown[1]) == list(range(100))
    assert all(part == sorted(part) for part in shown)
    assert shown[1] != list(range(70, 100))  # spread over the set, not its tail
    torch.manual_seed(1)
    again = hold_out(data, 30)
    assert [part.sha256 for part in again] == [rest.sha256, validation.sha256]


@pytest.mark.parametrize("count", [0, 10])
def test_hold_out_leaves_something_on_both_sides(count: int) -> None:
    with pytest.raises(ValueError, match="from 1 to 9"):
        hold_out(make(), count)
