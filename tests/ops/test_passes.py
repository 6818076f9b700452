"""The kernels' passes and scalar stages against their definition, `spem.ops.formula` in float64."""

from __future__ import annotations

import itertools
from types import ModuleType
from typing import Any

import pytest
import torch
from ops.tails import home, pairwise
from ops.test_tail import needs
from tolerance import TOLERANCE
from torch import Tensor

from spem.ops import formula
from spem.ops.formula import Incoming, Norm, RawStats
from spem.ops.library import kernels_of
from spem.ops.stats import compute_dtype

SHAPES = (
    *((1, 1, 1, 1), (3, 17, 4, 4), (2, 16, 8, 8), (9, 70, 7, 7), (2, 5, 40, 33)),
    *((3, 5, 33), (2, 3, 2, 3, 4), (2, 33, 16, 16), (1, 2, 56, 56)),
)
BOTH = (False, True)
passes_of = pairwise(
    impl=("numba", "triton"),
    dtype=(torch.float32, torch.float64, torch.bfloat16, torch.float16),
    shape=SHAPES,
    last=BOTH,
)
INF, NAN = float("inf"), float("nan")
pytestmark = pytest.mark.usefixtures("deterministic")


def kernels(impl: str, dtype: torch.dtype) -> ModuleType:
    needs(impl, dtype, home(impl))
    return kernels_of(impl)


class Drawing:
    """Maps and scalars, all different, for one implementation, dtype and layout."""

    def __init__(self, impl: str, dtype: torch.dtype, last: bool = False) -> None:
        self.device, self.dtype, self.last = home(impl), dtype, last
        self.rng = torch.Generator().manual_seed(0)

    def map(self, *shape: int, ties: bool = False) -> Tensor:
        x = 2 * torch.randn(shape, generator=self.rng) + 0.5
        return self.laid_out(x.round() if ties else x)

    def laid_out(self, x: Tensor) -> Tensor:
        x = x.to(self.device, self.dtype)
        return x.movedim(1, -1).contiguous().movedim(-1, 1) if self.last else x.contiguous()

    def scalars(self, *shape: int) -> Tensor:
        x = torch.randn(shape, generator=self.rng)
        return x.to(self.device, compute_dtype(self.dtype))

    def positions(self, most: int, *shape: int) -> Tensor:
        return torch.randint(most, shape, generator=self.rng, dtype=torch.int32).to(self.device)


def double(*values: Any) -> list[Any]:
    wide = [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in values]
    return [Incoming(*double(*t)) if isinstance(t, Incoming) else t for t in wide]


def assert_near(found: Any, expected: Any) -> None:
    """Rounded once to the dtype, after sums in the compute dtype; integers are equal."""
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is None:
            continue
        assert a.shape == b.shape
        if not a.is_floating_point():
            assert torch.equal(a, b)
            continue
        limits = torch.finfo(a.dtype)
        rounding = TOLERANCE[compute_dtype(a.dtype)]["rtol"]
        # The interpreter of Triton cuts off to bfloat16, where a GPU rounds.
        share = 1 if a.dtype is torch.bfloat16 else 0.5
        finite = b[b.isfinite()].abs()
        scale = float(finite.max()) + 1 if finite.numel() else 1.0
        bound = share * (limits.eps * b.abs() + limits.tiny) + rounding * scale
        assert torch.equal(a.isnan(), b.isnan())
        right = (a.double() - b).abs() <= bound
        assert (right | (a == b) | b.isnan()).all(), (a.double() - b).abs().max()


@passes_of
def test_statistics(impl: str, dtype: torch.dtype, shape: tuple[int, ...], last: bool) -> None:
    work = kernels(impl, dtype)
    for ties in BOTH:
        z = Drawing(impl, dtype, last).map(*shape, ties=ties)
        found = RawStats(*work.plane_stats(z, True, True))
        assert {t.dtype for t in found[:5]} == {compute_dtype(dtype)}
        assert {t.dtype for t in found[5:]} == {torch.int32}
        expected = formula.plane_stats(z.double(), True, True)
        assert_near(found, expected)
        assert all(map(torch.equal, double(*found[2:]), expected[2:]))
    for asked in ((True, False), (False, True), (False, False)):
        some = work.plane_stats(z, *asked)
        for k, (a, b) in enumerate(zip(some, found, strict=True)):
            assert a.dtype == b.dtype
            assert torch.equal(a, b) if asked[k > 1] else a.shape == (0,)


