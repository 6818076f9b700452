"""What takes a map to its descriptor [N, C]: the base of all pools, and what they are given."""

from typing import NamedTuple

from torch import Tensor, nn

from spem.ops import PlaneStats


class MapStats(NamedTuple):
    """`PlaneStats` with the map they are of, for a pool that must look at it."""

    mean: Tensor | None
    var: Tensor | None
    max: Tensor | None
    min: Tensor | None
    size: int
    batch: int
    map: Tensor


class Pool(nn.Module):
    """Takes plane statistics to a descriptor [N, C]; ``statistics`` names those it reads."""

    statistics: tuple[str, ...] = ()
    needs_map: bool = False
    """Whether it must be given `MapStats` in training."""

    def forward(self, stats: PlaneStats) -> Tensor:
        """The descriptor, [N, C]."""
        raise NotImplementedError
