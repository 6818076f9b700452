"""SGE: spatial group-wise enhance."""

import torch
from torch import Tensor, nn

from spem.attention.base import ChannelAttention, Needs, register_attention
from spem.attention.options import Device, Dtype, Factory, divides
from spem.attention.pooling import PoolSpec
from spem.attention.precision import cast


@register_attention(
    "sge",
    paper="Spatial Group-wise Enhance (2019), https://arxiv.org/abs/1905.09646",
    needs=Needs(pixels=2, divides="groups"),
)
class SGE(ChannelAttention):
    """Spatial group-wise enhance: positions that resemble their group's mean are enhanced.

    Formula:
        Per group: q = sum over its channels of x * z, z the pooled channels (global average by
        default), one H x W map; t = (q - mean(q)) / (std(q) + 1e-5) over H, W with the unbiased
        deviation; y = x * s(w t + b). w = 0 and b = 1 at the start: the gate is s(1) = 0.7310586.
        Parameters: 2 groups. Shape: [N, C, H, W], H W >= 2. The paper's eqs. (1)-(5).

    Args:
        groups: G, must divide C. 64 is the official value; with C = 64 each group is one channel.
        pool: How a plane becomes a number.

    Differences: computed in float32 for half-precision maps, where the official code overflows. On
    a plane of equal q the deviation's gradient is taken as 0.
    """

    start_gate = 0.7310585786300049

    def __init__(
        self,
        channels: int,
        *,
        groups: int = 64,
        pool: PoolSpec = "avg",
        device: Device = None,
        dtype: Dtype = None,
    ) -> None:
        super().__init__(channels, pool=pool, device=device, dtype=dtype)
        factory = Factory(device=device, dtype=dtype)
        divides("SGE", channels, groups=groups)
        self.groups = groups
        self.w = nn.Parameter(torch.empty(groups, **factory))
        self.b = nn.Parameter(torch.empty(groups, **factory))
        self._draw_start({"w": 0.0, "b": 1.0})

    def gate(self, x: Tensor) -> Tensor:
        """s(w t + b), [N, C, H, W]: one map a group, the same for all its channels."""
        z = self.pool(self.stats_of(x))  # [N, C]
        grouped = x.flatten(2).to(z.dtype).unflatten(1, (self.groups, -1))  # [N, G, C/G, HW]
        q = (grouped * z.unflatten(1, (self.groups, -1))[..., None]).sum(2)  # [N, G, HW]
        centred = q - q.mean(2, keepdim=True)
        # Multiplied before the division: the product stays small where the deviation is.
        w, b = cast(self.w, z)[:, None], cast(self.b, z)[:, None]
        # torch's std warns on an empty batch, where there is nothing to normalise.
        std = q.std(2, keepdim=True) if q.numel() else q.sum(2, keepdim=True)
        v = torch.sigmoid(w * centred / (std + 1e-5) + b)
        return v.unflatten(2, x.shape[2:]).repeat_interleave(self.channels // self.groups, dim=1)
