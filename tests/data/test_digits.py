from __future__ import annotations

import numpy as np
import pytest

from spem.data import NORMALISATION, load_images

datasets = pytest.importorskip("sklearn.datasets", reason="no scikit-learn")


@pytest.mark.parametrize(("size", "side"), [(None, 16), (32, 32)])
def test_digits_are_scikit_learns_repeated_in_rows_columns_and_channels(
    size: int | None, side: int
) -> None:
    bunch = datasets.load_digits()
    for split, part, count in (("train", slice(0, 1437), 1437), ("test", slice(1437, 1797), 360)):
        data = load_images("digits", split, size=size)
        assert data.images.shape == (count, 3, side, side)
        grey = np.floor(bunch.images[part] * 255 / 16 + 0.5)
        expected = np.kron(grey, np.ones((1, side // 8, side // 8)))
        for channel in range(3):
            assert np.array_equal(data.images[:, channel].numpy(), expected)
        assert data.labels.tolist() == bunch.target[part].tolist()
        assert data.classes == tuple("0123456789")
        assert data.name == "digits"
        assert data.images.max() == 255


def test_constants_are_those_of_the_training_pixels() -> None:
    pixels = load_images("digits", "train", size=8).images[:, 0].double() / 255
    mean, std = NORMALISATION["digits"]
    assert [round(float(pixels.mean()), 4)] * 3 == list(mean)
    assert [round(float(pixels.std(correction=0)), 4)] * 3 == list(std)


@pytest.mark.parametrize("size", [0, 12, 8000])
def test_sizes_that_are_no_multiples_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"size={size} is not a multiple of 8"):
        load_images("digits", "train", size=size)