@pairwise(
    impl=("numba", "triton"),
    dtype=(torch.float32, torch.float64, torch.bfloat16),
    last=BOTH,
    size=(1, 5, 16, 49, 100, 3136),
    value=(NAN, INF, -INF),
)
def test_a_value_that_is_not_finite(
    impl: str, dtype: torch.dtype, last: bool, size: int, value: float
) -> None:
    work = kernels(impl, dtype)
    for place in {0, size // 2, size - 1}:
        z = Drawing(impl, dtype, last).map(2, 19, size, 1)
        z[1, 2, place, 0] = value
        if value == -INF and size > 2:
            z[1, 2, 1, 0] = INF  # both: their sum is a NaN although none was there
        found = RawStats(*work.plane_stats(z, True, True))
        expected = formula.plane_stats(z.double(), True, True)
        assert_near(found[:4], expected[:4])
        if value == value:
            assert all(map(torch.equal, found[5:], expected[5:]))
        assert all(0 <= at.min() <= at.max() < size for at in found[5:])


@pairwise(impl=("numba", "triton"), last=BOTH, size=(3, 37, 64, 256, 3136))
def test_planes_of_one_value_tie_at_the_first_position(impl: str, last: bool, size: int) -> None:
    z = torch.tensor([0.0, -3.0, INF, -INF])[None, :, None, None].repeat(1, 1, size, 1)
    z[:, 0, 1::2] = -0.0
    found = kernels(impl, z.dtype).plane_stats(Drawing(impl, z.dtype, last).laid_out(z), True, True)
    assert found.at_high.tolist() == found.at_low.tolist() == [[0, 0, 0, 0]]
    assert (
        found.high.tolist() == found.low.tolist() == found.mean.tolist() == z[:, :, 0, 0].tolist()
    )
    assert found.var[0, :2].tolist() == [0, 0]
    assert found.var[0, 2:].isnan().all()


@pairwise(impl=("numba", "triton"), last=BOTH)
def test_a_mean_far_from_zero_costs_no_digits(impl: str, last: bool) -> None:
    work, z = kernels(impl, torch.float32), Drawing(impl, torch.float32, last).map(2, 6, 56, 56)
    z += 1e4
    found, expected = work.plane_stats(z, True, False), formula.plane_stats(z.double(), True, False)
    torch.testing.assert_close(found.mean.double(), expected.mean, rtol=1e-7, atol=0)
    torch.testing.assert_close(found.var.double(), expected.var, rtol=1e-4, atol=0)


@passes_of
def test_affine_tail_and_its_backward(
    impl: str, dtype: torch.dtype, shape: tuple[int, ...], last: bool
) -> None:
    work, draw = kernels(impl, dtype), Drawing(impl, dtype, last)
    z, r, g, mu = draw.map(*shape), draw.map(*shape), draw.map(*shape), draw.scalars(shape[1])
    arguments = (z, r, mu, draw.scalars(*shape[:2]), draw.scalars(shape[1]), draw.scalars(shape[1]))
    y = work.affine_tail(*arguments)
    assert_near([y], [formula.affine_tail(*double(*arguments))])
    found = work.affine_tail_backward(g, y, z, mu)
    expected = formula.affine_tail_backward(*double(g, y, z, mu))
    assert torch.equal(found[0].double(), expected[0])
    assert_near(found, expected)
    assert y.stride() == found[0].stride() == z.stride()
    assert y.dtype == found[0].dtype == dtype


@passes_of
def test_stats_backward(impl: str, dtype: torch.dtype, shape: tuple[int, ...], last: bool) -> None:
    work, draw = kernels(impl, dtype), Drawing(impl, dtype, last)
    d, z, mu = draw.map(*shape), draw.map(*shape), draw.scalars(shape[1])
    p, q, t, s_i, s_j = (draw.scalars(*shape[:2]) for _ in range(5))
    i, j = (draw.positions(z[0, 0].numel(), *shape[:2]) for _ in range(2))
    j[0] = i[0]  # both spikes at one position
    channels = [draw.scalars(shape[1]).expand(shape[:2]) for _ in range(2)]
    for affine, spikes in itertools.product(
        ((q, t), channels, (None, None)), ((i, j, s_i, s_j), (None,) * 4)
    ):
        # Without q and t the map is not read.
        read = torch.full_like(z, NAN) if affine[0] is None else z
        arguments = (d, read, mu, p, *affine, *spikes)
        expected = formula.stats_backward(*double(*arguments))
        dz = work.stats_backward(*arguments)
        assert_near([dz], [expected])
        assert (dz.stride(), dz.dtype) == (d.stride(), dtype)


@pairwise(impl=("numba", "triton"), last=BOTH, size=(4, 16, 37))
def test_nan_passes_the_rectifier_both_ways(impl: str, last: bool, size: int) -> None:
    work, draw = kernels(impl, torch.float32), Drawing(impl, torch.float32, last)
    z, r, g = (draw.map(2, 5, size, 1) for _ in range(3))
    r[1, 3, size - 1] = NAN
    g[0, 0, 0] = NAN
    one = torch.ones(2, 5, device=home(impl))
    y = work.affine_tail(z, r, 0 * one[0], one, one[0], one[0])
    assert torch.equal(y.isnan(), r.isnan())
    y[0, 0, 0], y[0, 1, 0] = 1.0, 0.0
    d, total, _ = work.affine_tail_backward(g, y, z, 0 * one[0])
    assert torch.equal(d.isnan(), g.isnan())  # the mask is not a product
    assert d[1, 3, size - 1] == g[1, 3, size - 1]
    assert d[0, 1, 0] == 0
    assert total.isnan().sum() == 1


def raw_statistics(draw: Drawing, *planes: int) -> RawStats:
    several = [draw.scalars(*planes) for _ in range(5)]
    positions = [draw.positions(99, *planes) for _ in range(2)]
    return RawStats(several[0], several[1].square(), *several[2:], *positions)


STAGES = {"dtype": (torch.float32, torch.float64), "planes": ((1, 1), (3, 5), (9, 40), (128, 70))}


@pairwise(**STAGES, has=("affine", "running", "nothing"))
def test_the_norm_of_a_batch(dtype: torch.dtype, planes: tuple[int, int], has: str) -> None:
    work, draw = kernels("numba", dtype), Drawing("numba", dtype)
    raw = raw_statistics(draw, *planes)
    gamma, beta, mean, var = (draw.scalars(planes[1]) for _ in range(4))
    old = (mean, var, 0.3) if has == "running" else None
    weight, bias = (gamma, beta) if has == "affine" else (None, None)
    moved = None if old is None else (mean.double().clone(), var.double().clone(), 0.3)
    versions = [mean._version + 1, var._version + 1]
    found = work.normalise_batch(raw, Norm(weight, bias, None, None, 1e-3, None, old), 49, True)
    norm = Norm(*double(weight, bias), None, None, 1e-3)
    expected = formula.normalise_batch(RawStats(*double(*raw)), norm, 49, True)
    assert_near([*found[:5], *found.normal], [*expected[:5], *expected.normal])
    if old is not None:
        formula.move_running(moved, expected.mu, expected.var, 49 * planes[0])
        assert_near(old[:2], moved[:2])
        assert [mean._version, var._version] == versions  # autograd sees that they moved


@pairwise(**STAGES, moments=BOTH, extrema=BOTH)
def test_normalised(
    dtype: torch.dtype, planes: tuple[int, int], moments: bool, extrema: bool
) -> None:
    work, draw = kernels("numba", dtype), Drawing("numba", dtype)
    raw, gone = raw_statistics(draw, *planes), RawStats(*[torch.empty(0, dtype=dtype)] * 7)
    gone = gone._replace(at_high=torch.empty(0).int(), at_low=torch.empty(0).int())
    raw = RawStats(*(raw if moments else gone)[:2], *(raw if extrema else gone)[2:])
    a, mu, beta = (draw.scalars(planes[1]) for _ in range(3))
    a[::3] = 0.0
    assert_near(
        work.normalised(raw, a, mu, beta),
        formula.normalised(RawStats(*double(*raw)), *double(a, mu, beta)),
    )


@pairwise(**STAGES, given=(0, 1, 2, 6, 9, 15), training=BOTH)
def test_gradients(dtype: torch.dtype, planes: tuple[int, int], given: int, training: bool) -> None:
    work, draw = kernels("numba", dtype), Drawing("numba", dtype)
    v, total, moment, *grads, mean, var, z_i, z_j = (draw.scalars(*planes) for _ in range(11))
    a, mu, rstd = (draw.scalars(planes[1]) for _ in range(3))
    assert_near(
        [work.gate_gradient(total, moment, a, mu)],
        [formula.gate_gradient(*double(total, moment, a, mu))],
    )
    into = Incoming(*(t if given >> k & 1 else None for k, t in enumerate(grads)))
    for of_map in BOTH:
        kinds = {"batch_stats": training, "of_norm": True, "of_map": of_map}
        rest = (v, total, moment, into), (a, mu, rstd, 49)
        found = work.gradients(*rest[0], (mean, var, z_i, z_j), *rest[1], **kinds)
        of_z = double(mean, var, z_i, z_j)
        expected = formula.gradients(*double(*rest[0]), of_z, *double(*rest[1]), **kinds)
        assert_near(found[:2], expected[:2])
        assert (found[2] is None) == (expected[2] is None)
        if found[2] is not None:
            assert_near(found[2], expected[2])
