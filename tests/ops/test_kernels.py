"""How the Triton passes are launched, on a GPU or, where there is none, in the interpreter."""

from __future__ import annotations

import os

import pytest
import torch
from ops.tails import pairwise
from tolerance import TOLERANCE

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the kernels are imported
pytest.importorskip("triton", minversion="3.6", reason="no triton of 3.6 or later")

from spem.ops import cuda as kernels
from spem.ops.cuda import tiles

if not (kernels.INTERPRETED or torch.cuda.is_available()):
    pytest.skip("no GPU, and Triton came without TRITON_INTERPRET=1", allow_module_level=True)

DEVICE = "cpu" if kernels.INTERPRETED else "cuda"
both_layouts = pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
pytestmark = pytest.mark.usefixtures("deterministic")


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


@both_layouts
def test_lanes_beyond_a_plane_add_nothing(last: bool) -> None:
    """Not even with infinite coefficients, which make 0 times them NaN."""
    z = drawn((1, 3, 5, 5), torch.float32, last)
    mu = torch.full((3,), float("inf"), device=DEVICE)
    _, total, moment = kernels.affine_tail_backward(z.abs(), torch.ones_like(z), z, mu)
    assert total.isfinite().all()
    assert (moment == float("-inf")).all()


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

    def changed(x: torch.Tensor, statistics: bool = False) -> tiles.Plan:
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
    with pytest.raises(ValueError, match="maps must agree"):
        kernels.affine_tail(z, r.to(DEVICE), s[0], s, s[0], s[0])


def test_one_channel_counts_as_contiguous_whatever_its_strides() -> None:
    z = drawn((2, 1, 4, 4), torch.float32, last=True)
    s = scalars(2, 1)
    y = kernels.affine_tail(z, z.contiguous(), s[0], s, s[0], s[0])
    torch.testing.assert_close(y, kernels.affine_tail(z, z, s[0], s, s[0], s[0]))
