"""BAM: bottleneck attention module, between the stages of a network."""

from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from spem.attention.base import ChannelAttention, Needs, register_attention
from spem.attention.options import Device, Dtype, Factory, hidden_units, one_of, positive_int
from spem.attention.pooling import PoolSpec
from spem.attention.precision import call

Placement = Literal["between", "stage", "tail"]
Fusion = Literal["mul", "add"]


@register_attention(
    "bam",
    paper="BAM: Bottleneck Attention Module (2018), https://arxiv.org/abs/1807.06514",
    needs=Needs(batch=2, batch_statistics=True, place="between"),
)
class BAM(ChannelAttention):
    """Bottleneck attention: one plus the sigmoid of a channel map times a spatial map.

    Formula:
        y = x * (1 + s(Mc Ms)), or (1 + s(Mc + Ms)) with ``fusion="add"``. Mc = W2 relu(BN(W1 z +
        b1)) + b2, [N, C, 1, 1], z the pooled channels (global average by default), hidden width h =
        C // reduction. Ms, [N, 1, H, W]: a 1x1 convolution C -> h, two 3x3 convolutions h -> h of a
        ``dilation``, each with bias, BN and ReLU, and a 1x1 convolution h -> 1 with bias.
        Parameters: 3 C h + C + 18 h^2 + 13 h + 1. Shape: [N, C, H, W], N >= 2 in training.

    Args:
        placement: ``"between"`` stages (after all but the last, the official place), after every
            ``"stage"``, or at the ``"tail"`` of every block.
        fusion: How the two maps meet, ``"mul"`` or ``"add"``.
        reduction: r, the hidden width is C // r >= 1.
        dilation: Of the 3x3 convolutions.
        pool: How a plane becomes a number in Mc.

    Differences: the paper adds the two maps, the official code multiplies them; ``"mul"`` is the
    default, and norms are where the code has them. Any map may be non-square, which fails there.
    """

    def __init__(
        self,
        channels: int,
        *,
        placement: Placement = "between",
        fusion: Fusion = "mul",
        reduction: int = 16,
        dilation: int = 4,
        pool: PoolSpec = "avg",
        device: Device = None,
        dtype: Dtype = None,
    ) -> None:
        super().__init__(channels, pool=pool, device=device, dtype=dtype)
        factory = Factory(device=device, dtype=dtype)
        one_of("BAM", get_args(Placement), placement=placement)
        one_of("BAM", get_args(Fusion), fusion=fusion)
        positive_int("BAM", dilation=dilation)
        h = hidden_units("BAM", channels, reduction)
        self.fusion = fusion
        self.needs = replace(self.needs, place=placement)
        self.fc1 = nn.Linear(channels, h, **factory)
        self.norm = nn.BatchNorm1d(h, **factory)
        self.fc2 = nn.Linear(h, channels, **factory)
        wide: Any = {"padding": dilation, "dilation": dilation, **factory}
        self.reduce = nn.Conv2d(channels, h, 1, **factory)
        self.reduce_norm = nn.BatchNorm2d(h, **factory)
        self.context1 = nn.Conv2d(h, h, 3, **wide)
        self.context1_norm = nn.BatchNorm2d(h, **factory)
        self.context2 = nn.Conv2d(h, h, 3, **wide)
        self.context2_norm = nn.BatchNorm2d(h, **factory)
        self.spatial = nn.Conv2d(h, 1, 1, **factory)

    def gate(self, x: Tensor) -> Tensor:
        """1 + s(Mc Ms), [N, C, H, W]."""
        z = self.pool(self.stats_of(x))
        v = x.to(z.dtype)
        z = torch.relu(call(self.norm, call(self.fc1, z)))
        channel = call(self.fc2, z)[..., None, None]
        v = torch.relu(call(self.reduce_norm, call(self.reduce, v)))
        v = torch.relu(call(self.context1_norm, call(self.context1, v)))
        v = torch.relu(call(self.context2_norm, call(self.context2, v)))
        spatial = call(self.spatial, v)
        return 1.0 + torch.sigmoid(channel * spatial if self.fusion == "mul" else channel + spatial)
