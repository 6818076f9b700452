"""GSoP: global second-order pooling, its channel mode."""

import torch
from torch import Tensor, nn

from spem.attention.base import ChannelAttention, Needs, register_attention
from spem.attention.options import Device, Dtype, Factory, positive_int
from spem.attention.precision import call
from spem.ops.stats import compute_dtype

WIDE = 256
"""Channels up to which the reducing convolution has stride 2 (4 x the official 64 planes)."""


@register_attention(
    "gsop",
    paper="Global Second-order Pooling Convolutional Networks (2019), https://arxiv.org/abs/1811.12006",
    needs=Needs(values=2, batch_statistics=True),
)
class GSoP(ChannelAttention):
    """Global second-order pooling: channels gated by the covariances of a reduced map. Not light.

    Formula:
        t = relu(BN(W relu(x) + b)), a 1 x 1 convolution to D channels; S = 1/M sum_k (t_k - mean t)
        (t_k - mean t)^T over its M positions; each row of BN(S) through 4 linear maps of its own (D
        -> 1, biases), all 4 D to C (bias); y = x * s(.). Parameters, D = 128: 641 C + 66688. Shape:
        [N, C, H, W]; at least two values a channel, N M, of the reduced map in training.

    Args:
        dims: D.
        stride: Stride of the reducing convolution; None is the official rule, 2 up to 256 channels,
            1 above.

    Differences: the channel mode only, of which this is the official code.
    """

    def __init__(
        self,
        channels: int,
        *,
        dims: int = 128,
        stride: int | None = None,
        device: Device = None,
        dtype: Dtype = None,
    ) -> None:
        super().__init__(channels)
        factory = Factory(device=device, dtype=dtype)
        step = (2 if channels <= WIDE else 1) if stride is None else stride
        positive_int("GSoP", dims=dims, stride=step)
        self.reduce = nn.Conv2d(channels, dims, 1, stride=step, **factory)
        self.norm = nn.BatchNorm2d(dims, **factory)
        self.row_norm = nn.BatchNorm2d(dims, **factory)
        self.rows = nn.Conv2d(dims, 4 * dims, (dims, 1), groups=dims, **factory)
        self.excite = nn.Conv2d(4 * dims, channels, 1, **factory)

    def gate(self, x: Tensor) -> Tensor:
        """s of the excited covariances, [N, C, 1, 1]."""
        reduced = call(self.reduce, torch.relu(x.to(compute_dtype(x.dtype))))
        values = reduced.shape[0] * reduced.shape[2] * reduced.shape[3]
        if self.training and values == 1:
            raise ValueError(
                f"GSoP: training needs two values a channel of the reduced map, got one from "
                f"{list(x.shape)}. Use a larger batch, larger maps, or eval()."
            )
        t = torch.relu(call(self.norm, reduced)).flatten(2)  # [N, D, M]
        centred = t - t.mean(2, keepdim=True)
        covariance = centred @ centred.transpose(1, 2) / t.shape[2]  # [N, D, D]
        rows = call(self.rows, call(self.row_norm, covariance[..., None]))  # [N, 4 D, 1, 1]
        return torch.sigmoid(call(self.excite, rows))
