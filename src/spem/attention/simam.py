"""simAM: a parameter-free energy for every position."""

import torch
from torch import Tensor

from spem.attention.base import ChannelAttention, Needs, register_attention
from spem.attention.options import Device, Dtype, positive
from spem.ops.stats import compute_dtype


@register_attention(
    "simam",
    paper="SimAM: A Simple, Parameter-Free Attention Module (2021), https://proceedings.mlr.press/v139/yang21o.html",
    needs=Needs(pixels=2),
)
class SimAM(ChannelAttention):
    """simAM: positions that differ from their plane's mean are kept; no parameters.

    Formula:
        d = (x - mean_HW x)^2; E = d / (4 (sum_HW d / (H W - 1) + lambda)) + 1/2; y = x * s(E), so
        every gate is at least s(1/2) = 0.6224593. Parameters: none. Shape: [N, C, H, W], H W >= 2.

    Args:
        lam: lambda > 0, the regulariser. 1e-4 is the official class's default; the official
            ImageNet commands pass 0.1.

    Differences: the official CIFAR networks put it before the norm of the middle convolution; here
    it is placed like any other attention. Computed in float32 for half-precision maps.
    """

    def __init__(
        self, channels: int, *, lam: float = 1e-4, device: Device = None, dtype: Dtype = None
    ) -> None:
        super().__init__(channels, device=device, dtype=dtype)
        positive("SimAM", lam=lam)
        self.lam = float(lam)

    def gate(self, x: Tensor) -> Tensor:
        """s(E), [N, C, H, W]."""
        wide = x.to(compute_dtype(x.dtype))
        d = (wide - wide.mean((2, 3), keepdim=True)).square()
        variance = d.sum((2, 3), keepdim=True) / (x.shape[2] * x.shape[3] - 1)
        return torch.sigmoid(d / (4.0 * (variance + self.lam)) + 0.5)
