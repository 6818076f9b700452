"""The passes and the scalar stages on a CPU, compiled by numba; the package's only way to numba.

Every function here but `normal_stats`, two of them in one, does what the one of the same name does
in ``spem.ops.formula``. It checks shapes, allocates the outputs, writes addresses and sizes into a
table and has the kernel run on it. A kernel is compiled when first used, for one dtype, and kept on
disk where numba can write.
"""

from typing import Any

import torch
from torch import Tensor

from spem.ops.cpu import channels as by_channel
from spem.ops.cpu import planes as by_plane
from spem.ops.cpu import scalars
from spem.ops.cpu.launch import SUPPORTED, run
from spem.ops.cpu.table import (
    EXTREMA,
    HIGH,
    LOW,
    MEAN,
    MOMENTS,
    NORMALISED,
    POSITIONS,
    SHARED,
    VAR,
    WITH_SPIKES,
    WITH_Z,
)
from spem.ops.cpu.vectors import BYTES
from spem.ops.formula import Coefficients, Incoming, NormalStats, RawStats
from spem.ops.library import agree
from spem.ops.stats import compute_dtype

_CHUNK = 128 << 10  # bytes of one map that a thread takes at a time
_ALONE = 64 << 10  # scalars up to which one thread is faster than several
_LANES = 16  # channels a chunk are a multiple of this
_ROWS = 8  # images a chunk of a scalar stage


