"""Span: a channel's gate from the distance between its maximum and its minimum."""

import torch
from torch import Tensor, nn

from spem.attention.base import ChannelAttention, Needs, register_attention
from spem.ops import PlaneStats


@register_attention(
    "span",
    paper="A worked example of the documentation, no published module",
    needs=Needs(statistics=("max", "min"), no_decay=("weight",)),
)
class Span(ChannelAttention):
    """A gate per channel from the range of its plane.

    Formula:
        y = x * s(w (M - m) + b), M and m the maximum and minimum of a plane, s the logistic
        sigmoid. w = b = 0 at the start: the gate is 0.5. Parameters: 2C.

    Shape:
        x: [N, C, ...], one to three spatial axes.

    Args:
        channels: C.
        device: Where the parameters live.
        dtype: Dtype of the parameters.
    """

    start_gate = 0.5

    def __init__(
        self,
        channels: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channels, device=device, dtype=dtype)
        self.weight = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self._draw_start({"weight": 0.0, "bias": 0.0})

    def gate_from(self, stats: PlaneStats) -> Tensor:
        """s(w (M - m) + b), [N, C]."""
        assert stats.max is not None
        assert stats.min is not None
        spread = stats.max - stats.min
        return torch.sigmoid(self.weight.to(spread.dtype) * spread + self.bias.to(spread.dtype))
