"""ECA: efficient channel attention."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spem.attention.base import ChannelAttention, register_attention
from spem.attention.pooling import PoolSpec
from spem.attention.precision import at_hand, cast, conv
from spem.ops import PlaneStats
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
        channels: C.
        kernel: k, odd; None computes it from the channels (16..64 -> 3, 128..1024 -> 5, 2048 -> 7).
        gamma: Divisor in the rule for k.
        b: Offset in the rule for k.
        pool: How a plane becomes a number.
        device: Where the parameters live.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: ``kernel`` is even or not positive, or ``gamma`` is not positive.

    Paper: ECA-Net (2020), https://arxiv.org/abs/1910.03151, eqs. (9), (12).

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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channels, pool=pool, device=device, dtype=dtype)
        size = _adaptive_kernel(channels, gamma, b) if kernel is None else kernel
        if isinstance(size, bool) or not isinstance(size, int) or size < 1 or size % 2 == 0:
            raise ValueError(
                f"ECA: kernel={kernel!r} is not an odd positive integer. Use 3, 5, 7 or None."
            )
        self.conv = nn.Conv1d(1, 1, size, padding=size // 2, bias=False, device=device, dtype=dtype)
        self._draw_start()

    def gate_from(self, stats: PlaneStats) -> Tensor:
        """s(conv_k(z)), [N, C]."""
        z = self.pool(stats)
        return torch.sigmoid(_along_channels(self.conv, z))


def _along_channels(layer: nn.Conv1d, z: Tensor) -> Tensor:
    """The filter along the channels, [N, C] -> [N, C], as a convolution or as k products.

    PyTorch's convolution of one channel is slow on a CPU, backward above all: 2.3 ms for [128, 256]
    and 5 taps, where shifted products take 0.5. Compiled, they fuse with the rest of the gate.
    """
    if not _by_products(layer, z):
        return conv(layer, z[:, None, :])[:, 0, :]
    taps, channels = layer.weight.shape[2], z.shape[1]
    padded = F.pad(z, (taps // 2, taps // 2))
    values = at_hand(layer.weight)
    if values is not None:
        numbers = values.flatten().tolist()
        out = padded[:, :channels] * numbers[0]
        for tap in range(1, taps):
            out = torch.add(out, padded[:, tap : tap + channels], alpha=numbers[tap])
        return out
    weight = cast(layer.weight, z).flatten()
    out = padded[:, :channels] * weight[0]
    for tap in range(1, taps):
        out = torch.addcmul(out, padded[:, tap : tap + channels], weight[tap])
    return out


def _by_products(layer: nn.Conv1d, z: Tensor) -> bool:
    taps = layer.weight.shape[2]
    # Somebody may have put another layer in its place.
    ours = type(layer).forward is nn.Conv1d.forward and layer.bias is None
    ours = ours and layer.padding_mode == "zeros" and layer.padding == (taps // 2,)
    ours = ours and layer.stride == layer.dilation == (1,) and layer.weight.shape[:2] == (1, 1)
    if not ours or taps > _TAPS or is_exporting() or has_hooks(layer):
        return False
    return torch.compiler.is_compiling() or (z.device.type == "cpu" and z.numel() >= _FEW)


def _adaptive_kernel(channels: int, gamma: float, b: float) -> int:
    if not _finite(gamma) or gamma <= 0:
        raise ValueError(f"ECA: gamma={gamma!r} is not a positive number.")
    if not _finite(b):
        raise ValueError(f"ECA: b={b!r} is not a finite number.")
    t = int(abs(math.log2(channels) + b) / gamma)
    return t if t % 2 else t + 1


def _finite(value: float) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value)
