"""The CPU kernels against the formula of every pass and stage, written in float64 numpy."""

import itertools

import numpy as np
import pytest
import torch
from ops.tails import pairwise
from tolerance import TOLERANCE

pytest.importorskip("numba")

from spem.ops import cpu
from spem.ops.formula import Incoming, Norm, RawStats
from spem.ops.stats import STATISTICS

SHAPES = [
    (1, 1, 1, 1),
    (3, 17, 4, 4),
    (2, 16, 8, 8),
    (9, 70, 7, 7),
    (2, 5, 40, 33),
    (3, 5, 33),
    (2, 3, 2, 3, 4),
]
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
BOTH = (False, True)


def arranged(t, last):
    kinds = {4: torch.channels_last, 5: torch.channels_last_3d}
    return t.contiguous(memory_format=kinds[t.dim()]) if last and t.dim() > 3 else t.contiguous()


def drawn(shape, dtype, last=False, seed=0, levels=None):
    t = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if levels:
        t = (t * levels).round() / levels
    return arranged(t.to(dtype), last)


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def planes(t):
    return t.double().flatten(2).numpy()


def numbers(t):
    return t.double().numpy()


def near(got, expected, tol, scale=1.0):
    got = numbers(got)
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=tol, atol=tol * scale)


def tolerance(dtype, stored=False):
    """Relative to the numbers; ``stored`` ones were rounded to the map's dtype."""
    return TOLERANCE[dtype if stored else wide(dtype)]["rtol"]


@pairwise(dtype=DTYPES, shape=SHAPES, last=BOTH, levels=(None, 2))
def test_statistics(dtype, shape, last, levels):
    z = drawn(shape, dtype, last, levels=levels)
    raw = cpu.plane_stats(z, True, True)
    x = planes(z)
    near(raw.mean, x.mean(2), tolerance(dtype))
    near(raw.var, x.var(2), tolerance(dtype))
    np.testing.assert_array_equal(numbers(raw.high), x.max(2))
    np.testing.assert_array_equal(numbers(raw.low), x.min(2))
    np.testing.assert_array_equal(numbers(raw.first), x[:, :, 0])
    # numpy's argmax is the first one, in row-major order
    np.testing.assert_array_equal(raw.at_high.numpy(), x.argmax(2))
    np.testing.assert_array_equal(raw.at_low.numpy(), x.argmin(2))
    assert {t.dtype for t in raw[:5]} == {wide(dtype)}
    assert {t.dtype for t in raw[5:]} == {torch.int32}


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("moments", "extrema"), [(True, False), (False, True)])
def test_only_what_is_asked_for(last, moments, extrema):
    z = drawn((3, 20, 5, 5), torch.float32, last)
    whole, some = cpu.plane_stats(z, True, True), cpu.plane_stats(z, moments, extrema)
    for k, (a, b) in enumerate(zip(whole, some, strict=True)):
        if moments if k < 2 else extrema:
            assert torch.equal(a, b)
        else:
            assert b.shape == (0,)
            assert b.dtype == a.dtype


@pytest.mark.parametrize("last", BOTH)
@pytest.mark.parametrize("size", [3, 37, 64])
def test_zeros_of_either_sign_tie(last, size):
    z = torch.zeros(4, 18, size, 1)
    z[:, :, ::2] = -0.0
    z[1:3] = -z[1:3]
    raw = cpu.plane_stats(arranged(z, last), True, True)
    assert not raw.at_high.any()
    assert not raw.at_low.any()


