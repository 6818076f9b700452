"""IEBN: instance-enhancement batch normalisation."""

from typing import Any

import torch
from torch import Tensor, nn

from spem.attention.base import ChannelAttention, Needs, register_attention
from spem.attention.options import Device, Dtype, Factory, fraction
from spem.attention.pooling import PoolSpec
from spem.attention.precision import batch_norm, cast
from spem.ops import PlaneStats
from spem.ops.stats import compute_dtype


@register_attention(
    "iebn",
    paper="Instance Enhancement Batch Normalization: An Adaptive Regulator of Batch Noise (2020), "
    "https://arxiv.org/abs/1908.04008",
    needs=Needs(values=2, batch_statistics=True, place="norm", replaces="norm"),
)
class IEBN(ChannelAttention):
    """Instance-enhancement batch norm: every image gates the weight of the norm from its input.

    Formula:
        y = xhat * gamma s(w z + b) + beta, xhat the batch norm of x without weight and bias, z the
        pooled channels of x (global average by default). gamma = 1, beta = 0, w = 0, b = -1 at the
        start: the gate is s(-1) = 0.2689414. Parameters: 4C, 2C more than the norm it replaces.
        Shape: [N, C, ...], one to three spatial axes; N H W >= 2 in training.

    Args:
        pool: How a plane becomes a number.
        momentum: Weight of a batch in the running statistics, in (0, 1].
        eps: Added to the variance, in (0, 1].

    Differences: none. Weight, bias and running statistics have the names they have in torch's
    norms, so a plain network's weights load; processes do not share statistics.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    start_gate = 0.2689414213699951

    def __init__(
        self,
        channels: int,
        *,
        pool: PoolSpec = "avg",
        momentum: float = 0.1,
        eps: float = 1e-5,
        device: Device = None,
        dtype: Dtype = None,
    ) -> None:
        super().__init__(channels, pool=pool, device=device, dtype=dtype)
        factory = Factory(device=device, dtype=dtype)
        fraction("IEBN", momentum=momentum, eps=eps)
        self.momentum, self.eps = float(momentum), float(eps)
        self.weight = nn.Parameter(torch.empty(channels, **factory))
        self.bias = nn.Parameter(torch.empty(channels, **factory))
        self.w = nn.Parameter(torch.empty(channels, **factory))
        self.b = nn.Parameter(torch.empty(channels, **factory))
        self.register_buffer("running_mean", torch.empty(channels, **factory))
        self.register_buffer("running_var", torch.empty(channels, **factory))
        batches = torch.empty((), dtype=torch.int64, device=device)
        self.register_buffer("num_batches_tracked", batches)
        start = {"weight": 1.0, "bias": 0.0, "w": 0.0, "b": -1.0}
        counted = {"running_mean": 0.0, "running_var": 1.0, "num_batches_tracked": 0.0}
        self._draw_start(start | counted)

    def gate_from(self, stats: PlaneStats) -> Tensor:
        """s(w z + b), [N, C]: what gamma is multiplied by."""
        z = self.pool(stats)
        return torch.sigmoid(cast(self.w, z) * z + cast(self.b, z))

    def forward(self, x: Tensor) -> Tensor:
        """xhat * gamma s(w z + b) + beta."""
        self._check(x)
        gate = self.gate(x)
        training = self.training and x.shape[0] > 0
        options: Any = {"training": training, "momentum": self.momentum, "eps": self.eps}
        wide = x.to(compute_dtype(x.dtype))
        standard = batch_norm(wide, self.running_mean, self.running_var, **options)
        if training:
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
        axes = (-1, *[1] * (x.dim() - 2))
        gamma, beta = (cast(p, gate).reshape(axes) for p in (self.weight, self.bias))
        return (standard * (gamma * gate) + beta).to(x.dtype)
