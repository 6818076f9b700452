"""SK: selective kernels, in place of a 3x3 convolution."""

from typing import Any

import torch
from torch import Tensor, nn

from spem.attention.base import ChannelAttention, Needs, register_attention
from spem.attention.options import Device, Dtype, Factory, divides, positive_int
from spem.attention.pooling import PoolSpec
from spem.attention.precision import call, without_autocast
from spem.seeding import kaiming_normal_fan_out


@register_attention(
    "sk",
    paper="Selective Kernel Networks (2019), https://arxiv.org/abs/1903.06586",
    needs=Needs(batch=2, batch_statistics=True, divides="groups", place="middle", replaces="conv"),
)
class SK(ChannelAttention):
    """Selective kernels: two convolutions of different reach, mixed by a softmax per channel.

    Formula:
        U1 = relu(BN(conv3x3(x))), U2 = relu(BN(conv3x3 of dilation 2(x))), both grouped and without
        bias; z = relu(BN(W p(U1 + U2))), p the pooling (global average by default), of width d =
        max(C // reduction, least); a_k = softmax over k of (W_k z); y = a_1 U1 + a_2 U2.
        Parameters: 3 C d + 2 d, and 18 C^2 / groups + 4 C of the branches. Shape: [N, C, H, W], N
        >= 2 in training; output: [N, C, ceil(H / stride), ceil(W / stride)].

    Args:
        channels: C, of input and output.
        stride: Of both convolutions; a network gives that of the convolution it replaces (1
            without).
        groups: Of both convolutions, must divide C; None is min(32, C).
        reduction: r of the width d.
        least: The smallest d.
        pool: How a plane of U1 + U2 becomes a number.

    Differences: the paper's networks have 32 groups; narrower layers here have a group a channel.
    Two branches, which then also hold the norm and the ReLU after the convolution they replace.
    `gate` is a_1.
    """

    random_init = dict.fromkeys(("near.weight", "far.weight"), kaiming_normal_fan_out)

    def __init__(
        self,
        channels: int,
        *,
        stride: int | None = None,
        groups: int | None = None,
        reduction: int = 16,
        least: int = 32,
        pool: PoolSpec = "avg",
        device: Device = None,
        dtype: Dtype = None,
    ) -> None:
        super().__init__(channels, pool=pool, device=device, dtype=dtype)
        factory = Factory(device=device, dtype=dtype)
        step = 1 if stride is None else stride
        groups = min(32, channels) if groups is None else groups
        positive_int("SK", stride=step, reduction=reduction, least=least)
        divides("SK", channels, groups=groups)
        width = max(channels // reduction, least)
        branch: Any = {"stride": step, "groups": groups, "bias": False, **factory}
        self.near = nn.Conv2d(channels, channels, 3, padding=1, **branch)
        self.near_norm = nn.BatchNorm2d(channels, **factory)
        self.far = nn.Conv2d(channels, channels, 3, padding=2, dilation=2, **branch)
        self.far_norm = nn.BatchNorm2d(channels, **factory)
        self.fc = nn.Linear(channels, width, bias=False, **factory)
        self.norm = nn.BatchNorm1d(width, **factory)
        self.fc_near = nn.Linear(width, channels, bias=False, **factory)
        self.fc_far = nn.Linear(width, channels, bias=False, **factory)
        self._draw_start()

    def gate(self, x: Tensor) -> Tensor:
        """a_1, the share of the first branch, [N, C, 1, 1]."""
        near, far = self._branches(x)
        return self._share(near + far)

    def forward(self, x: Tensor) -> Tensor:
        """a_1 U1 + a_2 U2."""
        self._check(x)
        near, far = self._branches(x)
        share = self._share(near + far).to(far.dtype)
        return share * near + (1.0 - share) * far

    def _branches(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """U1 and U2, in the dtype in which any convolution of the network would have them."""
        near, far = self.near(x), self.far(x)
        if x.shape[0] == 0:  # no sample may move a running statistic
            return torch.relu(near), torch.relu(far)
        return torch.relu(self.near_norm(near)), torch.relu(self.far_norm(far))

    @without_autocast
    def _share(self, both: Tensor) -> Tensor:
        z = self.pool(self.stats_of(both))
        z = torch.relu(call(self.norm, call(self.fc, z)))
        scores = torch.stack([call(self.fc_near, z), call(self.fc_far, z)])
        return torch.softmax(scores, dim=0)[0, ..., None, None]
