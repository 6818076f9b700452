"""Map sizes: the option ``size``, and means over a grid of regions as a product of matrices."""

import torch
from torch import Tensor

Size = int | tuple[int, int]
"""H = W, or (H, W)."""


def sides(label: str, size: Size | None) -> tuple[int, int]:
    """(H, W) of the option ``size``.

    Raises:
        ValueError: There is none, or it is no positive integer and no pair of them.
    """
    if size is None:
        raise ValueError(
            f"{label}: needs the size of its maps. Give the option size, for example size=32, or "
            f"size=(32, 16), or create_attention(..., size=32)."
        )
    pair = size if isinstance(size, tuple) else (size, size)
    whole = all(isinstance(side, int) and not isinstance(side, bool) for side in pair)
    if len(pair) != 2 or not whole or min(pair) < 1:
        raise ValueError(
            f"{label}: size={size!r} is no positive integer and no pair (H, W) of them."
        )
    return pair


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
