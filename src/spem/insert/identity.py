"""Attention that leaves its map as it is at the start, for networks that have been trained."""

import dataclasses

import torch
from torch import Tensor, nn

from spem.attention import ChannelAttention
from spem.ops import PlaneStats
from spem.ops.library import has_hooks


class IdentityStart(ChannelAttention):
    """An attention whose gate starts at one and learns from there.

    Formula:
        y = x * (1 + alpha (v - 1)), v the gate of the attention, alpha one learned number, 0 at the
        start. A module that adds to the map (`Needs.adds`), or has a forward of its own, mixes the
        maps: y = x + alpha (attention(x) - x). With alpha = 1 it is the attention itself.

    Shape:
        x and output: as for the attention.

    Args:
        inner: The attention.
        device: Where alpha lives.
        dtype: Dtype of alpha.

    Differences: at the start alpha has a gradient and the attention none, since alpha = 0
    multiplies it; from the second step on both learn.
    """

    def __init__(
        self,
        inner: ChannelAttention,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(inner.channels)
        self.inner = inner
        vars(self)["name"] = inner.name  # what tables call it
        vars(self)["paper"] = inner.paper
        self.needs = dataclasses.replace(
            inner.needs,
            # Pulling alpha to 0 would take the attention out again.
            no_decay=("alpha", *(f"inner.{name}" for name in inner.needs.no_decay)),
            stops_gradients=tuple(f"inner.{name}" for name in inner.needs.stops_gradients),
        )
        self.statistics, self.reads_map = inner.statistics, inner.reads_map
        kind = type(inner)
        self._mixes_maps = inner.needs.adds or kind.forward is not ChannelAttention.forward
        self.alpha = nn.Parameter(torch.empty((), device=device, dtype=dtype))
        nn.init.zeros_(self.alpha)

    def reset_parameters(self) -> None:
        """alpha = 0; the attention resets itself."""
        nn.init.zeros_(self.alpha)
        self.inner.reset_parameters()

    @property
    def start_gate(self) -> float | None:
        """One."""
        return 1.0

    def takes_any_rank(self) -> bool:
        """Whether the attention does."""
        return self.inner.takes_any_rank()

    def why_composed(self) -> str | None:
        """Why the tail of this module is composed of modules; None if its gate can be fused."""
        if self._mixes_maps:
            return f"{self.name} is mixed with its map"
        hooks = f"cannot call the hooks of {self.name}" if has_hooks(self) else None
        return self.inner.why_composed() or hooks

    def gate_from(self, stats: PlaneStats) -> Tensor:
        """1 + alpha (v - 1), [N, C]."""
        return self._from_one(self.inner.gate_from(stats))

    def map_gate(self, x: Tensor) -> Tensor:
        """1 + alpha (v - 1), broadcastable to x."""
        return self._from_one(self.inner.gate(x))

    def forward(self, x: Tensor) -> Tensor:
        """y, as in the formula."""
        if not self._mixes_maps:
            return super().forward(x)
        return x + self.alpha.to(x.dtype) * (self.inner(x) - x)

    def _from_one(self, v: Tensor) -> Tensor:
        return 1.0 + self.alpha.to(v.dtype) * (v - 1.0)
