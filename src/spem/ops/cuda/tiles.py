"""How the Triton kernels cut a map into tiles: decided by layout and sizes alone, at no cost.

This module knows no Triton: it also plans launches for tensors without data (``device="meta"``).
"""

from functools import lru_cache
from math import gcd, prod
from typing import NamedTuple

from torch import Tensor

# A tile of the contiguous layout: 8 elements a thread of 4 warps, one 128-bit load in half
# precision. A plane that is longer is looped over (statistics) or cut (elementwise passes).
CONTIGUOUS_TILE = 1024
# A tile of the channels_last layout: 32 channels are 64 bytes in half precision, two sectors.
CHANNELS_LAST_TILE = 2048
CHANNELS_LAST_CHANNELS = 32
WARPS = 4
# Reducing passes split the positions while they have fewer programs than fill a large GPU; each
# part keeps at least two tiles, so that the partial results stay small against the map.
ENOUGH_PROGRAMS = 512
MOST_PARTS = 16
# Positions are int32 everywhere, with room for the lanes of a last, partly filled tile.
LONGEST_PLANE = 2**30
INT32_MAX = 2**31 - 1
# What a masked lane may compute beyond the map without leaving int32.
SLACK = 2**16


class Plan(NamedTuple):
    """Sizes of a map [B, C, ...] of ``K`` positions, its tile and the programs of the passes.

    ``last`` is the layout (channels_last), ``wide`` asks for int64 offsets. Elementwise passes
    start ``groups * blocks`` programs of one tile each, reducing passes ``groups * parts`` programs
    of ``tiles`` tiles. ``K_unit`` and ``C_unit`` are powers of two that divide K and C as far as
    the layout makes use of them: the kernels read wide vectors on the strength of it.
    """

    last: bool
    wide: bool
    B: int
    C: int
    K: int
    K_unit: int
    C_unit: int
    tile: tuple[int, int, int]
    groups: int
    blocks: int
    parts: int
    tiles: int

    @property
    def sizes(self) -> tuple[int, int, int]:
        """What every kernel is given: planes, K and C, in their units."""
        return self.B * self.C, self.K // self.K_unit, self.C // self.C_unit

    @property
    def constants(self) -> dict[str, int]:
        """What every pass is compiled with."""
        planes, positions, warps = self.tile
        found = {"LAST": self.last, "WIDE": self.wide, "K_UNIT": self.K_unit, "C_UNIT": self.C_unit}
        return found | {"P": planes, "KB": positions, "num_warps": warps}


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << (n - 1).bit_length()


def tile_of(last: bool, K: int, C: int, statistics: bool = False) -> tuple[int, int, int]:
    """How many planes and positions one program handles at a time, and with how many warps.

    Table for planes of K positions and C channels (planes x positions, 4 warps):
        contiguous     32x32, 28x28, 56x56: 1 x 1024;  16x16, 14x14: 4 x 256;  8x8, 7x7: 16 x 64
        channels_last  4x4: 128 x 16;  7x7 and larger: 32 x 64, but 32 x 32 for the statistics of
                       planes larger than 8x8

    The pass of the statistics keeps six numbers a cell of its tile while it goes through a plane.
    """
    if last:
        planes = min(power_of_two(C), CHANNELS_LAST_CHANNELS)
        positions = min(power_of_two(K), CHANNELS_LAST_TILE // planes)
        # Few positions: more channels fill the tile, up to 128.
        planes = min(power_of_two(C), CHANNELS_LAST_TILE // positions, 128)
        if statistics and positions < K:
            positions //= 2
        return planes, positions, WARPS
    positions = min(power_of_two(K), CONTIGUOUS_TILE)
    return CONTIGUOUS_TILE // positions, positions, WARPS


@lru_cache(maxsize=1024)
def plan_of(last: bool, B: int, C: int, K: int, statistics: bool = False) -> Plan:
    """The plan of a map of B images, C channels and planes of K positions; see `tile_of`."""
    if K > LONGEST_PLANE:
        raise ValueError(
            f"impl='triton' takes planes of at most {LONGEST_PLANE} positions, got {K}. "
            "Use impl=None or 'reference'."
        )
    tile = tile_of(last, K, C, statistics)
    planes, positions, _ = tile
    groups = B * -(-C // planes) if last else -(-B * C // planes)
    blocks = -(-K // positions)
    parts = max(1, min(MOST_PARTS, -(-ENOUGH_PROGRAMS // max(groups, 1)), blocks // 2))
    tiles = -(-blocks // parts)
    return Plan(
        last=last,
        wide=B * C * K > INT32_MAX - SLACK,
        B=B,
        C=C,
        K=K,
        # The other one is not a stride of this layout; 1 keeps the number of compilations small.
        K_unit=1 if last else gcd(K, 16),
        C_unit=gcd(C, 16) if last else 1,
        tile=tile,
        groups=groups,
        blocks=blocks,
        parts=-(-blocks // tiles),
        tiles=tiles,
    )


def is_channels_last(x: Tensor) -> bool | None:
    """False for a contiguous map, True for channels_last of any rank, None for anything else.

    A map that is both (one channel, or planes of one position) counts as contiguous.
    """
    if x.is_contiguous():
        return False
    return True if x.movedim(1, -1).is_contiguous() else None


def plan_for(x: Tensor, statistics: bool = False) -> Plan:
    """The plan of a map from its shape and strides, for the pass of the statistics or others."""
    shape, last = x.shape, is_channels_last(x)
    if last is None:
        raise ValueError(
            "impl='triton' needs a contiguous or channels_last map, got strides "
            f"{x.stride()} for shape {tuple(shape)}."
        )
    return plan_of(last, shape[0], shape[1], prod(shape[2:]), statistics)
