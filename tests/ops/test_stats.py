"""Plane statistics against numpy, in every rank, layout and dtype."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ops.tails import pairwise
from tolerance import TOLERANCE

from spem.ops import plane_stats

SHAPES = [(2, 3, 7), (2, 3, 4, 5), (1, 1, 1, 1), (3, 2, 1, 6), (2, 2, 3, 2, 4)]
STATISTICS = ("mean", "var", "max", "min")
NUMPY = {"mean": np.mean, "var": np.var, "max": np.max, "min": np.min}


def drawn(shape: tuple[int, ...], dtype: torch.dtype, *, last: bool = False) -> torch.Tensor:
    x = 2 * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) + 0.5
    x = x.to(dtype)
    return x.to(memory_format=torch.channels_last) if last else x


@pairwise(
    grad=(False, True),
    dtype=(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    shape=SHAPES,
)
def test_equals_numpy(shape: tuple[int, ...], dtype: torch.dtype, grad: bool) -> None:
    for last in (False, True) if len(shape) == 4 else (False,):
        x = drawn(shape, dtype, last=last).requires_grad_(grad)
        stats = plane_stats(x)
        planes = x.detach().double().numpy().reshape(shape[0], shape[1], -1)
        exact = torch.promote_types(dtype, torch.float32)  # what they are accumulated in
        for name in STATISTICS:
            value = getattr(stats, name)
            assert value.dtype == exact
            assert value.shape == shape[:2]
            expected = NUMPY[name](planes, axis=2)
            np.testing.assert_allclose(value.detach().double(), expected, **TOLERANCE[exact])
        assert stats.size == np.prod(shape[2:])
        assert stats.batch == shape[0]


def test_only_what_is_asked_for() -> None:
    stats = plane_stats(drawn((2, 3, 4, 4), torch.float32), ("min", "var"))
    assert stats.mean is None
    assert stats.max is None
    assert stats.min is not None
    assert stats.var is not None


def test_the_variance_survives_a_large_mean() -> None:
    x = drawn((2, 3, 8, 8), torch.float64)
    shifted = (x + 1e4).float()
    expected = shifted.double().numpy().reshape(2, 3, -1).var(axis=2)
    found = plane_stats(shifted, ("var",)).var
    assert found is not None
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("last", [False, True])
def test_gradients_in_float64(last: bool) -> None:
    def all_four(x: torch.Tensor) -> torch.Tensor:
        stats = plane_stats(x)
        return torch.stack([getattr(stats, name) for name in STATISTICS])

    x = drawn((2, 3, 3, 4), torch.float64, last=last).requires_grad_()
    assert torch.autograd.gradcheck(all_four, (x,))


def test_nan_and_infinity() -> None:
    x = drawn((3, 1, 2, 2), torch.float32)
    x[0, 0, 1, 0] = float("nan")
    x[1, 0, 1, 0] = float("inf")
    stats = plane_stats(x)
    for name in STATISTICS:
        value = getattr(stats, name)[:, 0]
        assert value[0].isnan()
        assert value[2].isfinite()
    assert stats.max is not None
    assert stats.mean is not None
    assert stats.var is not None
    assert stats.min is not None
    assert stats.max[1, 0] == stats.mean[1, 0] == float("inf")
    assert stats.var[1, 0].isnan()
    assert stats.min[1, 0].isfinite()


def test_an_empty_batch_has_empty_statistics() -> None:
    stats = plane_stats(torch.zeros(0, 3, 2, 2))
    assert all(getattr(stats, name).shape == (0, 3) for name in STATISTICS)


@pytest.mark.parametrize(
    ("x", "which", "message"),
    [
        (torch.zeros(2, 3), STATISTICS, "2 axes"),
        (torch.zeros(2, 3, 0, 4), STATISTICS, "empty"),
        (torch.zeros(2, 3, 4, 4), ("median",), "median.*mean, var, max, min"),
    ],
)
def test_bad_input(x: torch.Tensor, which: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plane_stats(x, which)
