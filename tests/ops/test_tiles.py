"""How the kernels for CUDA cut maps: pure arithmetic on sizes, on tensors without data."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spem.ops.cuda import tiles

both_layouts = pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])


def sized(*shape: int, last: bool = False) -> torch.Tensor:
    if not last:
        return torch.empty(shape, device="meta")
    return torch.empty(shape[0], *shape[2:], shape[1], device="meta").movedim(-1, 1)


@both_layouts
def test_offsets_are_int64_when_sizes_demand(last: bool) -> None:
    assert not tiles.plan_for(sized(128, 256, 56, 56, last=last)).wide
    assert not tiles.plan_for(sized(2**10, 2**10, 32, 63, last=last)).wide
    assert tiles.plan_for(sized(2**10, 2**11, 32, 32, last=last)).wide
    assert tiles.plan_for(sized(1, 2**11, 2**10, 2**10, last=last)).wide
    with pytest.raises(ValueError, match="at most 1073741824 positions"):
        tiles.plan_for(sized(1, 2, 2**15 + 1, 2**15, last=last))


def test_the_table_of_tiles() -> None:
    assert tiles.tile_of(False, 1024, 64) == (1, 1024, 4)
    assert tiles.tile_of(False, 3136, 256) == (1, 1024, 4)
    assert tiles.tile_of(False, 196, 1024) == (4, 256, 4)
    assert tiles.tile_of(False, 49, 2048) == (16, 64, 4)
    assert tiles.tile_of(True, 1024, 64) == tiles.tile_of(True, 49, 2048) == (32, 64, 4)
    assert tiles.tile_of(True, 16, 512) == (128, 16, 4)
    assert tiles.tile_of(True, 49, 64, True) == (32, 64, 4)
    assert tiles.tile_of(True, 1024, 64, True) == (32, 32, 4)
    assert tiles.tile_of(False, 3136, 64, True) == (1, 1024, 4)


def test_programs_cover_every_plane_and_position_once() -> None:
    draw = np.random.default_rng(0)
    for _ in range(500):
        B, C, K = (int(2 ** draw.uniform(0, most)) for most in (8, 12, 18))
        last, statistics = draw.integers(2, size=2).astype(bool).tolist()
        plan = tiles.plan_of(last, B, C, K, statistics)
        planes, positions, _ = plan.tile
        assert planes & (planes - 1) == positions & (positions - 1) == 0
        rows = plan.groups * planes
        assert rows >= B * C
        assert rows < B * (C + planes) if last else rows < B * C + planes
        assert (plan.blocks - 1) * positions < K <= plan.blocks * positions
        assert (plan.parts - 1) * plan.tiles < plan.blocks <= plan.parts * plan.tiles
        assert plan.parts <= tiles.MOST_PARTS
        assert K % plan.K_unit == C % plan.C_unit == 0


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 3, 4, 5), (2, 3, 4, 5, 6)], ids=str)
def test_layouts_are_distinguished(shape: tuple[int, ...]) -> None:
    assert tiles.is_channels_last(sized(*shape)) is False
    assert tiles.is_channels_last(sized(*shape, last=True)) is True
    assert tiles.is_channels_last(sized(*shape)[..., ::2]) is None
    assert tiles.is_channels_last(sized(*shape)[:, :, :1].expand(shape)) is None
    # What is both counts as contiguous.
    assert tiles.is_channels_last(sized(2, 1, *shape[2:], last=True)) is False
    assert tiles.is_channels_last(sized(2, 3, *(1 for _ in shape[2:]), last=True)) is False


def test_few_planes_are_split_among_programs() -> None:
    assert tiles.plan_of(True, 128, 64, 1024, True).parts == 2
    assert tiles.plan_of(True, 1, 64, 3136, True).parts > 8
    assert tiles.plan_of(True, 128, 256, 1024, True).parts == 1
    assert tiles.plan_of(False, 128, 64, 3136).parts == 1
