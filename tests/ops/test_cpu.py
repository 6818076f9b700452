"""What the CPU kernels alone have: statistics after a constant norm, rounding, refusals."""

import numpy as np
import pytest
import torch
from ops.tails import pairwise
from tolerance import TOLERANCE

pytest.importorskip("numba")

from spem.ops import cpu
from spem.ops.formula import Norm
from spem.ops.stats import STATISTICS

SHAPES = (
    *((1, 1, 1, 1), (3, 17, 4, 4), (2, 16, 8, 8), (9, 70, 7, 7)),
    *((2, 5, 40, 33), (3, 5, 33), (2, 3, 2, 3, 4)),
)
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
BOTH = (False, True)
pytestmark = pytest.mark.usefixtures("deterministic")


def arranged(t, last):
    kinds = {4: torch.channels_last, 5: torch.channels_last_3d}
    return t.contiguous(memory_format=kinds[t.dim()]) if last and t.dim() > 3 else t.contiguous()


def drawn(shape, dtype, last=False, seed=0):
    t = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return arranged(t.to(dtype), last)


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def planes(t):
    return t.double().flatten(2).numpy()


def numbers(t):
    return t.double().numpy()


def near(got, expected, tol):
    assert got.shape == expected.shape
    np.testing.assert_allclose(numbers(got), expected, rtol=tol, atol=tol)


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
            pair = ("mean", "var") if name in ("mean", "var") else ("max", "min")
            if name in read:
                near(t, values, TOLERANCE[wide(dtype)]["rtol"])
            elif not {*pair} & {*read}:
                assert t.shape == (0,)


def test_bfloat16_is_rounded_as_torch_rounds():
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    z = bits.view(torch.bfloat16).view(1, 1, 256, 256).contiguous()
    one = torch.ones(1)
    d = cpu.affine_tail(z, torch.zeros_like(z), 0 * one, 0.7 * one[None], one, 0 * one)
    t = torch.tensor(0.7) * z.float()
    expected = torch.where(t < 0, 0.0, t).to(torch.bfloat16)
    assert torch.equal(d.isnan(), expected.isnan())
    assert torch.equal(d.nan_to_num(), expected.nan_to_num())


def test_refusals():
    z = torch.zeros(2, 3, 4, 4)
    mu, p = torch.zeros(3), torch.zeros(2, 3)
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
