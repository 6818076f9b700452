"""FcaNet: frequency channel attention."""

import math

import torch
from torch import Tensor, nn

from spem.attention.base import ChannelAttention, Needs, register_attention
from spem.attention.options import Device, Dtype, Size, divides, hidden_units, is_int, map_size
from spem.attention.precision import call
from spem.attention.spa import averaging
from spem.ops.stats import compute_dtype

GRID = 7
TOP = (
    (0, 0), (0, 1), (6, 0), (0, 5), (0, 2), (1, 0), (1, 2), (4, 0),
    (5, 0), (1, 6), (3, 0), (0, 4), (0, 6), (0, 3), (3, 5), (2, 2)
)  # fmt: skip
"""The best frequencies (vertical, horizontal) on a 7 x 7 grid, best first: the official "top"."""


@register_attention(
    "fca",
    paper="FcaNet: Frequency Channel Attention Networks (2021), https://arxiv.org/abs/2012.11879",
    needs=Needs(divides="frequencies", size=True),
)
class FCA(ChannelAttention):
    """Frequency channel attention: groups of channels pooled by cosines instead of by averages.

    Formula:
        The channels form F groups of neighbours; group i is pooled by sum_ab D_i(a, b) x(a, b), D_i
        = B_u(a) B_v(b), B_u(t) = cos(pi u (t + 1/2) / T) / sqrt(T), times sqrt(2) if u > 0, over
        maps of H x W = size. (u, v) is the i-th best pair on a 7 x 7 grid, times (H // 7, W // 7).
        y = x * s(W2 relu(W1 z)), hidden width h = C // reduction. Parameters: 2 C h. Shape: [N, C,
        H, W]; a map of another size than ``size`` is first averaged to it (adaptively).

    Args:
        size: H = W, or (H, W), that the filters are made for; at least 7, and must be given.
        frequencies: F, 1 to 16, must divide C.
        reduction: r, the hidden width is C // r >= 1.

    Differences: none in value; (0, 0) is sqrt(H W) times the average, as there. The filters are
    computed from F pairs of integers, where the official code saves C H W numbers. A size below 7,
    where the official code makes every filter the average, is refused.
    """

    def __init__(
        self,
        channels: int,
        *,
        size: Size | None = None,
        frequencies: int = 16,
        reduction: int = 16,
        device: Device = None,
        dtype: Dtype = None,
    ) -> None:
        super().__init__(channels)
        self.size = map_size("FCA", size)
        if min(self.size) < GRID:
            raise ValueError(
                f"FCA: size={size!r} is smaller than the {GRID} x {GRID} grid of its frequencies; "
                f"every filter would be the average. Use {GRID} or more."
            )
        if not is_int(frequencies) or not 1 <= frequencies <= len(TOP):
            raise ValueError(f"FCA: frequencies={frequencies!r} is not an integer from 1 to 16.")
        divides("FCA", channels, frequencies=frequencies)
        hidden = hidden_units("FCA", channels, reduction)
        self.frequencies = frequencies
        self.fc1 = nn.Linear(channels, hidden, bias=False, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, channels, bias=False, device=device, dtype=dtype)

    def gate(self, x: Tensor) -> Tensor:
        """s(W2 relu(W1 z)), [N, C, 1, 1]."""
        x = x.to(compute_dtype(x.dtype))
        rows, columns = self._cosines(x, 0), self._cosines(x, 1)
        filters = rows[:, None, :, None] * columns[:, None, None, :]  # [F, 1, H, W]
        grouped = x.unflatten(1, (self.frequencies, -1))  # [N, F, C/F, H, W]
        z = (grouped * filters).sum((3, 4)).flatten(1)
        return torch.sigmoid(call(self.fc2, torch.relu(call(self.fc1, z))))[..., None, None]

    def _cosines(self, x: Tensor, axis: int) -> Tensor:
        """B_u of a map's axis, [F, extent]; of another extent with the averaging to ``size``."""
        side, extent, device = self.size[axis], x.shape[2 + axis], x.device
        t, i = torch.arange(side, device=device), torch.arange(self.frequencies, device=device)
        # One number holds all u as its digits: no buffer that a copy to another device could leave
        # without values, and no transfer in every forward pass.
        digits = sum(pair[axis] * 8**k for k, pair in enumerate(TOP))
        u = (torch.full_like(i, digits) // 8**i % 8)[:, None] * (side // GRID)
        # The phase in units of pi / (2 T), as an exact integer within one period.
        phase = (u * (2 * t + 1)) % (4 * side)
        basis = torch.cos(phase.to(x.dtype) * (math.pi / (2 * side))) / math.sqrt(side)
        basis = torch.where(u > 0, basis * math.sqrt(2.0), basis)
        if extent == side:
            return basis
        return basis @ averaging(side, extent, device=device, dtype=x.dtype)