def _pass(name: str, z: Tensor, flags: int, *args: Tensor | None) -> None:
    """Runs a pass over maps like z, in whole planes or, channels_last, in ranges of channels."""
    batch, channels = z.shape[:2]
    planes = batch * channels
    size = z.numel() // planes
    lines = 1
    plane_bytes = size * z.element_size()
    if z.is_contiguous():
        kernel = getattr(by_plane, name)
        step = max(1, _CHUNK // plane_bytes)
        chunks = -(-planes // step)
    elif z.movedim(1, -1).is_contiguous():
        kernel = getattr(by_channel, name)
        step = max(1, _CHUNK // plane_bytes // _LANES) * _LANES
        if step < channels and batch >= 4 * torch.get_num_threads():
            step = channels  # memory in its own order, where there are images enough to share
        step = min(step, channels)
        lines = 1 if step % (2 * _LANES) else 2
        chunks = batch * -(-channels // step)
    else:
        raise ValueError(
            f"a map must be contiguous or channels_last, not have strides {z.stride()}"
        )
    head = chunks, step, batch, channels, size, flags
    run(kernel, z.dtype, head, chunks, *args, lines=lines)


def _maps(first: Tensor, *others: Tensor) -> torch.dtype:
    """Checks that maps agree and returns the compute dtype."""
    if first.dtype not in SUPPORTED:
        raise TypeError(f"maps of {first.dtype} have no numba kernel")
    if first.dim() < 3 or not first.numel():
        raise ValueError(f"a map must have planes and no empty axis, not shape {list(first.shape)}")
    for t in (first, *others):
        _on_cpu(t)
    for other in others:
        if other.shape != first.shape or not agree(other, first) or other.dtype != first.dtype:
            raise ValueError(
                f"maps must agree: {_described(first)} is not {_described(other)}",
            )
    return compute_dtype(first.dtype)


def _on_cpu(t: Tensor) -> None:
    """Refuses what has no address here: kernels take addresses as they are."""
    if not t.is_cpu:
        raise ValueError(f"impl='numba' needs CPU tensors, got one on {t.device}")


def _described(t: Tensor) -> str:
    return f"{list(t.shape)} with strides {list(t.stride())} of {t.dtype}"


def _scalars(shape: tuple[int, ...], dtype: torch.dtype, t: Tensor) -> Tensor:
    """Plane or channel scalars as kernels read them: of this shape and dtype, and dense."""
    _on_cpu(t)
    if t.shape != shape:
        raise ValueError(f"scalars of shape {list(shape)} expected, not {list(t.shape)}")
    if t.dtype != dtype or not t.is_contiguous():
        t = t.to(dtype).contiguous()
    return t


def plane_stats(z: Tensor, moments: bool, extrema: bool) -> RawStats:
    """Pass F1: statistics of every plane; see ``formula.plane_stats``."""
    wide = _maps(z)
    shape = tuple(z.shape[:2])
    # The moments' memory is used in any case: channels_last gathers the sums in it.
    mean, var = z.new_empty(shape, dtype=wide), z.new_empty(shape, dtype=wide)
    some = shape if extrema else (0,)
    high, low, first = (z.new_empty(some, dtype=wide) for _ in range(3))
    at_high, at_low = (z.new_empty(some, dtype=torch.int32) for _ in range(2))
    flags = MOMENTS * moments | (EXTREMA | POSITIONS) * extrema
    _pass("plane_stats", z, flags, z, mean, var, high, low, first, at_high, at_low)
    if not moments:
        mean, var = z.new_empty(0, dtype=wide), z.new_empty(0, dtype=wide)
    return RawStats(mean, var, high, low, first, at_high, at_low)


def normal_stats(
    z: Tensor, a: Tensor, mu: Tensor, beta: Tensor, moments: bool, extrema: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pass F1 where no gradient is recorded: mean, var, max and min of x = a (z - mu) + beta.

    As ``plane_stats`` and ``formula.normalised`` in one pass, for constant mu and a, [C].
    """
    wide = _maps(z)
    shape = tuple(z.shape[:2])
    a, mu, beta = (_scalars(shape[1:], wide, t) for t in (a, mu, beta))
    none = mu.new_empty(0)
    mean = var = high = low = none
    if moments or not z.is_contiguous():  # channels_last gathers the sums in them
        mean, var = mu.new_empty(shape), mu.new_empty(shape)
    if extrema:
        high, low = mu.new_empty(shape), mu.new_empty(shape)
    flags = MOMENTS * moments | EXTREMA * extrema | NORMALISED
    absent = (None,) * 3
    _pass("plane_stats", z, flags, z, mean, var, high, low, *absent, a, mu, beta)
    return (mean, var, high, low) if moments else (none, none, high, low)


def affine_tail(z: Tensor, r: Tensor, mu: Tensor, v: Tensor, a: Tensor, beta: Tensor) -> Tensor:
    """Pass F2: y = relu(v (a (z - mu) + beta) + r); see ``formula.affine_tail``."""
    wide = _maps(z, r)
    shape = tuple(z.shape[:2])
    v = _scalars(shape, wide, v)
    mu, a, beta = (_scalars(shape[1:], wide, t) for t in (mu, a, beta))
    y = torch.empty_like(z)
    _pass("affine_tail", z, 0, z, r, mu, v, a, beta, y)
    return y


def affine_tail_backward(
    g: Tensor, y: Tensor, z: Tensor, mu: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Pass B1: d, its sums, and those of d (z - mu); see ``formula.affine_tail_backward``."""
    wide = _maps(z, g, y)
    shape = tuple(z.shape[:2])
    mu = _scalars(shape[1:], wide, mu)
    sums, moments = z.new_empty(shape, dtype=wide), z.new_empty(shape, dtype=wide)
    d = torch.empty_like(z)
    _pass("affine_tail_backward", z, 0, g, y, z, mu, d, sums, moments)
    return d, sums, moments


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
    """Pass B2: the gradient of z; see ``formula.stats_backward``."""
    wide = _maps(d, z)
    shape = tuple(d.shape[:2])
    p, mu = _scalars(shape, wide, p), _scalars(shape[1:], wide, mu)
    flags = 0
    if q is not None and t is not None:
        flags |= WITH_Z
        q, t = _scalars(shape, wide, q), _scalars(shape, wide, t)
    if i is not None and j is not None and s_i is not None and s_j is not None:
        flags |= WITH_SPIKES
        i, j = _scalars(shape, torch.int32, i), _scalars(shape, torch.int32, j)
        s_i, s_j = _scalars(shape, wide, s_i), _scalars(shape, wide, s_j)
    dz = torch.empty_like(d)
    _pass("stats_backward", d, flags, d, z, mu, p, q, t, i, j, s_i, s_j, dz)
    return dz


def _stage(kernel: Any, like: Tensor, flags: int, size: int, *args: Tensor | None) -> None:
    """Runs a scalar stage that goes image by image."""
    batch, channels = like.shape
    chunks = -(-batch // _ROWS)
    pieces = chunks if like.numel() > _ALONE else 1
    run(kernel, like.dtype, (chunks, _ROWS, batch, channels, size, flags), pieces, *args)


def _channel_stage(kernel: Any, like: Tensor, flags: int, *args: Tensor | None) -> None:
    """Runs a scalar stage that sums over the images."""
    batch, channels = like.shape
    chunks = -(-channels // (BYTES // like.element_size()))
    pieces = chunks if like.numel() > _ALONE else 1
    run(kernel, like.dtype, (chunks, 0, batch, channels, 0, flags), pieces, *args)


def channel_moments(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel; see ``formula.channel_moments``."""
    shape, wide = tuple(mean.shape), mean.dtype
    mean, var = _scalars(shape, wide, mean), _scalars(shape, wide, var)
    mu, out = mean.new_empty(shape[1]), mean.new_empty(shape[1])
    _channel_stage(scalars.channel_moments, mean, 0, mean, var, mu, out)
    return mu, out


def normalised(raw: RawStats, a: Tensor, mu: Tensor, beta: Tensor) -> NormalStats:
    """Statistics of x = a (z - mu) + beta; see ``formula.normalised``."""
    wide = mu.dtype
    flags = MOMENTS * (raw.mean.dim() == 2) | EXTREMA * (raw.high.dim() == 2)
    if not flags:
        nothing = [mu.new_empty(0) for _ in range(6)]
        return NormalStats(*nothing, *(raw.at_high.new_empty(0) for _ in range(2)))
    shape = tuple((raw.mean if flags & MOMENTS else raw.high).shape)
    a, mu, beta = (_scalars(shape[1:], wide, t) for t in (a, mu, beta))
    two, six = (shape if flags & kind else (0,) for kind in (MOMENTS, EXTREMA))
    ins = [_scalars(two, wide, t) for t in raw[:2]]
    ins += [_scalars(six, wide, t) for t in raw[2:5]]
    ins += [_scalars(six, torch.int32, t) for t in raw[5:]]
    outs = [mu.new_empty(two) for _ in range(2)] + [mu.new_empty(six) for _ in range(4)]
    outs += [mu.new_empty(six, dtype=torch.int32) for _ in range(2)]
    like = ins[0] if flags & MOMENTS else ins[2]
    _stage(scalars.normalised, like, flags, 0, a, mu, beta, *ins, *outs)
    return NormalStats(*outs)


def gate_gradient(total: Tensor, moment: Tensor, a: Tensor, beta: Tensor) -> Tensor:
    """dv = a moment + beta total; see ``formula.gate_gradient``."""
    shape, wide = tuple(total.shape), total.dtype
    total, moment = _scalars(shape, wide, total), _scalars(shape, wide, moment)
    a, beta = _scalars(shape[1:], wide, a), _scalars(shape[1:], wide, beta)
    out = torch.empty_like(total)
    _stage(scalars.gate_gradient, total, 0, 0, total, moment, a, beta, out)
    return out


def _incoming(into: Incoming, shape: tuple[int, ...], wide: torch.dtype) -> tuple[int, list[Any]]:
    """Which gradients there are, and the gradients as kernels read them."""
    flags = 0
    for kind, gradient in zip((MEAN, VAR, HIGH, LOW), into, strict=True):
        flags |= 0 if gradient is None else kind
    return flags, [None if t is None else _scalars(shape, wide, t) for t in into]


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
    """Sums of dx and of dx (z - mu) over a channel; see ``formula.channel_sums``."""
    shape, wide = tuple(total.shape), total.dtype
    v, total, moment = (_scalars(shape, wide, t) for t in (v, total, moment))
    a, mu = _scalars(shape[1:], wide, a), _scalars(shape[1:], wide, mu)
    flags, gradients = _incoming(into, shape, wide)
    read = [
        _scalars(shape, wide, t) if flags & kind else None
        for kind, t in zip(
            (MEAN, VAR, HIGH, LOW), (raw.mean, raw.var, normal.z_i, normal.z_j), strict=True
        )
    ]
    s0, s1 = torch.empty_like(mu), torch.empty_like(mu)
    args = (v, total, moment, *gradients, *read, a, mu, s0, s1)
    _channel_stage(scalars.channel_sums, total, flags, *args)
    return s0, s1


def coefficients(
    v: Tensor,
    into: Incoming,
    raw_mean: Tensor,
    a: Tensor,
    mu: Tensor,
    size: int,
    shared: tuple[Tensor, Tensor] | None,
) -> Coefficients:
    """The per-plane coefficients of dz; see ``formula.coefficients``."""
    shape, wide = tuple(v.shape), mu.dtype
    v = _scalars(shape, wide, v)
    a, mu = _scalars(shape[1:], wide, a), _scalars(shape[1:], wide, mu)
    flags, gradients = _incoming(into, shape, wide)
    mean = _scalars(shape, wide, raw_mean) if flags & VAR else None
    means = [None, None]
    if shared is not None:
        flags |= SHARED
        means = [_scalars(shape[1:], wide, t) for t in shared]
    p, q, t, s_i, s_j = torch.empty_like(v), None, None, None, None
    if flags & (MEAN | VAR | SHARED):
        q, t = torch.empty_like(v), torch.empty_like(v)
    if flags & (HIGH | LOW):
        s_i, s_j = torch.empty_like(v), torch.empty_like(v)
    args = (v, *gradients, mean, a, mu, *means, p, q, t, s_i, s_j)
    _stage(scalars.coefficients, v, flags, size, *args)
    return Coefficients(p, q, t, s_i, s_j)
