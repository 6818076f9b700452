"""The scalar stages between the passes: what is left of a tail once only [B, C] and [C] remain.

Symbols: z the norm's input, mu and rstd the channel's mean and inverse deviation, a = gamma rstd,
beta the norm's shift, v the gate, i and j the first positions of the maximum and minimum of
x = a (z - mu) + beta. All tensors are in the compute dtype (float32, or float64 for float64 maps).
"""

from typing import NamedTuple

import torch
from torch import Tensor


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


class Incoming(NamedTuple):
    """Gradients that reach the statistics of x through the gate; None where it reads none."""

    mean: Tensor | None
    var: Tensor | None
    high: Tensor | None
    low: Tensor | None


class Coefficients(NamedTuple):
    """dz = p d + q + t (z - mu) + [k=i] s_i + [k=j] s_j, all [B, C].

    q and t are both None where the map z is not needed, s_i and s_j where no extremum is read.
    """

    p: Tensor
    q: Tensor | None
    t: Tensor | None
    s_i: Tensor | None
    s_j: Tensor | None


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
    empty = mu.new_empty(0)
    nowhere = torch.empty(0, dtype=torch.int32, device=mu.device)
    mean = var = high = low = z_i = z_j = empty
    i = j = nowhere
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


def gate_gradient(total: Tensor, moment: Tensor, a: Tensor, beta: Tensor) -> Tensor:
    """dv = sum_k d x = a Bc + beta A, with A = ``total`` = sum_k d, Bc = ``moment``; [B, C]."""
    return a * moment + beta * total


def channel_sums(
    v: Tensor,
    total: Tensor,
    moment: Tensor,
    into: Incoming,
    raw: RawStats,
    normal: NormalStats,
    a: Tensor,
    mu: Tensor,
) -> tuple[Tensor, Tensor]:
    """S0 = sum of dx over a channel, S1 = sum of dx (z - mu), from plane scalars; [C] each.

    Formula:
        S0 = sum_b( v A + dmean + dhigh + dlow )
        S1 = sum_b( v Bc + dmean (mean_z - mu) + 2 a dvar var_z
                    + dhigh (z_i - mu) + dlow (z_j - mu) )
    """
    s0, s1 = v * total, v * moment
    if into.mean is not None:
        s0, s1 = s0 + into.mean, s1 + into.mean * (raw.mean - mu)
    if into.var is not None:
        s1 = s1 + 2 * a * into.var * raw.var
    if into.high is not None:
        s0, s1 = s0 + into.high, s1 + into.high * (normal.z_i - mu)
    if into.low is not None:
        s0, s1 = s0 + into.low, s1 + into.low * (normal.z_j - mu)
    return s0.sum(0), s1.sum(0)


def coefficients(
    v: Tensor,
    into: Incoming,
    raw_mean: Tensor,
    a: Tensor,
    mu: Tensor,
    size: int,
    shared: tuple[Tensor, Tensor] | None,
) -> Coefficients:
    """The per-plane coefficients of dz.

    Formula:
        p = a v
        q = a ( dmean/K - 2 a dvar (mean_z - mu)/K - S0/n )
        t = a ( 2 a dvar/K - rstd^2 S1/n )
        s_i = a dhigh,  s_j = a dlow

    Args:
        v: The gate, [B, C].
        into: Gradients of the statistics.
        raw_mean: The planes' means of z; read with ``into.var`` only.
        a: gamma rstd, [C].
        mu: [C].
        size: K.
        shared: S0/n and rstd^2 S1/n, [C] each, or None where mu and rstd are constants.
    """
    q = t = None
    if into.mean is not None:
        q = into.mean / size
    if into.var is not None:
        t = (2 / size) * a * into.var
        step = t * (raw_mean - mu)
        q = -step if q is None else q - step
    if shared is not None:
        q = -shared[0] if q is None else q - shared[0]
        t = -shared[1] if t is None else t - shared[1]
    elif q is not None and t is None:
        t = torch.zeros_like(v)
    if q is not None and t is not None:
        q, t = (a * q).expand_as(v), (a * t).expand_as(v)
    spikes = [None, None]
    if into.high is not None or into.low is not None:
        spikes = [torch.zeros_like(v) if g is None else a * g for g in (into.high, into.low)]
    return Coefficients(a * v, q, t, spikes[0], spikes[1])
