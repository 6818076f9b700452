"""SE: squeeze-and-excitation."""

import torch
from torch import Tensor, nn

from spem.attention.base import ChannelAttention, register_attention
from spem.attention.options import Device, Dtype, Factory, flag, hidden_units
from spem.attention.pooling import PoolSpec, is_average
from spem.attention.precision import call
from spem.ops import PlaneStats
from spem.ops.inference import CompiledGate, compiled_by
from spem.ops.library import has_hooks


@register_attention(
    "se", paper="Squeeze-and-Excitation Networks (2018), https://arxiv.org/abs/1709.01507"
)
class SE(ChannelAttention):
    """Squeeze-and-excitation: a two-layer network takes the pooled channels to their gates.

    Formula:
        y = x * s(W2 relu(W1 z + b1) + b2), z the pooled channels (global average by default), s the
        logistic sigmoid, hidden width h = C // reduction. Parameters: 2 C h, and h + C with biases.
        Shape: [N, C, ...], one to three spatial axes. The paper's eqs. (2)-(4).

    Args:
        reduction: r, the hidden width is C // r >= 1.
        bias: Whether both layers have biases, as in the paper; several ports leave them out.
        pool: How a plane becomes a number; ``Mix(0.3)`` is the paper's Fig. 2.

    Differences: none; weights start as torch's Linear does (timm rounds h to a multiple of 8).
    """

    def __init__(
        self,
        channels: int,
        *,
        reduction: int = 16,
        bias: bool = True,
        pool: PoolSpec = "avg",
        device: Device = None,
        dtype: Dtype = None,
    ) -> None:
        super().__init__(channels, pool=pool, device=device, dtype=dtype)
        factory = Factory(device=device, dtype=dtype)
        hidden = hidden_units("SE", channels, reduction)
        flag("SE", bias=bias)
        self.fc1 = nn.Linear(channels, hidden, bias=bias, **factory)
        self.fc2 = nn.Linear(hidden, channels, bias=bias, **factory)

    def _compiled(self) -> CompiledGate | None:
        one, two, pool = self.fc1, self.fc2, self.pool
        ours = type(one) is nn.Linear and type(two) is nn.Linear and is_average(pool)
        if not ours or has_hooks(one) or has_hooks(two):
            return None
        weights = (one.weight, one.bias, two.weight, two.bias, None)
        return CompiledGate("se", weights, width=one.out_features)

    @compiled_by(_compiled)
    def gate_from(self, stats: PlaneStats) -> Tensor:
        """s(W2 relu(W1 z + b1) + b2), [N, C]."""
        z = self.pool(stats)
        return torch.sigmoid(call(self.fc2, torch.relu(call(self.fc1, z))))
