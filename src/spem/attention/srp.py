"""Stochastic region pooling: in training a descriptor is the mean over a random part of the map."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from spem.attention.descriptor import MapStats, Pool
from spem.ops import PlaneStats
from spem.ops.stats import compute_dtype
from spem.seeding import keyed_generator

Per = Literal["image", "channel", "batch"]


@dataclass(frozen=True)
class SRP:
    """Stochastic region pooling: a description, not a module.

    Formula:
        In training the mean over ``regions`` boxes (their means averaged) whose sides are ``share``
        of the map's, each at a place drawn uniformly; in evaluation the mean over the whole map.

    Args:
        share: Side of a box over the side of the map, in (0, 1]; rounded, at least one position.
        regions: Boxes a descriptor.
        per: What has boxes of its own: every ``"image"``, every ``"channel"`` of every image, or
            the ``"batch"``.

    Raises:
        ValueError: An option outside these.

    Paper: Stochastic Region Pooling: Make Attention More Expressive (2019),
    https://arxiv.org/abs/1904.09853.

    Differences: how the paper chooses regions is not known to us; all three options are ours.
    """

    share: float = 0.5
    regions: int = 1
    per: Per = "image"

    def __post_init__(self) -> None:
        if isinstance(self.share, bool) or not isinstance(self.share, (int, float)):
            raise ValueError(f"SRP: share={self.share!r} is not a number. Use one in (0, 1].")
        if not 0.0 < self.share <= 1.0:
            raise ValueError(f"SRP: share={self.share} lies outside (0, 1].")
        if isinstance(self.regions, bool) or not isinstance(self.regions, int) or self.regions < 1:
            raise ValueError(f"SRP: regions={self.regions!r} is not a positive integer.")
        if self.per not in get_args(Per):
            raise ValueError(
                f"SRP: per={self.per!r} is unknown. Use one of {', '.join(get_args(Per))}."
            )
        object.__setattr__(self, "share", float(self.share))

    def __str__(self) -> str:
        given = [("per", self.per), ("regions", self.regions), ("share", self.share)]
        plain = SRP.__dataclass_fields__
        changed = [f"{name}={value}" for name, value in given if value != plain[name].default]
        return f"srp({', '.join(changed)})" if changed else "srp"


class RegionPool(Pool):
    """The pool that `SRP` describes.

    Its draws are a hash of (its key, the number of batches seen, image, channel, box, axis), in
    integers on the device of the map: nothing depends on a global generator, a resumed training
    draws what the uninterrupted one would have drawn, and a compiled or captured step draws anew.
    Both numbers are saved with the weights.
    """

    statistics = ("mean",)
    needs_map = True
    draws: Tensor

    def __init__(self, spec: SRP, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("draws", torch.zeros(2, dtype=torch.int64, device=device))

    def reseed(self, seed: int, name: str) -> None:
        """Starts the sequence of a seed and a place in the network anew."""
        key = torch.randint(2**31, (), generator=keyed_generator(seed, name), device="cpu")
        with torch.no_grad():
            self.draws.copy_(torch.stack([key, torch.zeros_like(key)]))

    def forward(self, stats: PlaneStats) -> Tensor:
        """The mean over random boxes in training, over the map in evaluation, [N, C]."""
        if not self.training:
            assert stats.mean is not None
            return stats.mean
        if not isinstance(stats, MapStats):
            raise TypeError("SRP: needs the map in training; call the module, not gate_from.")
        x = stats.map
        starts = self._starts(x)
        with torch.no_grad():
            self.draws[1].add_(1)
        wide = x.to(compute_dtype(x.dtype))
        return torch.stack([self._mean(wide, box) for box in starts]).mean(0)

    def _mean(self, x: Tensor, starts: list[Tensor]) -> Tensor:
        """The mean over one box of every plane; starts: of each axis, [N or 1, C or 1]."""
        for axis in reversed(range(2, x.dim())):
            side, start = self._side(x.shape[axis]), starts[axis - 2][..., None]
            position = torch.arange(x.shape[axis], device=x.device)
            inside = (position >= start) & (position < start + side)  # [N, C, extent]
            weight = inside.to(x.dtype) / side
            x = (x * weight[(..., *[None] * (axis - 2), slice(None))]).sum(axis)
        return x

    def _side(self, extent: int) -> int:
        return max(1, math.floor(self.spec.share * extent + 0.5))

    def _starts(self, x: Tensor) -> list[list[Tensor]]:
        """Box by box and axis by axis, where it starts."""
        images = x.shape[0] if self.spec.per != "batch" else 1
        channels = x.shape[1] if self.spec.per == "channel" else 1
        image = torch.arange(images, device=x.device)[:, None]
        channel = torch.arange(channels, device=x.device)
        key = _hash(_hash(self.draws[0]) ^ self.draws[1])
        cell = _hash(_hash(key ^ image) ^ channel)  # [images, channels]
        found: list[list[Tensor]] = []
        for box in range(self.spec.regions):
            own = _hash(cell ^ box)
            axes = range(x.dim() - 2)
            places = [x.shape[2 + axis] - self._side(x.shape[2 + axis]) + 1 for axis in axes]
            found.append([(_hash(own ^ (axis + 1)) * places[axis]) >> 32 for axis in axes])
        return found

    def extra_repr(self) -> str:
        """The options."""
        return f"share={self.spec.share}, regions={self.spec.regions}, per={self.spec.per}"


def _hash(value: Tensor) -> Tensor:
    """Integers in [0, 2^32) to such integers that look random; no product leaves int64."""
    mask, factor = 0xFFFFFFFF, 0x45D9F3B
    value = (value + 0x9E3779B9) & mask
    value = ((value ^ (value >> 16)) * factor) & mask
    value = ((value ^ (value >> 16)) * factor) & mask
    return value ^ (value >> 16)
