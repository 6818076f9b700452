"""ECA: efficient channel attention."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spem.attention.base import ChannelAttention, register_attention
from spem.attention.options import Device, Dtype, Factory, number, odd_int, positive
from spem.attention.pooling import PoolSpec, is_average
from spem.attention.precision import call, cast
from spem.ops import PlaneStats
from spem.ops.inference import CompiledGate, compiled_by
from spem.ops.library import has_hooks, is_exporting

_FEW = 1 << 12
"""Values of a descriptor below which a call counts more than what it does."""
_TAPS = 9
"""Taps above which the convolution is the faster one."""


@register_attention(
    "eca",
    paper="ECA-Net: Efficient Channel Attention for Deep CNNs (2020), https://arxiv.org/abs/1910.03151",
)
class ECA(ChannelAttention):
    """Efficient channel attention: a short convolution along the channel axis.

    Formula:
        y = x * s(conv_k(z)), z the pooled channels (global average by default), conv_k one filter
        of k taps along the channels, zero padding, no bias. k = t if t is odd else t + 1, t =
        int(|log2(C) + b| / gamma). Parameters: k. Shape: [N, C, ...], one to three spatial axes.
        The paper's eqs. (9), (12).

    Args:
        kernel: k, odd; None computes it from the channels (16..64 -> 3, 128..1024 -> 5, 2048 -> 7).
        gamma: Divisor > 0 in the rule for k.
        b: Offset in the rule for k.
        pool: How a plane becomes a number.

    Differences: the official code never computes k (it is 3 everywhere); this is the paper's rule.
    C = 128 lies halfway between 3 and 5 and gets 5, as the rule written in code gives.
    """

    def __init__(
        self,
        channels: int,
        *,
        kernel: int | None = None,
        gamma: float = 2,
        b: float = 1,
        pool: PoolSpec = "avg",
        device: Device = None,
        dtype: Dtype = None,
    ) -> None:
        super().__init__(channels, pool=pool, device=device, dtype=dtype)
        if kernel is None:
            positive("ECA", gamma=gamma)
            number("ECA", b=b)
            t = int(abs(math.log2(channels) + b) / gamma)
            kernel = t if t % 2 else t + 1
        odd_int("ECA", kernel=kernel)
        factory = Factory(device=device, dtype=dtype)
        self.conv = nn.Conv1d(1, 1, kernel, padding=kernel // 2, bias=False, **factory)

    def _compiled(self) -> CompiledGate | None:
        if not is_average(self.pool) or not self._has_own_layer():
            return None
        weight = self.conv.weight
        return CompiledGate("eca", (None, None, weight, None, None), width=weight.shape[2])

    @compiled_by(_compiled)
    def gate_from(self, stats: PlaneStats) -> Tensor:
        """s(conv_k(z)), [N, C]."""
        z = self.pool(stats)
        # A traced size is not asked for: the answer would bind the graph to it.
        fast = not is_exporting() and (
            torch.compiler.is_compiling() or (z.device.type == "cpu" and z.numel() >= _FEW)
        )
        if fast and self._has_own_layer():
            weight = cast(self.conv.weight, z).flatten()
            if len(weight) <= _TAPS:
                return torch.sigmoid(_products(z, weight))
        return torch.sigmoid(call(self.conv, z[:, None, :])[:, 0, :])

    def _has_own_layer(self) -> bool:
        """Whether the layer is the one that was built, and nobody watches it."""
        layer = self.conv
        if type(layer) is not nn.Conv1d or layer.bias is not None or has_hooks(layer):
            return False
        plain = layer.padding_mode == "zeros" and layer.stride == layer.dilation == (1,)
        single = layer.weight.shape[:2] == (1, 1)
        return plain and single and layer.padding == (layer.weight.shape[2] // 2,)


def _products(z: Tensor, weight: Tensor) -> Tensor:
    """The convolution along the channels, [N, C], as k shifted products.

    PyTorch's convolution of one channel is slow on a CPU, backward above all: 2.3 ms for [128, 256]
    and 5 taps, where shifted products take 0.5. Compiled, they fuse with the rest of the gate.
    """
    taps, channels = len(weight), z.shape[1]
    padded = F.pad(z, (taps // 2, taps // 2))
    out = padded[:, :channels] * weight[0]
    for tap in range(1, taps):
        out = torch.addcmul(out, padded[:, tap : tap + channels], weight[tap])
    return out