@pairwise(dtype=DTYPES, last=BOTH, size=(1, 5, 16, 40, 100))
def test_a_value_that_is_not_finite(dtype, last, size):
    nan, inf = float("nan"), float("inf")
    for place, value in itertools.product({0, size // 2, size - 1}, (nan, inf, -inf)):
        z = drawn((3, 19, size, 1), dtype, last)
        z[1, 2, place, 0] = value
        if value == -inf and size > 2:
            z[1, 2, 1, 0] = inf  # both: their sum is a NaN although none was there
        raw = cpu.plane_stats(z, True, True)
        x = planes(z)
        with np.errstate(invalid="ignore"):
            np.testing.assert_array_equal(numbers(raw.high), x.max(2))
            np.testing.assert_array_equal(numbers(raw.low), x.min(2))
            near(raw.mean, x.mean(2), tolerance(dtype))
            near(raw.var, x.var(2), tolerance(dtype))
        if value == value:
            np.testing.assert_array_equal(raw.at_high.numpy(), x.argmax(2))
            np.testing.assert_array_equal(raw.at_low.numpy(), x.argmin(2))
        assert 0 <= raw.at_high.min() <= raw.at_high.max() < size
        assert 0 <= raw.at_low.min() <= raw.at_low.max() < size


@pytest.mark.parametrize("last", [False, True])
def test_a_mean_far_from_zero_costs_no_digits(last):
    z = drawn((4, 6, 16, 16), torch.float32, last) + 10_000
    raw = cpu.plane_stats(z, True, False)
    near(raw.var, planes(z).var(2), 1e-4)
    near(raw.mean, planes(z).mean(2), 1e-7)


READS = (("mean",), ("var",), ("max", "min"), ("mean", "var", "max", "min"), ("mean", "max"))


@pairwise(dtype=DTYPES, shape=SHAPES, last=BOTH)
def test_statistics_after_a_constant_norm(dtype, shape, last):
    z = drawn(shape, dtype, last)
    gamma, mu, beta = (drawn(shape[1:2], wide(dtype), seed=seed) for seed in (1, 2, 3))
    var = drawn(shape[1:2], wide(dtype), seed=4).square() + 0.1
    gamma[1::3] = 0.0
    if z[0, 0].numel() > 1:
        flat = z.flatten(2)  # a view only where planes are contiguous
        flat[-1, -1, -1] = float("nan")
        if shape[1] > 2:
            flat[0, 0, -1], flat[0, 1, -1] = float("inf"), -float("inf")
        z = arranged(flat.view(shape), last)
    with np.errstate(invalid="ignore"):
        slope = (numbers(gamma) / np.sqrt(numbers(var) + 1e-5))[:, None]
        x = slope * (planes(z) - numbers(mu)[:, None]) + numbers(beta)[:, None]
        expected = [x.mean(2), x.var(2), x.max(2), x.min(2)]
    for read in READS:
        got = cpu.norm_stats(z, Norm(gamma, beta, mu, var, 1e-5), read)
        for name, t, values in zip(STATISTICS, got, expected, strict=True):
            if name in read:
                near(t, values, tolerance(dtype))
            else:
                assert t is None or name in ("max", "min")


def plane_scalars(shape, dtype, seed):
    return drawn(shape[:2], wide(dtype), seed=seed)


@pairwise(dtype=DTYPES, shape=SHAPES, last=BOTH)
def test_tail_forward_and_backward(dtype, shape, last):
    z, r, g = (drawn(shape, dtype, last, seed) for seed in range(3))
    mu, slope, beta = (drawn(shape[1:2], wide(dtype), seed=seed) for seed in (3, 6, 7))
    v = plane_scalars(shape, dtype, 4)
    y = cpu.affine_tail(z, r, mu, v, slope, beta)
    a, b, m = (numbers(v) * numbers(slope))[:, :, None], None, numbers(mu)[:, None]
    b = (numbers(v) * numbers(beta))[:, :, None]
    near(y.flatten(2), np.maximum(a * (planes(z) - m) + b + planes(r), 0), tolerance(dtype, True))

    d, sums, moments = cpu.affine_tail_backward(g, y, z, mu)
    expected = np.where(planes(y) > 0, planes(g), 0)
    np.testing.assert_array_equal(planes(d), expected)
    size = planes(z).shape[2]
    near(sums, expected.sum(2), tolerance(dtype), size**0.5)
    near(moments, (expected * (planes(z) - m)).sum(2), tolerance(dtype), size**0.5)
    assert y.stride() == d.stride() == z.stride()
    assert y.dtype == d.dtype == dtype


@pairwise(dtype=DTYPES, shape=SHAPES, last=BOTH, affine=BOTH, spikes=BOTH)
def test_gradient_of_the_map(dtype, shape, last, affine, spikes):
    d, z = (drawn(shape, dtype, last, seed) for seed in range(2))
    mu = drawn(shape[1:2], wide(dtype), seed=2)
    p, q, t, s_i, s_j = (plane_scalars(shape, dtype, seed) for seed in range(3, 8))
    size = planes(d).shape[2]
    i, j = (torch.randint(size, shape[:2], dtype=torch.int32) for _ in range(2))
    j[0] = i[0]  # both spikes at one position
    one, two = [q, t] if affine else [None] * 2, [i, j, s_i, s_j] if spikes else [None] * 4
    dz = cpu.stats_backward(d, z, mu, p, *one, *two)

    expected = numbers(p)[:, :, None] * planes(d)
    if affine:
        centred = planes(z) - numbers(mu)[:, None]
        expected += numbers(q)[:, :, None] + numbers(t)[:, :, None] * centred
    if spikes:
        for at, height in ((i, s_i), (j, s_j)):
            expected += (np.arange(size) == at.numpy()[:, :, None]) * numbers(height)[:, :, None]
    near(dz.flatten(2), expected, tolerance(dtype, True))
    assert dz.stride() == z.stride()


@pairwise(dtype=DTYPES, last=BOTH, size=(1, 16, 37))
def test_a_nan_passes_the_tail(dtype, last, size):
    z, r, g = (drawn((2, 5, size, 1), dtype, last, seed) for seed in range(3))
    r[1, 3, size - 1] = float("nan")
    zero, one = torch.zeros(5, dtype=wide(dtype)), torch.ones(2, 5, dtype=wide(dtype))
    y = cpu.affine_tail(z, r, zero, one, one[0], one[0])
    assert torch.equal(y.isnan(), r.isnan())
    d, *_ = cpu.affine_tail_backward(g, y, z, zero)
    assert d[1, 3, size - 1] == g[1, 3, size - 1]
    g[0, 0, 0] = float("nan")
    d, sums, _ = cpu.affine_tail_backward(g, y.new_ones(()).expand(y.shape) + 0 * r, z, zero)
    assert d[0, 0, 0].isnan()
    assert sums.isnan().sum() == 1


def test_bfloat16_is_rounded_as_torch_rounds():
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    z = bits.view(torch.bfloat16).view(1, 1, 256, 256).contiguous()
    d = cpu.affine_tail(
        z,
        torch.zeros_like(z),
        torch.zeros(1),
        torch.full((1, 1), 0.7),
        torch.ones(1),
        torch.zeros(1),
    )
    t = torch.tensor(0.7) * z.float()
    expected = torch.where(t < 0, 0.0, t).to(torch.bfloat16)
    assert torch.equal(d.isnan(), expected.isnan())
    assert torch.equal(d.nan_to_num(), expected.nan_to_num())


@pytest.fixture
def empties_full_of_nan():
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("empties_full_of_nan")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("last", [False, True])
def test_every_output_is_written(dtype, last):
    for shape in ((2, 3, 5, 7), (2, 33, 6, 6)):
        z = drawn(shape, dtype, last)
        c, p = drawn(shape[1:2], wide(dtype)), drawn(shape[:2], wide(dtype))
        raw = cpu.plane_stats(z, True, True)
        normal = cpu.normalised(raw, c, c, c)
        into = Incoming(p, p, p, p)
        y = cpu.affine_tail(z, z, c, p, c, c)
        d, sums, moments = cpu.affine_tail_backward(z, y, z, c)
        of_z = (raw.mean, raw.var, normal.z_i, normal.z_j)
        kinds = {"batch_stats": True, "of_norm": True, "of_map": True}
        weight, bias, found = cpu.gradients(p, sums, moments, into, of_z, c, c, c, 35, **kinds)
        dz = cpu.stats_backward(d, z, c, *found[:3], normal.i, normal.j, *found[3:])
        outputs = [*raw, *normal, y, d, sums, moments, *found, dz]
        outputs += cpu.norm_stats(z, Norm(c, c, c, c.square(), 1e-5), STATISTICS)
        *channels, normal = cpu.normalise_batch(raw, Norm(c, c, None, None, 1e-5), 35, True)
        outputs += [*channels, *normal, weight, bias, cpu.gate_gradient(sums, moments, c, c)]
        assert all(bool(t.isfinite().all()) for t in outputs)


def raw_statistics(batch, channels, dtype):
    drawings = [drawn((batch, channels), dtype, seed=seed) for seed in range(5)]
    positions = [torch.randint(99, (batch, channels), dtype=torch.int32) for _ in range(2)]
    return RawStats(drawings[0], drawings[1].square(), *drawings[2:], *positions)


PLANES = ((1, 1), (3, 5), (9, 40), (128, 70))


class TestScalarStages:
    @pairwise(dtype=DTYPES[:2], planes=PLANES, has=("affine", "running", "nothing"))
    def test_the_norm_of_a_batch(self, dtype, planes, has):
        batch, channels = planes
        raw = raw_statistics(batch, channels, dtype)
        gamma, beta, old, old_var = (drawn((channels,), dtype, seed=seed) for seed in range(6, 10))
        running = (old.clone(), old_var.clone(), 0.3) if has == "running" else None
        weight, bias = (gamma, beta) if has == "affine" else (None, None)
        norm = Norm(weight, bias, None, None, 1e-3, None, running)
        got = cpu.normalise_batch(raw, norm, 49, True)
        mean, var = numbers(raw.mean), numbers(raw.var)
        spread = var.mean(0) + mean.var(0)
        rstd = 1 / np.sqrt(spread + 1e-3)
        near(got.mu, mean.mean(0), tolerance(dtype))
        near(got.var, spread, tolerance(dtype))
        near(got.rstd, rstd, tolerance(dtype))
        near(got.a, rstd if weight is None else numbers(gamma) * rstd, tolerance(dtype))
        np.testing.assert_array_equal(numbers(got.beta), 0.0 if bias is None else numbers(beta))
        expected = cpu.normalised(raw, got.a, got.mu, got.beta)
        for mine, other in zip(got.normal, expected, strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=0)
        if running is not None:
            n = 49 * batch
            near(running[0], 0.7 * numbers(old) + 0.3 * mean.mean(0), tolerance(dtype))
            moved = 0.7 * numbers(old_var) + 0.3 * spread * n / (n - 1)
            near(running[1], moved, tolerance(dtype))
            assert [t._version for t in running[:2]] == [1, 1]  # autograd sees that they moved

    @pairwise(dtype=DTYPES[:2], planes=PLANES, moments=(1, 0), extrema=(1, 0))
    def test_normalised(self, dtype, planes, moments, extrema):
        batch, channels = planes
        raw = raw_statistics(batch, channels, dtype)
        gone = [t.new_empty(0) for t in raw]
        kept = RawStats(*(raw[:2] if moments else gone[:2]), *(raw[2:] if extrema else gone[2:]))
        a, mu, beta = (drawn((channels,), dtype, seed=seed) for seed in range(6, 9))
        a[::3] = 0.0
        got = cpu.normalised(kept, a, mu, beta)
        na, nmu, nbeta = numbers(a), numbers(mu), numbers(beta)
        if moments:
            near(got.mean, na * (numbers(raw.mean) - nmu) + nbeta, tolerance(dtype))
            near(got.var, na**2 * numbers(raw.var), tolerance(dtype))
        if extrema:
            cases = [na > 0, na < 0, na == 0]
            zero = np.zeros((batch, channels))
            high, low, first = (numbers(t) for t in raw[2:5])
            i, j = raw.at_high.numpy(), raw.at_low.numpy()
            z_i, z_j = np.select(cases, [high, low, first]), np.select(cases, [low, high, first])
            near(got.high, na * (z_i - nmu) + nbeta, tolerance(dtype))
            near(got.low, na * (z_j - nmu) + nbeta, tolerance(dtype))
            np.testing.assert_array_equal(numbers(got.z_i), z_i)
            np.testing.assert_array_equal(numbers(got.z_j), z_j)
            np.testing.assert_array_equal(got.i.numpy(), np.select(cases, [i, j, zero]))
            np.testing.assert_array_equal(got.j.numpy(), np.select(cases, [j, i, zero]))
        present = [moments] * 2 + [extrema] * 6
        for t, there in zip(got, present, strict=True):
            assert t.shape == ((batch, channels) if there else (0,))
        assert got.i.dtype == got.j.dtype == torch.int32

    @pairwise(dtype=DTYPES[:2], planes=PLANES)
    def test_gate(self, dtype, planes):
        batch, channels = planes
        total, moment = (drawn((batch, channels), dtype, seed=seed) for seed in range(2))
        a, beta = (drawn((channels,), dtype, seed=seed) for seed in (3, 4))
        expected = numbers(a) * numbers(moment) + numbers(beta) * numbers(total)
        near(cpu.gate_gradient(total, moment, a, beta), expected, tolerance(dtype))

    @pairwise(dtype=DTYPES[:2], planes=PLANES, given=(0, 1, 2, 6, 9, 15), training=BOTH)
    def test_gradients(self, dtype, planes, given, training):
        batch, channels = planes
        raw = raw_statistics(batch, channels, dtype)
        v, A, Bc, *grads = (drawn((batch, channels), dtype, seed=seed) for seed in range(10, 17))
        a, mu, rstd = (drawn((channels,), dtype, seed=seed) for seed in range(20, 23))
        into = Incoming(*(t if given >> k & 1 else None for k, t in enumerate(grads)))
        size = 49
        of_z = (raw.mean, raw.var, raw.low, raw.first)
        arguments = (v, A, Bc, into, of_z, a, mu, rstd, size)
        kinds = {"batch_stats": training, "of_norm": True}
        weight, bias, got = cpu.gradients(*arguments, **kinds, of_map=True)
        dmean, dvar, dhigh, dlow = (0.0 if t is None else numbers(t) for t in into)
        na, nmu, nv = numbers(a), numbers(mu), numbers(v)
        mean, var, z_i, z_j = (numbers(t) for t in of_z)
        s0 = (nv * numbers(A) + dmean + dhigh + dlow).sum(0)
        dxz = nv * numbers(Bc) + dmean * (mean - nmu) + 2 * na * dvar * var
        s1 = (dxz + dhigh * (z_i - nmu) + dlow * (z_j - nmu)).sum(0)
        near(bias, s0, tolerance(dtype), batch)
        near(weight, numbers(rstd) * s1, tolerance(dtype), batch)
        each = training / (batch * size)
        shared = s0 * each, numbers(rstd) ** 2 * s1 * each
        near(got.p, na * nv, tolerance(dtype))
        assert (got.q is None) == (got.t is None) == (not training and not given & 3)
        if got.q is not None:
            q = na * (dmean / size - 2 * na * dvar * (mean - nmu) / size - shared[0])
            t = na * (2 * na * dvar / size - shared[1])
            near(got.q, np.broadcast_to(q, nv.shape), tolerance(dtype))
            near(got.t, np.broadcast_to(t, nv.shape), tolerance(dtype))
        assert (got.s_i is None) == (got.s_j is None) == (not given & 12)
        if got.s_i is not None:
            near(got.s_i, na * dhigh + 0 * nv, tolerance(dtype))
            near(got.s_j, na * dlow + 0 * nv, tolerance(dtype))
        weight, bias, nothing = cpu.gradients(*arguments, **kinds, of_map=False)
        assert nothing is None
        near(bias, s0, tolerance(dtype), batch)


def test_refusals():
    z = torch.zeros(2, 3, 4, 4)
    mu, p = torch.zeros(3), torch.zeros(2, 3)
    with pytest.raises(TypeError, match="float16"):
        cpu.plane_stats(z.half(), True, True)
    with pytest.raises(ValueError, match="contiguous or channels_last"):
        cpu.plane_stats(z.transpose(2, 3), True, True)
    with pytest.raises(ValueError, match="maps must agree"):
        cpu.affine_tail(z, z[:1], mu, p, mu, mu)
    with pytest.raises(ValueError, match="maps must agree"):
        cpu.affine_tail(z, z.contiguous(memory_format=torch.channels_last), mu, p, mu, mu)
    with pytest.raises(ValueError, match="maps must agree"):
        cpu.affine_tail_backward(z, z, z.double(), mu)
    with pytest.raises(ValueError, match=r"\[3\] expected, not \[2\]"):
        cpu.affine_tail(z, z, mu[:2], p, mu, mu)
    with pytest.raises(ValueError, match="no empty axis"):
        cpu.plane_stats(z[:0], True, True)
