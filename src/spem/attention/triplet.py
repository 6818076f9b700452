"""Triplet attention."""

from typing import Any

import torch
from torch import Tensor, nn

from spem.attention.base import ChannelAttention, Needs, register_attention
from spem.attention.options import Device, Dtype, Factory, odd_int
from spem.attention.precision import call
from spem.ops.stats import compute_dtype


class Plane(nn.Module):
    """The gate of one plane: s(BN(conv_k([max; mean]))) over the axis that is pooled away."""

    def __init__(self, kernel: int, **factory: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, kernel, padding=kernel // 2, bias=False, **factory)
        self.norm = nn.BatchNorm2d(1, momentum=0.01, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """[N, P, A, B] -> [N, 1, A, B], P the pooled axis."""
        # Index-based: the gradient goes to the first maximal entry.
        described = torch.stack([x.max(1).values, x.mean(1)], dim=1)
        return torch.sigmoid(call(self.norm, call(self.conv, described)))


@register_attention(
    "triplet",
    paper="Rotate to Attend: Convolutional Triplet Attention Module (2021), https://arxiv.org/abs/2010.03045",
    needs=Needs(values=2, batch_statistics=True),
)
class Triplet(ChannelAttention):
    """Triplet attention: a gate for each pair of the axes C, H, W; their mean.

    Formula:
        For each plane (C, W), (H, C), (H, W): g = s(BN(conv_k([max; mean]))), max and mean over the
        third axis, one output channel, zero padding, no bias, BN momentum 0.01. y = x * (g_cw +
        g_hc + g_hw) / 3. BN 1/0 at the start. Parameters: 3 (2 k^2 + 2). Shape: [N, C, H, W]; N H W
        >= 2 in training.

    Args:
        kernel: k, odd, side of the kernels.
    """

    def __init__(
        self, channels: int, *, kernel: int = 7, device: Device = None, dtype: Dtype = None
    ) -> None:
        super().__init__(channels)
        odd_int("Triplet", kernel=kernel)
        factory = Factory(device=device, dtype=dtype)
        self.cw, self.hc, self.hw = (Plane(kernel, **factory) for _ in range(3))

    def gate(self, x: Tensor) -> Tensor:
        """The mean of the three gates, [N, C, H, W]."""
        wide = x.to(compute_dtype(x.dtype))
        cw = self.cw(wide.permute(0, 2, 1, 3)).permute(0, 2, 1, 3)  # [N, C, 1, W]
        hc = self.hc(wide.permute(0, 3, 2, 1)).permute(0, 3, 2, 1)  # [N, C, H, 1]
        return (cw + hc + self.hw(wide)) / 3.0
