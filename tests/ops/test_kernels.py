"""The Triton passes against float64 numpy, on a GPU or, where there is none, in the interpreter."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from ops.tails import pairwise
from tolerance import TOLERANCE

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the kernels are imported
pytest.importorskip("triton", minversion="3.6", reason="no triton of 3.6 or later")

from spem.ops import cuda as kernels
from spem.ops.cuda import tiles
from spem.ops.formula import RawStats

if not (kernels.INTERPRETED or torch.cuda.is_available()):
    pytest.skip("no GPU, and Triton came without TRITON_INTERPRET=1", allow_module_level=True)

DEVICE = "cpu" if kernels.INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [
    (2, 3, 1, 1),
    (2, 5, 7, 7),
    (1, 24, 14, 14),
    (2, 33, 16, 16),  # channels_last: parts
    (1, 2, 56, 56),  # both layouts: a loop, in parts
    (2, 5, 9),
    (2, 3, 2, 3, 4),
]
both_layouts = pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])


@pytest.fixture(autouse=True)
def nan_in_new_memory():
    """Fills what torch.empty returns with NaN: a cell that no program writes shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def laid_out(x: torch.Tensor, last: bool) -> torch.Tensor:
    if last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    return x.to(DEVICE)


def drawn(
    shape: tuple[int, ...], dtype: torch.dtype, last: bool, seed: int = 0, ties: bool = False
) -> torch.Tensor:
    x = 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 0.5
    return laid_out((x.round() if ties else x).to(dtype), last)


