"""The control: a learned factor per channel that sees no input."""

import torch
from torch import Tensor, nn

from spem.attention.base import ChannelAttention, register_attention
from spem.attention.options import Device, Dtype, number
from spem.ops import PlaneStats
from spem.ops.stats import compute_dtype

START = 0.03205860328008499
"""s(-1) s(-2): the gate every SPEM of form text or code starts from."""


@register_attention("scale", paper="A control of this library, not a published module")
class Scale(ChannelAttention):
    """A learned factor per channel, without input: y = x * f_c, f_c started at SPEM's first gate.

    SPEM differs from the plain network both by attention and by starting every branch at 0.03 of
    its size. This module has the start and no attention, so the difference of SPEM to it is the
    attention's.

    Formula:
        y = x * f. Parameters: C. Shape: [N, C, ...], one to three spatial axes.

    Args:
        start: Value all factors start from.
    """

    def __init__(
        self, channels: int, *, start: float = START, device: Device = None, dtype: Dtype = None
    ) -> None:
        super().__init__(channels)
        number("Scale", start=start)
        self.start = self.start_gate = float(start)
        self.factor = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self._draw_start({"factor": self.start})

    def gate_from(self, stats: PlaneStats) -> Tensor:
        """The factors, [N, C]."""
        return self.factor.to(compute_dtype(self.factor.dtype)).expand(stats.batch, self.channels)
