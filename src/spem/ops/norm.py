"""A batch norm as tensors, and the affine map it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from spem.ops.stats import compute_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Norm(NamedTuple):
    """A batch norm as tensors.

    Attributes:
        weight: gamma [C], or None for ones.
        bias: beta [C], or None for zeros.
        mean: Constant mean [C], or None to take the batch's.
        var: Constant variance [C], or None to take the batch's.
        eps: Added to the variance.
        group: Processes that share the batch's statistics, or None.
    """

    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    eps: float
    group: ProcessGroup | None = None


def constants(
    norm: Norm | None, z: Tensor, *, copy: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """mu, a, beta and rstd [C] of a norm with constant statistics; copies if they are kept."""
    wide = compute_dtype(z.dtype)
    if norm is None:
        mu, rstd = z.new_zeros(z.shape[1], dtype=wide), z.new_ones(z.shape[1], dtype=wide)
        return mu, rstd, torch.zeros_like(mu), rstd
    assert norm.mean is not None
    assert norm.var is not None
    rstd = torch.rsqrt(norm.var.to(wide) + norm.eps)
    return norm.mean.to(wide, copy=copy), *affine(norm, rstd, copy=copy), rstd


def affine(norm: Norm, rstd: Tensor, *, copy: bool = True) -> tuple[Tensor, Tensor]:
    """a = gamma rstd and beta, [C]."""
    weight, bias = norm.weight, norm.bias
    a = rstd if weight is None else weight.detach().to(rstd.dtype) * rstd
    beta = torch.zeros_like(rstd) if bias is None else bias.detach().to(rstd.dtype, copy=copy)
    return a, beta
