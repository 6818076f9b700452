"""FcaNet: frequency channel attention."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from spem.attention.base import ChannelAttention, Needs
from spem.attention.options import Device, Dtype, Size, divides, hidden_units, is_int, map_size
from spem.attention.precision import call
from spem.attention.spa import averaging
from spem.attention.spec import register_attention
from spem.ops.stats import compute_dtype

GRID = 7
TOP = (
    (0, 0), (0, 1), (6, 0), (0, 5), (0, 2), (1, 0), (1, 2), (4, 0),
    (5, 0), (1, 6), (3, 0), (0, 4), (0, 6), (0, 3), (3, 5), (2, 2),
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
        y = x * s(W2 relu(W1 z)), hidden width h = C // reduction. Parameters: 2 C h.

    Shape:
        x: [N, C, H, W]; a map of another size than ``size`` is first averaged to it (adaptively).

    Args:
        channels: C.
        size: H = W, or (H, W), that the filters are made for; at least 7.
        frequencies: F, 1 to 16, must divide C.
        reduction: r, the hidden width is C // r.

    Raises:
        ValueError: No ``size``, or one below 7; ``frequencies`` is not in 1 to 16 or does not
            divide ``channels``; ``reduction`` leaves no hidden unit.

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
        super().__init__(channels, device=device, dtype=dtype)
        factory: Any = {"device": device, "dtype": dtype}
        self.size = map_size("FCA", size)
        if min(self.size) < GRID:
            raise ValueError(
                f"FCA: size={size!r} is smaller than the {GRID} x {GRID} grid of its frequencies; "
                f"every filter would be the average. Use {GRID} or more."
            )
        if not is_int(frequencies) or not 1 <= frequencies <= len(TOP):
            raise ValueError(
                f"FCA: frequencies={frequencies!r} is no integer from 1 to {len(TOP)}."
            )
        divides("FCA", channels, frequencies=frequencies)
        hidden = hidden_units("FCA", channels, reduction)
        self.frequencies = frequencies
        self.fc1 = nn.Linear(channels, hidden, bias=False, **factory)
        self.fc2 = nn.Linear(hidden, channels, bias=False, **factory)
        self._draw_start()

    def gate(self, x: Tensor) -> Tensor:
        """s(W2 relu(W1 z)), [N, C, 1, 1]."""
        dtype = compute_dtype(x.dtype)
        rows, columns = (self._cosines(axis, x.shape[2 + axis], dtype, x.device) for axis in (0, 1))
        filters = rows[:, None, :, None] * columns[:, None, None, :]  # [F, 1, H, W]
        grouped = x.to(dtype).unflatten(1, (self.frequencies, -1))  # [N, F, C/F, H, W]
        z = (grouped * filters).sum((3, 4)).flatten(1)
        excited = call(self.fc2, torch.relu(call(self.fc1, z)))
        return torch.sigmoid(excited)[..., None, None]

    def _cosines(self, axis: int, extent: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """B_u of one axis, [F, extent]; for another extent with the averaging to ``size`` in it."""
        side = self.size[axis]
        t, i = torch.arange(side, device=device), torch.arange(self.frequencies, device=device)
        # One number holds all u as its digits: no buffer that a copy to another device could leave
        # without values, and no transfer in every forward pass.
        digits = sum(pair[axis] * 8**k for k, pair in enumerate(TOP))
        u = (torch.full_like(i, digits) // 8**i % 8) * (side // GRID)
        # The phase in units of pi / (2 T), as an exact integer within one period.
        phase = (u[:, None] * (2 * t + 1)) % (4 * side)
        basis = torch.cos(phase.to(dtype) * (math.pi / (2 * side))) / math.sqrt(side)
        basis = torch.where(u[:, None] > 0, basis * math.sqrt(2.0), basis)
        if extent == side:
            return basis
        return basis @ averaging(side, extent, device=device, dtype=dtype)

    def extra_repr(self) -> str:
        """Size and number of frequencies."""
        return f"size={self.size}, frequencies={self.frequencies}"
