"""The set in memory, its checksum; an epoch's plan, crop and flip; normalisation."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tolerance import TOLERANCE

from spem.data import (
    NORMALISATION,
    ImageSet,
    augment,
    checksum,
    epoch_plan,
    hold_out,
    load_images,
    normalise,
)


def make(n: int = 10, **changes: object) -> ImageSet:
    images = torch.randint(0, 256, (n, 3, 4, 5), dtype=torch.uint8)
    fields: dict[str, Any] = {"images": images, "labels": torch.arange(n) % 3, "name": "made"}
    return ImageSet(**{**fields, "classes": ("a", "b", "c"), **changes})


def test_checksum_is_sha256_of_shape_pixels_and_labels() -> None:
    data = make(4)
    pixels, labels = bytes(data.images.flatten().tolist()), struct.pack("<4q", *data.labels)
    expected = hashlib.sha256(b"uint8 4 3 4 5\n" + pixels + labels).hexdigest()
    assert data.sha256 == expected == checksum(data.images, data.labels)
    same = data.images.contiguous(memory_format=torch.channels_last)
    assert checksum(same, data.labels) == expected
    changed = data.images.clone()
    changed[3, 1, 2, 2] ^= 1
    others = [(data.images.reshape(4, 3, 5, 4), data.labels), (changed, data.labels)]
    others.append((data.images, data.labels.flip(0)))
    assert len({expected, *(checksum(*pair) for pair in others)}) == 4


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
        ({"images": torch.zeros(10, 1, 4, 5, dtype=torch.uint8)}, r"\[10, 1, 4, 5\]"),
        ({"labels": torch.zeros(9, dtype=torch.int64)}, r"\[9\]"),
        ({"labels": torch.zeros(10, dtype=torch.int32)}, "torch.int32"),
        ({"labels": torch.full((10,), 3)}, "run from 3 to 3"),
    ],
)
def test_what_does_not_fit_together_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_hold_out_parts_are_disjoint_complete_in_order_and_always_the_same() -> None:
    images = torch.arange(100).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    data = ImageSet(images, torch.zeros(100, dtype=torch.int64), ("a",), "numbered")
    rest, validation = hold_out(data, 30)
    shown = [part.images[:, 0, 0, 0].tolist() for part in (rest, validation)]
    assert [len(part) for part in shown] == [70, 30]
    assert sorted(shown[0] + shown[1]) == list(range(100))
    assert all(part == sorted(part) for part in shown)
    assert shown[1] != list(range(70, 100))  # spread over the set, not its tail
    torch.manual_seed(1)
    assert [part.sha256 for part in hold_out(data, 30)] == [rest.sha256, validation.sha256]
    for count in (0, 100):
        with pytest.raises(ValueError, match=f"data.val={count} of 100 images. Use 1 to 99."):
            hold_out(data, count)


# ---- the epoch


@pytest.mark.parametrize(
    ("size", "pad", "layout"),
    [
        ((6, 6), 4, torch.contiguous_format),
        ((5, 8), 1, torch.channels_last),
        ((5, 8), 0, torch.contiguous_format),
        ((1, 3), 9, torch.contiguous_format),
    ],
)
def test_augment_is_pad_crop_and_flip_image_by_image(
    size: tuple[int, int], pad: int, layout: torch.memory_format
) -> None:
    images = torch.randint(1, 256, (24, 3, *size), dtype=torch.uint8)
    images = images.contiguous(memory_format=layout)
    before = images.clone()
    plan = epoch_plan(3, 5, 24, pad=pad)
    result = augment(images, plan.offsets, plan.flips, pad=pad)
    for i, image in enumerate(images.numpy()):
        top, left = plan.offsets[i].tolist()
        padded = np.pad(image, ((0, 0), (pad, pad), (pad, pad)))
        crop = padded[:, top : top + size[0], left : left + size[1]]
        assert np.array_equal(result[i].numpy(), crop[..., ::-1] if plan.flips[i] else crop)
    assert result.dtype == torch.uint8
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, before)


def test_plan_is_a_pure_function_of_its_arguments() -> None:
    torch.manual_seed(0)
    first = epoch_plan(1, 2, 50)
    torch.manual_seed(7)
    epoch_plan(1, 3, 50)
    assert all(torch.equal(a, b) for a, b in zip(first, epoch_plan(1, 2, 50), strict=True))
    for other in (epoch_plan(1, 3, 50), epoch_plan(2, 2, 50)):
        assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_plan_shows_every_image_once_and_draws_evenly() -> None:
    n = 20_000
    plan = epoch_plan(0, 0, n)
    assert torch.equal(plan.permutation.sort().values, torch.arange(n))
    for axis in range(2):
        counts = plan.offsets[:, axis].bincount(minlength=9).double()
        assert len(counts) == 9
        # 5 deviations of a binomial count: a false alarm in a million draws
        assert (counts - n / 9).abs().max() < 5 * (n * 8 / 81) ** 0.5
    assert abs(int(plan.flips.sum()) - n / 2) < 5 * (n / 4) ** 0.5
    together = torch.stack([plan.offsets[:, 0], plan.offsets[:, 1], plan.flips.long()]).double()
    assert (torch.corrcoef(together) - torch.eye(3)).abs().max() < 5 / n**0.5


def test_plan_stays_what_it_was() -> None:
    """Runs begun by one version are resumed by the next, so the drawing must not change."""
    order, offsets, flips = epoch_plan(0, 0, 8)
    assert order.tolist() == [3, 7, 5, 4, 1, 2, 0, 6]
    expected = [[8, 6], [1, 0], [8, 8], [3, 7], [6, 8], [0, 5], [5, 0], [8, 0]]
    assert offsets.tolist() == expected
    assert flips.long().tolist() == [1, 0, 1, 0, 0, 0, 1, 0]


# ---- normalisation


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("paper", torch.float64),
        ("cifar10", torch.float32),
        ("cifar100", torch.bfloat16),
        ("digits", torch.float16),
    ],
)
def test_normalise_scales_subtracts_and_divides(name: str, dtype: torch.dtype) -> None:
    mean, std = NORMALISATION[name]
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, 3, 1, 1)
    before = images.clone()
    result = normalise(images, mean, std, dtype)
    pixels = images.numpy().astype(np.float64)
    expected = np.stack([(pixels[:, c] / 255 - mean[c]) / std[c] for c in range(3)], axis=1)
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), torch.from_numpy(expected), **TOLERANCE[dtype])
    assert torch.equal(images, before)
    assert result.is_contiguous()
    last = normalise(images.contiguous(memory_format=torch.channels_last), mean, std)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert normalise(images[:0], mean, std).shape == (0, 3, 16, 16)


def test_the_papers_constants() -> None:
    padding = normalise(torch.zeros(1, 3, 1, 1, dtype=torch.uint8), *NORMALISATION["paper"])
    assert [round(value, 4) for value in padding.flatten().tolist()] == [-2.4291, -2.4183, -2.2214]


def test_normalise_refuses_what_does_not_fit() -> None:
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"torch\.float32"):
        normalise(images.float(), (0, 0, 0), (1, 1, 1))
    with pytest.raises(ValueError, match="3 channels"):
        normalise(images, (0, 0), (1, 1))


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("digits", [0, 1, 2, 3, 4, 5]),
        ("cifar10", [6, 9, 9, 4, 1, 1]),  # frog, truck, truck, deer, car, car
        pytest.param("cifar100", [19, 29, 0, 11, 1, 86], marks=pytest.mark.slow),
    ],
)
def test_sets_and_their_constants(name: str, labels: list[int], request: Any) -> None:
    root: Path | None = None if name == "digits" else request.getfixturevalue("data_root")
    train = load_images(name, "train", root=root)
    ends = {"digits": ("0", "9"), "cifar10": ("airplane", "truck"), "cifar100": ("apple", "worm")}
    assert (train.classes[0], train.classes[-1]) == ends[name]
    assert train.labels[:6].tolist() == labels
    if root is not None:
        assert train.images.shape == (50_000, 3, 32, 32)
        assert set(train.labels.bincount().tolist()) == {50_000 // len(train.classes)}
    # The whole set as exact integers: how often each value occurs.
    values = torch.stack([train.images[:, c].flatten().bincount(minlength=256) for c in range(3)])
    scale = torch.arange(256, dtype=torch.float64) / 255
    shares = values / values.sum(dim=1, keepdim=True)
    means = (shares * scale).sum(dim=1)
    deviations = ((shares * scale**2).sum(dim=1) - means**2).sqrt()
    found = ([round(float(m), 4) for m in means], [round(float(d), 4) for d in deviations])
    assert tuple(map(tuple, found)) == NORMALISATION[name]
