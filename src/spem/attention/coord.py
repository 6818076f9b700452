"""Coordinate attention."""

import torch
from torch import Tensor, nn

from spem.attention.base import ChannelAttention, Needs, register_attention
from spem.attention.options import Device, Dtype, Factory, positive_int
from spem.attention.precision import call
from spem.ops.stats import compute_dtype

LEAST = 8


@register_attention(
    "coord",
    paper="Coordinate Attention for Efficient Mobile Network Design (2021), https://arxiv.org/abs/2103.02907",
    needs=Needs(batch_statistics=True),
)
class CoordAtt(ChannelAttention):
    """Coordinate attention: one gate along the height, one along the width.

    Formula:
        p_h = mean over W, p_w = mean over H; f = hswish(BN(W1 [p_h; p_w] + b1)), one 1 x 1
        convolution over both, to h = max(8, C // reduction) channels; y = x * s(W_h f_h + b_h) *
        s(W_w f_w + b_w), hswish(v) = v min(max(v + 3, 0), 6) / 6. Parameters: C h + 3 h + 2 (h C +
        C). Shape: [N, C, H, W].

    Args:
        reduction: r; the hidden width is C // r, but at least 8.

    Differences: its authors use it in MobileNetV2, after the depthwise convolution; here it is
    placed like any other attention. timm's layer of this name has other widths and no biases.
    """

    def __init__(
        self, channels: int, *, reduction: int = 32, device: Device = None, dtype: Dtype = None
    ) -> None:
        super().__init__(channels)
        factory = Factory(device=device, dtype=dtype)
        positive_int("CoordAtt", reduction=reduction)
        hidden = max(LEAST, channels // reduction)
        self.conv = nn.Conv2d(channels, hidden, 1, **factory)
        self.norm = nn.BatchNorm2d(hidden, **factory)
        self.conv_h = nn.Conv2d(hidden, channels, 1, **factory)
        self.conv_w = nn.Conv2d(hidden, channels, 1, **factory)

    def gate(self, x: Tensor) -> Tensor:
        """The product of both gates, [N, C, H, W]."""
        dtype = compute_dtype(x.dtype)
        means = [x.mean(3, dtype=dtype), x.mean(2, dtype=dtype)]  # [N, C, H], [N, C, W]
        both = torch.cat(means, dim=2)[..., None]  # [N, C, H + W, 1]
        f = call(self.norm, call(self.conv, both))
        f = f * torch.clamp(f + 3.0, 0.0, 6.0) / 6.0
        f_h, f_w = f.split([x.shape[2], x.shape[3]], dim=2)
        a_h = torch.sigmoid(call(self.conv_h, f_h))  # [N, C, H, 1]
        a_w = torch.sigmoid(call(self.conv_w, f_w)).transpose(2, 3)  # [N, C, 1, W]
        return a_h * a_w
