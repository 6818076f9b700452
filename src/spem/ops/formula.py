"""The four passes in plain torch operations: their definition, and what a compiler should see.

Eager they are many small operations; compiled they are fused into about as few reads and writes of
the map as hand-written kernels need. B images, C channels, K positions of a plane, in row-major
order in any memory layout. Sums, statistics and coefficients are in the compute dtype (float32, or
float64 for float64 maps), maps are read and written in their own.
"""

import math

import torch
from torch import Tensor

from spem.ops.algebra import RawStats
from spem.ops.stats import compute_dtype


def plane_stats(z: Tensor, moments: bool, extrema: bool) -> RawStats:
    """Pass F1: mean, biased variance, extrema and their first positions of every plane.

    Reads N bytes of the map once. Statistics that are not asked for have shape [0]. The moments are
    taken of z - z_0 (z_0 the plane's first value, 0 where that is not finite), which keeps them
    exact where the mean is large against the deviation.
    """
    wide = compute_dtype(z.dtype)
    planes = z.flatten(2).to(wide)
    none = planes.new_empty(0)
    nowhere = torch.empty(0, dtype=torch.int32, device=z.device)
    mean = var = high = low = first = none
    at_high = at_low = nowhere
    if moments:
        origin = planes[:, :, :1]
        shifted = planes - torch.where(origin.isfinite(), origin, 0.0)
        mean_shifted = shifted.mean(2)
        var = (shifted - mean_shifted[:, :, None]).square().mean(2)
        mean = mean_shifted + torch.where(origin.isfinite(), origin, 0.0)[:, :, 0]
    if extrema:
        first = planes[:, :, 0].contiguous()
        high, at_high = planes.max(2)
        low, at_low = planes.min(2)
        at_high, at_low = at_high.to(torch.int32), at_low.to(torch.int32)
    return RawStats(mean, var, high, low, first, at_high, at_low)


def affine_tail(z: Tensor, r: Tensor, mu: Tensor, v: Tensor, a: Tensor, beta: Tensor) -> Tensor:
    """Pass F2: y = relu(al (z - mu) + be + r), al = v a, be = v beta; a NaN stays a NaN.

    Shape:
        z, r, y: [B, C, ...]; v: [B, C]; mu, a, beta: [C].
    """
    wide, al, be = v.dtype, v * a, v * beta
    t = _plane(al, z) * (z.to(wide) - _channel(mu, z)) + _plane(be, z) + r.to(wide)
    return torch.where(t < 0, 0.0, t).to(z.dtype)


def affine_tail_backward(
    g: Tensor, y: Tensor, z: Tensor, mu: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Pass B1: d = g where y > 0 (or NaN), else 0; A = sum_k d; Bc = sum_k d (z - mu)."""
    wide = mu.dtype
    d = torch.where(y <= 0, 0.0, g)
    planes = d.flatten(2).to(wide)
    centred = z.flatten(2).to(wide) - mu[:, None]
    return d, planes.sum(2), (planes * centred).sum(2)


def stats_backward(
    d: Tensor,
    z: Tensor,
    mu: Tensor,
    p: Tensor,
    q: Tensor | None,
    t: Tensor | None,
    i: Tensor | None,
    j: Tensor | None,
    s_i: Tensor | None,
    s_j: Tensor | None,
) -> Tensor:
    """Pass B2: dz = p d + q + t (z - mu) + [k=i] s_i + [k=j] s_j.

    Without q and t the map z is not read; i = j adds both spikes.
    """
    wide = p.dtype
    dz = _plane(p, d) * d.to(wide)
    if q is not None and t is not None:
        dz = dz + _plane(q, d) + _plane(t, d) * (z.to(wide) - _channel(mu, z))
    if i is not None and j is not None and s_i is not None and s_j is not None:
        # A comparison with every position, not a scatter: it fuses with the rest.
        k = torch.arange(math.prod(d.shape[2:]), device=d.device, dtype=i.dtype).view(d.shape[2:])
        dz = dz + torch.where(k == _plane(i, d), _plane(s_i, d), 0.0)
        dz = dz + torch.where(k == _plane(j, d), _plane(s_j, d), 0.0)
    return dz.to(d.dtype)


def _plane(value: Tensor, like: Tensor) -> Tensor:
    """[B, C] as [B, C, 1, ...]."""
    return value.reshape(*value.shape, *[1] * (like.dim() - 2))


def _channel(value: Tensor, like: Tensor) -> Tensor:
    """[C] as [C, 1, ...]."""
    return value.reshape(-1, *[1] * (like.dim() - 2))
