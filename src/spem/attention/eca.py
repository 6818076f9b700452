"""ECA: efficient channel attention."""

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from spem.attention.base import ChannelAttention, register_attention
from spem.attention.options import Device, Dtype, number, odd_int, positive
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
        int(|log2(C) + b| / gamma). Parameters: k.

    Shape:
        x: [N, C, ...], one to three spatial axes.

    Args:
        kernel: k, odd; None computes it from the channels (16..64 -> 3, 128..1024 -> 5, 2048 -> 7).
        gamma: Divisor > 0 in the rule for k.
        b: Offset in the rule for k.
        pool: How a plane becomes a number.

    Paper: eqs. (9), (12).

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
        size = _adaptive_kernel(channels, gamma, b) if kernel is None else kernel
        odd_int("ECA", "3, 5, 7 or None", kernel=size)
        self.conv = nn.Conv1d(1, 1, size, padding=size // 2, bias=False, device=device, dtype=dtype)
        self._draw_start()

    def _compiled(self) -> CompiledGate | None:
        layer, pool = self.conv, self.pool
        if not is_average(pool) or not _is_ours(layer) or has_hooks(layer):
            return None
        weight = layer.weight
        return CompiledGate("eca", (None, None, weight, None, None), width=weight.shape[2])

    @compiled_by(_compiled)
    def gate_from(self, stats: PlaneStats) -> Tensor:
        """s(conv_k(z)), [N, C]."""
        z = self.pool(stats)
        large = z.device.type == "cpu" and z.numel() >= _FEW
        fast = torch.compiler.is_compiling() or large
        with _Products() if fast and not is_exporting() else nullcontext():
            return torch.sigmoid(call(self.conv, z[:, None, :])[:, 0, :])


def _is_ours(layer: nn.Module | None) -> bool:
    """Whether it is the layer that was built; somebody may have put another one in its place."""
    if type(layer) is not nn.Conv1d or layer.bias is not None:
        return False
    taps = layer.weight.shape[2]
    same = layer.padding_mode == "zeros" and layer.padding == (taps // 2,)
    return same and layer.stride == layer.dilation == (1,) and layer.weight.shape[:2] == (1, 1)


class _Products(TorchFunctionMode):
    """Computes a layer's convolution along the channels as k shifted products, where it can.

    PyTorch's convolution of one channel is slow on a CPU, backward above all: 2.3 ms for [128, 256]
    and 5 taps, where shifted products take 0.5. Compiled, they fuse with the rest of the gate.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is F.conv1d and not kwargs and len(args) == 7:
            z, weight, bias, stride, padding, dilation, _ = args
            taps = weight.shape[2]
            along = bias is None and stride == dilation == (1,) and padding == (taps // 2,)
            if along and weight.shape[:2] == (1, 1) and taps <= _TAPS:
                return _products(z, cast(weight, z).flatten())
        return func(*args, **(kwargs or {}))


def _products(z: Tensor, weight: Tensor) -> Tensor:
    taps, channels = weight.shape[0], z.shape[2]
    padded = F.pad(z, (taps // 2, taps // 2))
    out = padded[:, :, :channels] * weight[0]
    for tap in range(1, taps):
        out = torch.addcmul(out, padded[:, :, tap : tap + channels], weight[tap])
    return out


def _adaptive_kernel(channels: int, gamma: float, b: float) -> int:
    positive("ECA", gamma=gamma)
    number("ECA", b=b)
    t = int(abs(math.log2(channels) + b) / gamma)
    return t if t % 2 else t + 1
