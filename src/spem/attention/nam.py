"""NAM: normalisation-based attention, its channel part."""

import torch
from torch import Tensor, nn

from spem.attention.base import ChannelAttention, Needs, register_attention
from spem.attention.options import Device, Dtype
from spem.attention.precision import call, cast
from spem.ops.stats import compute_dtype


@register_attention(
    "nam",
    paper="NAM: Normalization-based Attention Module (2021), https://arxiv.org/abs/2111.12419",
    needs=Needs(values=2, batch_statistics=True, stops_gradients=("norm.weight",)),
)
class NAM(ChannelAttention):
    """Normalisation-based attention: the scale of a batch norm says how much a channel counts.

    Formula:
        b = BN(x), its scale gamma; w = |gamma| / sum |gamma|, a constant for the gradient; y = x *
        s(w b). BN 1/0 at the start, so w = 1/C. Parameters: 2C. Shape: [N, C, H, W]; N H W >= 2 in
        training.

    Differences: only the channel part has official code, and only it is here. As there, no gradient
    flows through w (`Needs.stops_gradients`). The official L1 term on gamma is the training loop's
    matter.
    """

    def __init__(self, channels: int, *, device: Device = None, dtype: Dtype = None) -> None:
        super().__init__(channels)
        self.norm = nn.BatchNorm2d(channels, device=device, dtype=dtype)

    def gate(self, x: Tensor) -> Tensor:
        """s(w b), [N, C, H, W]."""
        normed = call(self.norm, x.to(compute_dtype(x.dtype)))
        size = cast(self.norm.weight, normed).detach().abs()
        return torch.sigmoid((size / size.sum())[:, None, None] * normed)