def scalars(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def exact(x: torch.Tensor) -> np.ndarray:
    """[B, C, K] of a map, or the scalars themselves, in float64."""
    a = x.detach().cpu().double().numpy()
    return a.reshape(*a.shape[:2], -1) if a.ndim > 2 else a


def assert_near(
    found: torch.Tensor, expected: np.ndarray, size: np.ndarray, dtype: torch.dtype
) -> None:
    """Compares, in units of what the summands amount to where that is more than 1."""
    unit = np.where(np.isfinite(size), np.maximum(size, 1), 1)
    np.testing.assert_allclose(exact(found) / unit, expected / unit, **TOLERANCE[dtype])


def assert_rounded_once(found: torch.Tensor, expected: np.ndarray, size: np.ndarray) -> None:
    """Half a unit in the last place, and what float32 errs on the way there."""
    limits = torch.finfo(found.dtype)
    # The interpreter cuts off to bfloat16, where a GPU rounds.
    share = 1 if kernels.INTERPRETED and found.dtype is torch.bfloat16 else 0.5
    bound = share * (limits.eps * np.abs(expected) + limits.tiny) + 1e-6 * size
    assert (np.abs(exact(found) - expected) <= bound).all()


def assert_stats(stats: tuple[torch.Tensor, ...], z: torch.Tensor) -> None:
    planes = exact(z)
    found = RawStats(*stats)
    with np.errstate(invalid="ignore"):
        mean, var = planes.mean(2), planes.var(2)
    assert_near(found.mean, mean, np.abs(planes).mean(2), torch.float32)
    assert_near(found.var, var, np.square(planes).mean(2), torch.float32)
    np.testing.assert_array_equal(exact(found.high), planes.max(2))
    np.testing.assert_array_equal(exact(found.low), planes.min(2))
    np.testing.assert_array_equal(exact(found.first), planes[:, :, 0])
    np.testing.assert_array_equal(found.at_high.cpu(), planes.argmax(2))
    np.testing.assert_array_equal(found.at_low.cpu(), planes.argmin(2))
    assert {found.at_high.dtype, found.at_low.dtype} == {torch.int32}
    assert {s.dtype for s in found[:5]} == {torch.float32}


# F1


@pairwise(shape=SHAPES, dtype=DTYPES, last=(False, True))
def test_plane_stats(shape: tuple[int, ...], dtype: torch.dtype, last: bool) -> None:
    for ties in (False, True):
        z = drawn(shape, dtype, last, ties=ties)
        assert_stats(kernels.plane_stats(z, True, True), z)


@pairwise(
    shape=((2, 3, 7, 7), (1, 33, 16, 16), (1, 2, 56, 56)),
    last=(False, True),
    asked=((True, False), (False, True), (False, False)),
)
def test_statistics_that_are_not_asked_for_are_empty(
    shape: tuple[int, ...], last: bool, asked: tuple[bool, bool]
) -> None:
    moments, extrema = asked
    z = drawn(shape, torch.float32, last)
    found, full = kernels.plane_stats(z, moments, extrema), kernels.plane_stats(z, True, True)
    for name, some, every in zip(RawStats._fields, found, full, strict=True):
        wanted = moments if name in ("mean", "var") else extrema
        assert some.shape == (shape[:2] if wanted else (0,)), name
        assert some.dtype == every.dtype
        assert not wanted or torch.equal(some, every)


@pairwise(side=(7, 16, 56), dtype=DTYPES, last=(False, True))
def test_planes_of_one_value_tie_at_the_first_position(
    side: int, dtype: torch.dtype, last: bool
) -> None:
    values = torch.tensor([0.0, -3.0, float("inf"), float("-inf")]).to(dtype)
    z = laid_out(values[None, :, None, None].expand(1, 4, side, side).contiguous(), last)
    found = kernels.plane_stats(z, True, True)
    assert found.at_high.tolist() == found.at_low.tolist() == [[0, 0, 0, 0]]
    assert found.high.tolist() == found.low.tolist() == [values.tolist()]
    assert found.mean.tolist() == [values.tolist()]
    assert found.var[0, :2].tolist() == [0, 0]
    assert found.var[0, 2:].isnan().all()


@both_layouts
@pytest.mark.parametrize("at", [0, 48, 3135])
def test_nan_and_infinity_in_a_plane(at: int, last: bool) -> None:
    side = 7 if at < 49 else 56
    planes = torch.linspace(-1, 1, side**2).repeat(1, 6, 1)
    inf, nan = float("inf"), float("nan")
    planes[0, torch.arange(5), at] = torch.tensor([nan, inf, -inf, nan, inf])
    planes[0, 3, -1 - at] = inf
    planes[0, 4, -1 - at] = -inf
    z = laid_out(planes.view(1, 6, side, side), last)
    assert_stats(tuple(s[:, 1:3] for s in kernels.plane_stats(z, True, True)), z[:, 1:3])
    assert_stats(tuple(s[:, 5:] for s in kernels.plane_stats(z, True, True)), z[:, 5:])
    mean, var, high, low, _, at_high, at_low = kernels.plane_stats(z, True, True)
    for plane in (0, 3):
        assert all(s[0, plane].isnan() for s in (mean, var, high, low))
        assert 0 <= at_high[0, plane] < side**2
        assert 0 <= at_low[0, plane] < side**2
    assert var[0, :5].isnan().all()
    assert (high[0, 4], low[0, 4]) == (inf, -inf)


@both_layouts
def test_variance_survives_a_large_mean(last: bool) -> None:
    z = drawn((2, 3, 56, 56), torch.float32, last) + 1e4
    found = kernels.plane_stats(z, True, False).var
    np.testing.assert_allclose(exact(found), exact(z).var(2), rtol=1e-5)


# F2, B1, B2


@pairwise(shape=SHAPES, dtype=DTYPES, last=(False, True))
def test_affine_tail(shape: tuple[int, ...], dtype: torch.dtype, last: bool) -> None:
    B, C = shape[:2]
    z, r = (drawn(shape, dtype, last, seed) for seed in (1, 2))
    mu, v, a, beta = scalars(C), scalars(B, C, seed=1), scalars(C, seed=2), scalars(C, seed=3)
    y = kernels.affine_tail(z, r, mu, v, a, beta)
    al, be = exact(v) * exact(a), exact(v) * exact(beta)
    assert (y.dtype, y.stride()) == (dtype, z.stride())
    terms = al[..., None] * (exact(z) - mu.cpu().double().numpy()[:, None])
    t = terms + be[..., None] + exact(r)
    size = np.abs(terms) + np.abs(be[..., None]) + np.abs(exact(r))
    expected = np.where(t < 0, 0, t)
    assert_near(y, expected, size, dtype)
    assert_rounded_once(y, expected, size)


@pairwise(shape=SHAPES, dtype=DTYPES, last=(False, True))
def test_affine_tail_backward(shape: tuple[int, ...], dtype: torch.dtype, last: bool) -> None:
    g, y, z = (drawn(shape, dtype, last, seed) for seed in (1, 2, 3))
    y = y.clamp_min(0)
    mu = scalars(shape[1])
    d, total, moment = kernels.affine_tail_backward(g, y, z, mu)
    assert (d.dtype, d.stride()) == (dtype, g.stride())
    expected = np.where(exact(y) <= 0, 0, exact(g))
    np.testing.assert_array_equal(exact(d), expected)
    assert_near(total, expected.sum(2), np.abs(expected).sum(2), torch.float32)
    terms = expected * (exact(z) - mu.cpu().double().numpy()[:, None])
    assert_near(moment, terms.sum(2), np.abs(terms).sum(2), torch.float32)
    assert total.shape == moment.shape == shape[:2]


@pairwise(shape=SHAPES, dtype=DTYPES, last=(False, True), affine=("none", "planes", "channels"))
def test_stats_backward(
    shape: tuple[int, ...], dtype: torch.dtype, last: bool, affine: str
) -> None:
    (B, C), K = shape[:2], int(np.prod(shape[2:]))
    d, z = (drawn(shape, dtype, last, seed) for seed in (1, 2))
    mu = scalars(C)
    p, q, t, s_i, s_j = (scalars(B, C, seed=seed) for seed in range(5))
    if affine == "channels":
        q, t = (scalars(C, seed=seed).expand(B, C) for seed in (7, 8))
    draw = torch.Generator().manual_seed(0)
    i, j = torch.randint(0, K, (2, B, C), generator=draw, dtype=torch.int32).to(DEVICE)
    i[0, 0] = j[0, 0] = K - 1  # both spikes
    expected = exact(p)[..., None] * exact(d)
    size = np.abs(expected)
    if affine != "none":
        terms = exact(t)[..., None] * (exact(z) - mu.cpu().double().numpy()[:, None])
        expected = expected + exact(q)[..., None] + terms
        size = size + np.abs(exact(q))[..., None] + np.abs(terms)
    else:
        z, q, t = torch.full_like(z, torch.nan), None, None  # it is not read
    dz = kernels.stats_backward(d, z, mu, p, q, t, None, None, None, None)
    assert (dz.dtype, dz.stride()) == (dtype, d.stride())
    assert_near(dz, expected, size, dtype)
    for position, spike in ((i, s_i), (j, s_j)):
        for b, c in np.ndindex(B, C):
            expected[b, c, position[b, c]] += spike[b, c].item()
            size[b, c, position[b, c]] += abs(spike[b, c].item())
    dz = kernels.stats_backward(d, z, mu, p, q, t, i, j, s_i, s_j)
    assert_near(dz, expected, size, dtype)
    assert_rounded_once(dz, expected, size)


@both_layouts
def test_nan_passes_the_rectifier_both_ways(last: bool) -> None:
    nan = float("nan")
    z = laid_out(torch.tensor([nan, 1.0, -1.0, -2.0]).view(1, 1, 2, 2).repeat(1, 2, 1, 1), last)
    one, zero = torch.ones(1, 2, device=DEVICE), torch.zeros(1, 2, device=DEVICE)
    y = kernels.affine_tail(z, torch.zeros_like(z), zero[0], one, one[0], zero[0])
    assert exact(y)[0, 0, 1:].tolist() == [1, 0, 0]
    assert y[0, :, 0, 0].isnan().all()
    g = laid_out(torch.tensor([5.0, nan, nan, 3.0]).view(1, 1, 2, 2).repeat(1, 2, 1, 1), last)
    d = exact(kernels.affine_tail_backward(g, y, torch.ones_like(z), zero[0])[0])[0, 1]
    np.testing.assert_array_equal(d, [5, nan, 0, 0])  # the mask is no product


@both_layouts
def test_lanes_beyond_a_plane_add_nothing(last: bool) -> None:
    """Not even with infinite coefficients, which make 0 times them NaN."""
    z = drawn((1, 3, 5, 5), torch.float32, last)
    mu = torch.full((3,), float("inf"), device=DEVICE)
    _, total, moment = kernels.affine_tail_backward(z.abs(), torch.ones_like(z), z, mu)
    assert total.isfinite().all()
    assert (moment == float("-inf")).all()


# launching


@pairwise(
    shape=((1, 33, 16, 16), (1, 2, 56, 56), (2, 5, 7, 7)),
    last=(False, True),
    wide=(False, True),
    apart=(False, True),
)
def test_offsets_and_parts_change_nothing(
    shape: tuple[int, ...], last: bool, wide: bool, apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def passes() -> list[torch.Tensor]:
        s, mu = scalars(*shape[:2]), scalars(shape[1])
        stats = kernels.plane_stats(z, True, True)
        y = kernels.affine_tail(z, z, mu, s, mu, mu)
        d, *sums = kernels.affine_tail_backward(z, y, z, mu)
        return [*stats, y, *sums, kernels.stats_backward(d, z, mu, s, s, s, *stats[5:], s, s)]

    def changed(x: torch.Tensor, statistics: bool) -> tiles.Plan:
        plan = tiles.plan_for(x, statistics)
        parts, each = (plan.blocks, 1) if apart else (1, plan.blocks)
        return plan._replace(wide=wide, parts=parts, tiles=each)

    z = drawn(shape, torch.float32, last, ties=True)  # with ties between the parts
    expected = passes()
    assert all(map(torch.equal, expected, passes()))  # to the bit
    monkeypatch.setattr(kernels, "plan_for", changed)
    for a, b in zip(expected, passes(), strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE[torch.float32])


def test_an_empty_batch() -> None:
    z, s, mu = (torch.zeros(shape, device=DEVICE) for shape in ((0, 3, 4, 4), (0, 3), (3,)))
    assert {tuple(x.shape) for x in kernels.plane_stats(z, True, True)} == {(0, 3)}
    assert kernels.affine_tail(z, z, mu, s, mu, mu).shape == z.shape
    d, total, moment = kernels.affine_tail_backward(z, z, z, mu)
    assert d.shape == z.shape
    assert total.shape == moment.shape == (0, 3)
    empty = kernels.stats_backward(z, z, mu, s, None, None, None, None, None, None)
    assert empty.shape == z.shape


def test_a_tensor_that_is_not_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    message = (
        r"plane_stats: impl='triton' needs a CUDA tensor, got device 'cpu'\. "
        r"Use impl=None or 'reference'\."
    )
    with pytest.raises(ValueError, match=message):
        kernels.plane_stats(torch.zeros(1, 2, 3, 3), True, True)


@pytest.mark.parametrize(
    ("z", "message"),
    [
        (torch.zeros(1, 2, 3, 3, dtype=torch.float64), "takes float32, float16 and bfloat16"),
        (torch.zeros(1, 2, 3, 3, dtype=torch.int32), "got torch.int32"),
        (torch.zeros(1, 2), "needs a map"),
        (torch.zeros(1, 2, 0, 3), "needs a map"),
    ],
)
def test_maps_that_no_kernel_takes(z: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernels.plane_stats(z.to(DEVICE), True, True)


def test_strides_that_no_kernel_takes() -> None:
    # Strided on the device: moving a tensor there makes it dense.
    z = torch.zeros(1, 2, 6, 6, device=DEVICE)
    for view in (z[:, :, ::2, ::2], z[:, :, :1, :1].expand(1, 2, 3, 3)):
        with pytest.raises(ValueError, match="contiguous or channels_last"):
            kernels.plane_stats(view, True, True)


@pytest.mark.parametrize(
    "r",
    [
        torch.zeros(1, 2, 3, 4),
        torch.zeros(1, 2, 3, 3, dtype=torch.float16),
        torch.zeros(1, 2, 3, 3).to(memory_format=torch.channels_last),
    ],
)
def test_maps_that_differ(r: torch.Tensor) -> None:
    z, s = (torch.zeros(shape, device=DEVICE) for shape in ((1, 2, 3, 3), (1, 2)))
    with pytest.raises(ValueError, match="affine_tail: the maps differ"):
        kernels.affine_tail(z, r.to(DEVICE), s[0], s, s[0], s[0])


def test_one_channel_counts_as_contiguous_whatever_its_strides() -> None:
    z = drawn((2, 1, 4, 4), torch.float32, last=True)
    s = scalars(2, 1)
    y = kernels.affine_tail(z, z.contiguous(), s[0], s, s[0], s[0])
    torch.testing.assert_close(y, kernels.affine_tail(z, z, s[0], s, s[0], s[0]))
