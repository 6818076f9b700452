"""eSE: effective squeeze-and-excitation."""

import torch
from torch import Tensor, nn

from spem.attention.base import ChannelAttention, register_attention
from spem.attention.options import Device, Dtype
from spem.attention.pooling import PoolSpec
from spem.attention.precision import call
from spem.ops import PlaneStats


@register_attention(
    "ese",
    paper="CenterMask: Real-Time Anchor-Free Instance Segmentation (2020), https://arxiv.org/abs/1911.06667",
)
class ESE(ChannelAttention):
    """Effective squeeze-and-excitation: one full linear layer, no bottleneck.

    Formula:
        y = x * hardsigmoid(W z + b), z the pooled channels (global average by default), W of C x C,
        hardsigmoid(v) = min(max(v + 3, 0), 6) / 6. Parameters: C^2 + C. Shape: [N, C, ...], one to
        three spatial axes.

    Args:
        pool: How a plane becomes a number.

    Differences: the paper writes a sigmoid; this is the official code's hard sigmoid.
    """

    def __init__(
        self, channels: int, *, pool: PoolSpec = "avg", device: Device = None, dtype: Dtype = None
    ) -> None:
        super().__init__(channels, pool=pool, device=device, dtype=dtype)
        self.fc = nn.Linear(channels, channels, device=device, dtype=dtype)

    def gate_from(self, stats: PlaneStats) -> Tensor:
        """hardsigmoid(W z + b), [N, C]."""
        # Clamped, since torch's hardsigmoid has no second derivative.
        return torch.clamp(call(self.fc, self.pool(stats)) + 3.0, 0.0, 6.0) / 6.0
