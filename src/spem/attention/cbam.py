"""CBAM: convolutional block attention."""

import torch
from torch import Tensor, nn

from spem.attention.base import ChannelAttention, Needs, register_attention
from spem.attention.options import Device, Dtype, Factory, hidden_units, odd_int
from spem.attention.pooling import PoolSpec
from spem.attention.precision import call
from spem.seeding import kaiming_normal_fan_out


@register_attention(
    "cbam",
    paper="CBAM: Convolutional Block Attention Module (2018), https://arxiv.org/abs/1807.06521",
    needs=Needs(values=2, batch_statistics=True),
)
class CBAM(ChannelAttention):
    """Convolutional block attention: a channel gate from two pools, then a spatial gate.

    Formula:
        channel: c = s(sum over pools of W2 relu(W1 pool(x) + b1) + b2), one shared network of
        hidden width C // reduction, b2 added once per pool; x' = x * c. spatial: p =
        s(BN(conv_k([max_C x'; mean_C x']))), one output channel, zero padding, no bias, BN momentum
        0.01. y = x' * p. Start: both biases 0, k x k kernel Kaiming normal (fan_out), BN weight and
        bias 0, so p = 0.5. Parameters: 2 C h + h + C + 2 k^2 + 2. Shape: [N, C, H, W]; N H W >= 2
        in training. The paper's eqs. (2), (3).

    Args:
        reduction: r, the hidden width is C // r >= 1.
        pools: The pools of the channel gate, at least one.
        kernel: k, odd, side of the spatial kernel.

    Differences: the spatial batch norm, and its start at zero, are the official code's alone.
    """

    random_init = {"spatial.weight": kaiming_normal_fan_out}  # noqa: RUF012  # typed in the base class

    def __init__(
        self,
        channels: int,
        *,
        reduction: int = 16,
        pools: tuple[PoolSpec, ...] = ("avg", "max"),
        kernel: int = 7,
        device: Device = None,
        dtype: Dtype = None,
    ) -> None:
        super().__init__(channels, device=device, dtype=dtype)
        factory = Factory(device=device, dtype=dtype)
        hidden = hidden_units("CBAM", channels, reduction)
        if not isinstance(pools, (tuple, list)) or not pools:
            raise ValueError(
                f"CBAM: pools={pools!r} is not a tuple of pools. Use for example ('avg', 'max')."
            )
        odd_int("CBAM", kernel=kernel)
        self.pools = nn.ModuleList(self._make_pool(pool, **factory) for pool in pools)
        self.fc1 = nn.Linear(channels, hidden, **factory)
        self.fc2 = nn.Linear(hidden, channels, **factory)
        self.spatial = nn.Conv2d(2, 1, kernel, padding=kernel // 2, bias=False, **factory)
        self.norm = nn.BatchNorm2d(1, momentum=0.01, **factory)
        self._draw_start(dict.fromkeys(("fc1.bias", "fc2.bias", "norm.weight", "norm.bias"), 0.0))

    def gate(self, x: Tensor) -> Tensor:
        """c p, [N, C, H, W]."""
        stats = self.stats_of(x)
        excited = [call(self.fc2, torch.relu(call(self.fc1, pool(stats)))) for pool in self.pools]
        channel = torch.sigmoid(torch.stack(excited).sum(0))[..., None, None]  # [N, C, 1, 1]
        refined = x.to(channel.dtype) * channel
        # Index-based, like the pools: the gradient goes to the first maximal channel.
        strongest = refined.max(1, keepdim=True).values
        described = torch.cat([strongest, refined.mean(1, keepdim=True)], dim=1)  # [N, 2, H, W]
        return channel * torch.sigmoid(call(self.norm, call(self.spatial, described)))
