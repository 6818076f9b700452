from __future__ import annotations

import numpy as np
import pytest
import torch
from tolerance import TOLERANCE

from spem.data import NORMALISATION, augment, epoch_plan, normalise


def by_hand(images: np.ndarray, offsets: list, flips: list, pad: int) -> np.ndarray:
    """Pad, crop and flip pixel by pixel."""
    n, channels, height, width = images.shape
    result = np.empty_like(images)
    for i in range(n):
        for c in range(channels):
            for y in range(height):
                for x in range(width):
                    row = offsets[i][0] + y - pad
                    column = offsets[i][1] + (width - 1 - x if flips[i] else x) - pad
                    inside = 0 <= row < height and 0 <= column < width
                    result[i, c, y, x] = images[i, c, row, column] if inside else 0
    return result


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
    expected = by_hand(images.numpy(), plan.offsets.tolist(), plan.flips.tolist(), pad)
    assert result.dtype == torch.uint8
    assert np.array_equal(result.numpy(), expected)
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, before)


def test_augment_equals_torchvision() -> None:
    functional = pytest.importorskip("torchvision.transforms.functional", reason="no torchvision")
    images = torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8)
    plan = epoch_plan(0, 0, 40)
    result = augment(images, plan.offsets, plan.flips)
    for i, image in enumerate(images):
        top, left = plan.offsets[i].tolist()
        expected = functional.crop(functional.pad(image, [4]), top, left, 32, 32)
        if plan.flips[i]:
            expected = functional.hflip(expected)
        assert torch.equal(result[i], expected)


def test_plan_is_a_pure_function_of_its_arguments() -> None:
    torch.manual_seed(0)
    first = epoch_plan(1, 2, 50)
    torch.manual_seed(7)
    epoch_plan(1, 3, 50)
    again = epoch_plan(1, 2, 50)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for other in (epoch_plan(1, 3, 50), epoch_plan(2, 2, 50)):
        assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_plan_shows_every_image_once_and_draws_evenly() -> None:
    n = 20_000
    plan = epoch_plan(0, 0, n)
    assert torch.equal(plan.permutation.sort().values, torch.arange(n))
    assert plan.offsets.shape == (n, 2)
    assert plan.flips.dtype == torch.bool
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


def test_normalise_equals_torchvision_bit_for_bit() -> None:
    functional = pytest.importorskip("torchvision.transforms.functional", reason="no torchvision")
    images = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    mean, std = NORMALISATION["paper"]
    scaled = functional.convert_image_dtype(images, torch.float32)
    assert torch.equal(normalise(images, mean, std), functional.normalize(scaled, mean, std))


def test_padding_comes_before_normalisation() -> None:
    padding = normalise(torch.zeros(1, 3, 1, 1, dtype=torch.uint8), *NORMALISATION["paper"])
    assert [round(value, 4) for value in padding.flatten().tolist()] == [-2.4291, -2.4183, -2.2214]


def test_normalise_keeps_the_memory_format_and_empty_batches() -> None:
    mean, std = NORMALISATION["paper"]
    images = torch.zeros(4, 3, 6, 5, dtype=torch.uint8)
    last = normalise(images.contiguous(memory_format=torch.channels_last), mean, std)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert normalise(images, mean, std).is_contiguous()
    assert normalise(images[:0], mean, std).shape == (0, 3, 6, 5)


def test_normalise_refuses_what_does_not_fit() -> None:
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"torch\.float32"):
        normalise(images.float(), (0, 0, 0), (1, 1, 1))
    with pytest.raises(ValueError, match="3 channels"):
        normalise(images, (0, 0), (1, 1))
