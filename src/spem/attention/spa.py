"""SPA: spatial pyramid attention."""

import torch
from torch import Tensor, nn

from spem.attention.base import ChannelAttention, register_attention
from spem.attention.options import Device, Dtype, Factory, hidden_units
from spem.attention.precision import call
from spem.ops.stats import compute_dtype

GRIDS = (1, 2, 4)


@register_attention(
    "spa",
    paper="SPANet: Spatial Pyramid Attention Network for Enhanced Image Recognition (2020), https://github.com/13952522076/SPANet",
)
class SPA(ChannelAttention):
    """Spatial pyramid attention: the channels' gates from averages over 1, 4 and 16 regions.

    Formula:
        z = the averages of x over a grid of 1 x 1, 2 x 2 and 4 x 4 regions (adaptive), 21 C
        numbers; y = x * s(W2 relu(W1 z)), hidden width h = C // reduction, no biases. Parameters:
        22 C h. Shape: [N, C, H, W].

    Args:
        reduction: r, the hidden width is C // r >= 1.

    Differences: z comes from the map that is gated; the official network takes it from the block's
    input, through a convolution where the width changes. An infinite value makes all gates of its
    image NaN.
    """

    def __init__(
        self, channels: int, *, reduction: int = 16, device: Device = None, dtype: Dtype = None
    ) -> None:
        super().__init__(channels)
        factory = Factory(device=device, dtype=dtype)
        hidden = hidden_units("SPA", channels, reduction)
        inputs = channels * sum(side * side for side in GRIDS)
        self.fc1 = nn.Linear(inputs, hidden, bias=False, **factory)
        self.fc2 = nn.Linear(hidden, channels, bias=False, **factory)

    def gate(self, x: Tensor) -> Tensor:
        """s(W2 relu(W1 z)), [N, C, 1, 1]."""
        dtype = compute_dtype(x.dtype)
        grids: list[Tensor] = []
        for side in GRIDS:
            rows, columns = (
                averaging(side, extent, device=x.device, dtype=dtype) for extent in x.shape[2:]
            )
            # Not torch.kron, whose graph is one of this map size alone.
            grids.append((rows[:, None, :, None] * columns[:, None]).flatten(2).flatten(0, 1))
        regions = torch.cat(grids)  # [21, H W]
        means = x.flatten(2).to(dtype) @ regions.T  # [N, C, 21]
        # All regions of a channel side by side, grid after grid: the order of the official layer.
        counts = [side * side for side in GRIDS]
        z = torch.cat([part.flatten(1) for part in means.split(counts, dim=2)], dim=1)
        return torch.sigmoid(call(self.fc2, torch.relu(call(self.fc1, z))))[..., None, None]


def averaging(regions: int, extent: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The matrix [regions, extent] of the adaptive average pooling of one axis.

    Region i covers the positions floor(i E / R) to ceil((i + 1) E / R) - 1. As a matrix its
    gradient is deterministic on every device, where torch's adaptive pooling has none such.
    """
    i = torch.arange(regions, device=device)[:, None]
    j = torch.arange(extent, device=device)
    # j >= floor(i E / R) and j < ceil((i + 1) E / R), in integers
    inside = ((j + 1) * regions > i * extent) & (j * regions < (i + 1) * extent)
    weight = inside.to(dtype)
    return weight / weight.sum(1, keepdim=True)
