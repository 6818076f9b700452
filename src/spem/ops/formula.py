"""A tail in plain torch operations: the four passes over the maps, and the scalars between them.

This is their definition, and what a compiler should see: eager they are many small operations,
compiled they are fused into about as few reads and writes of the map as hand-written kernels need.

B images, C channels, K positions of a plane, in row-major order in any memory layout. z is the
norm's input, mu and rstd the channel's mean and inverse deviation, a = gamma rstd, beta the norm's
shift, v the gate, i and j the first positions of the maximum and minimum of x = a (z - mu) + beta.
Sums, statistics and coefficients are in the compute dtype (float32, or float64 for float64 maps),
maps are read and written in their own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from spem.ops.stats import compute_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Norm(NamedTuple):
    """A batch norm as tensors: gamma, beta, constant mean and variance [C]; None for the batch's.

    ``group`` are the processes that share the batch's statistics; ``running`` is the mean and
    variance that the batch's are to move, and by what factor, where a kernel does so.
    """

    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    eps: float
    group: ProcessGroup | None = None
    running: tuple[Tensor, Tensor, float] | None = None


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


class RawStats(NamedTuple):
    """What the first pass gathers of a map z, [B, C] each; not gathered: shape [0].

    ``var`` is biased, ``first`` is z at position 0, ``at_high`` and ``at_low`` (int32) are the
    first positions, in row-major order, of ``high`` and ``low``.
    """

    mean: Tensor
    var: Tensor
    high: Tensor
    low: Tensor
    first: Tensor
    at_high: Tensor
    at_low: Tensor


class NormalStats(NamedTuple):
    """Statistics of x = a (z - mu) + beta, and where its extrema lie in z; [B, C] or [0]."""

    mean: Tensor
    var: Tensor
    high: Tensor
    low: Tensor
    z_i: Tensor
    z_j: Tensor
    i: Tensor
    j: Tensor


class BatchStats(NamedTuple):
    """What a norm in training makes of a batch: [C] each, and the statistics of x."""

    mu: Tensor
    var: Tensor
    rstd: Tensor
    a: Tensor
    beta: Tensor
    normal: NormalStats


class Incoming(NamedTuple):
    """Gradients that reach the statistics of x through the gate; None where it reads none."""

    mean: Tensor | None
    var: Tensor | None
    high: Tensor | None
    low: Tensor | None


class Scalars(NamedTuple):
    """What a backward pass knows before it reads the map again.

    ``v``, ``total`` = A = sum_k d and ``moment`` = Bc = sum_k d (z - mu) are [B, C]; ``of_z`` is
    the planes' mean and variance of z, z_i and z_j, each read where its gradient is given; ``a``,
    ``mu`` and ``rstd`` are [C]; ``size`` is K.
    """

    v: Tensor
    total: Tensor
    moment: Tensor
    into: Incoming
    of_z: Sequence[Tensor]
    a: Tensor
    mu: Tensor
    rstd: Tensor
    size: int


class Coefficients(NamedTuple):
    """dz = p d + q + t (z - mu) + [k=i] s_i + [k=j] s_j, all [B, C].

    q and t are both None where the map z is not needed, s_i and s_j where no extremum is read.
    """

    p: Tensor
    q: Tensor | None
    t: Tensor | None
    s_i: Tensor | None
    s_j: Tensor | None


def empty_stats(
    z: Tensor, moments: bool, extrema: bool, *parts: int, positions: bool = True
) -> RawStats:
    """Memory for what the first pass gathers of z, [*parts, B, C] each; [0] of all else."""
    wide, some, none = compute_dtype(z.dtype), (*parts, *z.shape[:2]), (0,)
    sizes = [some if moments else none] * 2 + [some if extrema else none] * 3
    at = some if extrema and positions else none
    places = (z.new_empty(at, dtype=torch.int32) for _ in range(2))
    return RawStats(*(z.new_empty(size, dtype=wide) for size in sizes), *places)


def plane_stats(z: Tensor, moments: bool, extrema: bool) -> RawStats:
    """Pass F1: mean, biased variance, extrema and their first positions of every plane.

    Reads N bytes of the map once. Statistics that are not asked for have shape [0]. The moments are
    taken of z - z_0 (z_0 the plane's first value, 0 where that is not finite), which keeps them
    exact where the mean is large against the deviation.
    """
    wide = compute_dtype(z.dtype)
    planes = z.flatten(2).to(wide)
    mean, var, high, low, first, at_high, at_low = empty_stats(z, False, False)
    if moments:
        origin = planes[:, :, :1]
        shifted = planes - torch.where(origin.isfinite(), origin, 0.0)
        mean_shifted = shifted.mean(2)
        var = (shifted - mean_shifted[:, :, None]).square().mean(2)
        var = var.clamp(max=torch.finfo(wide).max)  # a norm's factor of 0 times infinity is a NaN
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
    t = spatial(al, z) * (z.to(wide) - spatial(mu, z)) + spatial(be, z) + r.to(wide)
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
    dz = spatial(p, d) * d.to(wide)
    if q is not None and t is not None:
        dz = dz + spatial(q, d) + spatial(t, d) * (z.to(wide) - spatial(mu, z))
    if i is not None and j is not None and s_i is not None and s_j is not None:
        # A comparison with every position, not a scatter: it fuses with the rest.
        k = torch.arange(math.prod(d.shape[2:]), device=d.device, dtype=i.dtype).view(d.shape[2:])
        dz = dz + torch.where(k == spatial(i, d), spatial(s_i, d), 0.0)
        dz = dz + torch.where(k == spatial(j, d), spatial(s_j, d), 0.0)
    return dz.to(d.dtype)


def spatial(value: Tensor, like: Tensor) -> Tensor:
    """[B, C] or [C] with an axis of length 1 for each spatial one of a map."""
    return value.reshape(*value.shape, *[1] * (like.dim() - 2))


def channel_moments(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel from those of its planes, [B, C] -> [C], [C].

    Formula:
        mu = mean_b mean_b,  var = mean_b (var_b + (mean_b - mu)^2)  (planes of one size).
    """
    mu = mean.mean(0)
    return mu, (var + (mean - mu).square()).mean(0)


def normalised(raw: RawStats, a: Tensor, mu: Tensor, beta: Tensor) -> NormalStats:
    """Statistics of x = a (z - mu) + beta from those of z, without forming x.

    Formula:
        mean = a (mean_z - mu) + beta,  var = a^2 var_z,  high = a (z_i - mu) + beta,
        low = a (z_j - mu) + beta; i the maximum's position for a > 0, the minimum's for a < 0, and
        0 for a = 0, where every position ties (but 0 times what is not finite is NaN); j the other
        way round.

    Shape:
        a, mu, beta: [C].
    """
    mean = var = high = low = z_i = z_j = mu.new_empty(0)
    i = j = raw.at_high
    if raw.mean.dim() == 2:
        mean, var = a * (raw.mean - mu) + beta, a.square() * raw.var
    if raw.high.dim() == 2:
        falling, flat = a < 0, a == 0
        first = raw.first + (0.0 * raw.high + 0.0 * raw.low)  # NaN if any value is not finite
        z_i = torch.where(flat, first, torch.where(falling, raw.low, raw.high))
        z_j = torch.where(flat, first, torch.where(falling, raw.high, raw.low))
        zero = torch.zeros_like(raw.at_high)
        i = torch.where(flat, zero, torch.where(falling, raw.at_low, raw.at_high))
        j = torch.where(flat, zero, torch.where(falling, raw.at_high, raw.at_low))
        high, low = a * (z_i - mu) + beta, a * (z_j - mu) + beta
    return NormalStats(mean, var, high, low, z_i, z_j, i, j)


@torch.no_grad()
def move_running(
    running: tuple[Tensor, Tensor, float], mu: Tensor, var: Tensor, values: Tensor | int
) -> None:
    """Moves running statistics as the norm's own forward does; ``values``: those of a channel."""
    mean, unbiased, factor = running
    mean.lerp_(mu.to(mean.dtype), factor)
    unbiased.lerp_((var * (values / (values - 1))).to(unbiased.dtype), factor)


def normalise_batch(raw: RawStats, norm: Norm, size: int, moments: bool) -> BatchStats:
    """`channel_moments`, the norm's affine map, and `normalised`; means of x only if asked for.

    A plane has ``size`` positions. The kernel's also moves ``norm.running``.
    """
    mu, var = channel_moments(raw.mean, raw.var)
    rstd = torch.rsqrt(var + norm.eps)
    a, beta = affine(norm, rstd)
    return BatchStats(mu, var, rstd, a, beta, normalised(raw, a, mu, beta))


def gate_gradient(total: Tensor, moment: Tensor, a: Tensor, beta: Tensor) -> Tensor:
    """dv = sum_k d x = a Bc + beta A, with A = ``total`` = sum_k d, Bc = ``moment``; [B, C]."""
    return a * moment + beta * total


def channel_sums(s: Scalars) -> tuple[Tensor, Tensor]:
    """S0 = sum of dx over a channel, S1 = sum of dx (z - mu), from plane scalars; [C] each.

    Formula:
        S0 = sum_b( v A + dmean + dhigh + dlow )
        S1 = sum_b( v Bc + dmean (mean_z - mu) + 2 a dvar var_z
                    + dhigh (z_i - mu) + dlow (z_j - mu) )
    """
    mean, var, z_i, z_j = s.of_z
    s0, s1 = s.v * s.total, s.v * s.moment
    for gradient, place in ((s.into.mean, mean), (s.into.high, z_i), (s.into.low, z_j)):
        if gradient is not None:
            s0, s1 = s0 + gradient, s1 + gradient * (place - s.mu)
    if s.into.var is not None:
        s1 = s1 + 2 * s.a * s.into.var * var
    return s0.sum(0), s1.sum(0)


def coefficients(s: Scalars, shared: tuple[Tensor, Tensor] | None) -> Coefficients:
    """The per-plane coefficients of dz.

    Formula:
        p = a v
        q = a ( dmean/K - 2 a dvar (mean_z - mu)/K - S0/n )
        t = a ( 2 a dvar/K - rstd^2 S1/n )
        s_i = a dhigh,  s_j = a dlow

    ``shared`` is S0/n and rstd^2 S1/n, [C] each, or None where mu and rstd are constants.
    """
    v, into, a = s.v, s.into, s.a
    q = t = s_i = s_j = None
    if shared is not None or into.mean is not None or into.var is not None:
        zero = torch.zeros_like(v)
        q, t = (zero, zero) if shared is None else (-shared[0], -shared[1])
        if into.mean is not None:
            q = q + into.mean / s.size
        if into.var is not None:
            slope = (2 / s.size) * a * into.var
            q, t = q - slope * (s.of_z[0] - s.mu), t + slope
        q, t = (a * q).expand_as(v), (a * t).expand_as(v)
    if into.high is not None or into.low is not None:
        s_i, s_j = (torch.zeros_like(v) if g is None else a * g for g in (into.high, into.low))
    return Coefficients(a * v, q, t, s_i, s_j)


def gradients(
    *scalars: Any, batch_stats: bool, of_norm: bool, of_map: bool
) -> tuple[Tensor | None, Tensor | None, Coefficients | None]:
    """Gradients of gamma and beta, and the coefficients of dz, for a norm whose batch is all here.

    Takes the fields of `Scalars`, whether mu and rstd are the batch's, and what is asked for; what
    is not may be None.
    """
    s = Scalars(*scalars)
    shared = weight = bias = None
    if batch_stats or of_norm:
        bias, s1 = channel_sums(s)
        weight = s.rstd * s1
        n = max(s.v.shape[0] * s.size, 1)
        shared = (bias / n, s.rstd.square() * s1 / n) if batch_stats else None
    return weight, bias, coefficients(s, shared) if of_map else None
