"""SRM: style-based recalibration."""

import torch
from torch import Tensor, nn

from spem.attention.base import ChannelAttention, Needs, register_attention
from spem.attention.options import Device, Dtype, Factory
from spem.attention.pooling import PoolSpec
from spem.attention.precision import call, cast
from spem.ops import PlaneStats


@register_attention(
    "srm",
    paper="SRM: A Style-based Recalibration Module for CNNs (2019), https://arxiv.org/abs/1903.10829",
    needs=Needs(
        statistics=("var",),
        pixels=2,
        batch=2,
        batch_statistics=True,
        no_decay=("a", "d", "norm.weight", "norm.bias"),
    ),
)
class SRM(ChannelAttention):
    """Style-based recalibration: weighted mean and deviation, normalised over the batch.

    Formula:
        y = x * s(BN(a z + d std)), z the pooled channels (global average by default), std =
        sqrt(var + 1e-5) with the unbiased variance of the plane, BN over the batch. a = d = 0 and
        BN 1/0 at the start: the gate is 0.5. Parameters: 4C. Shape: [N, C, ...], one to three
        spatial axes, at least two positions; N >= 2 in training. The paper's eqs. (1)-(4).

    Args:
        pool: What is used in place of the mean.

    Differences: none; its authors train all of it without weight decay (`Needs.no_decay`).
    """

    start_gate = 0.5

    def __init__(
        self, channels: int, *, pool: PoolSpec = "avg", device: Device = None, dtype: Dtype = None
    ) -> None:
        super().__init__(channels, pool=pool, device=device, dtype=dtype)
        factory = Factory(device=device, dtype=dtype)
        self.a = nn.Parameter(torch.empty(channels, **factory))
        self.d = nn.Parameter(torch.empty(channels, **factory))
        self.norm = nn.BatchNorm1d(channels, **factory)
        self._draw_start({"a": 0.0, "d": 0.0})

    def gate_from(self, stats: PlaneStats) -> Tensor:
        """s(BN(a z + d std)), [N, C]."""
        assert stats.var is not None
        std = torch.sqrt(stats.var * (stats.size / (stats.size - 1)) + 1e-5)
        style = cast(self.a, std) * self.pool(stats) + cast(self.d, std) * std
        return torch.sigmoid(call(self.norm, style))
