"""The passes and the scalar stages on a CPU, compiled by numba; the package's only way to numba.

Every function here does what the one of the same name does
in ``spem.ops.formula``. It checks shapes, allocates the outputs, writes addresses and sizes into a
table and has the kernel run on it. A kernel is compiled when first used, for one dtype, and kept on
disk where numba can write.
"""

import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spem.ops.cpu import channels as by_channel
from spem.ops.cpu import planes as by_plane
from spem.ops.cpu import scalars
from spem.ops.cpu.inference import fused_tail as fused_tail
from spem.ops.cpu.inference import norm_stats as norm_stats
from spem.ops.cpu.launch import SUPPORTED, run
from spem.ops.cpu.table import (
    BIAS,
    BY_VALUE,
    COEFFICIENTS,
    EXTREMA,
    GATED,
    HIGH,
    LOW,
    MEAN,
    MOMENTS,
    POSITIONS,
    RECTIFIED,
    RUNNING,
    SHARED,
    SUMS,
    VAR,
    WEIGHT,
    WITH_SPIKES,
    WITH_Z,
)
from spem.ops.cpu.vectors import BYTES
from spem.ops.formula import (
    BatchStats,
    Coefficients,
    Incoming,
    Norm,
    NormalStats,
    RawStats,
    move_running,
)
from spem.ops.library import agree
from spem.ops.stats import compute_dtype

_CHUNK = 128 << 10  # bytes of one map that a thread takes at a time
_ALONE = 8 << 10  # scalars up to which one thread is faster than several
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
            f"a map must be contiguous or channels_last, not have strides {z.stride()}. "
            f"Call contiguous() first."
        )
    head = chunks, step, batch, channels, size, flags
    run(kernel, z.dtype, head, chunks, *args, lines=lines)


def _maps(first: Tensor, *others: Tensor) -> torch.dtype:
    """Checks that maps agree and returns the compute dtype."""
    if first.dtype not in SUPPORTED:
        names = ", ".join(sorted(str(d).removeprefix("torch.") for d in SUPPORTED))
        raise TypeError(f"maps of {first.dtype} have no numba kernel. Use {names}.")
    if first.dim() < 3 or not first.numel():
        raise ValueError(
            f"a map must have planes and no empty axis, not shape {list(first.shape)}. "
            f"Give [N, C, ...] with at least one value."
        )
    for t in (first, *others):
        _on_cpu(t)
    for other in others:
        if other.shape != first.shape or not agree(other, first) or other.dtype != first.dtype:
            raise ValueError(
                f"maps must agree: {_described(first)} is not {_described(other)}. "
                f"Convert one to the dtype and layout of the other."
            )
    return compute_dtype(first.dtype)


def _on_cpu(t: Tensor) -> None:
    """Refuses what has no address here: kernels take addresses as they are."""
    if not t.is_cpu:
        raise ValueError(f"impl='numba' needs CPU tensors, got one on {t.device}. Use impl=None.")


def _described(t: Tensor) -> str:
    return f"{list(t.shape)} with strides {list(t.stride())} of {t.dtype}"


def _scalars(shape: tuple[int, ...], dtype: torch.dtype, t: Tensor) -> Tensor:
    """Plane or channel scalars as kernels read them: of this shape and dtype, and dense."""
    _on_cpu(t)
    if t.shape != shape:
        raise ValueError(
            f"scalars of shape {list(shape)} expected, not {list(t.shape)}. Give one for each "
            f"{'channel' if len(shape) == 1 else 'plane'}."
        )
    if t.dtype != dtype or not t.is_contiguous():
        t = t.to(dtype).contiguous()
    return t


def plane_stats(z: Tensor, moments: bool, extrema: bool, positions: bool = True) -> RawStats:
    """Pass F1: statistics of every plane; see ``formula.plane_stats``.

    Positions cost much where a map is channels_last, and `stats_backward` can do without them.
    """
    wide = _maps(z)
    shape = tuple(z.shape[:2])
    # The moments' memory is used in any case: channels_last gathers the sums in it.
    mean, var = z.new_empty(shape, dtype=wide), z.new_empty(shape, dtype=wide)
    some = shape if extrema else (0,)
    high, low, first = (z.new_empty(some, dtype=wide) for _ in range(3))
    found = shape if extrema and positions else (0,)
    at_high, at_low = (z.new_empty(found, dtype=torch.int32) for _ in range(2))
    flags = MOMENTS * moments | (EXTREMA | POSITIONS * positions) * extrema
    _pass("plane_stats", z, flags, z, mean, var, high, low, first, at_high, at_low)
    if not moments:
        mean, var = z.new_empty(0, dtype=wide), z.new_empty(0, dtype=wide)
    return RawStats(mean, var, high, low, first, at_high, at_low)


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
    """Pass B2: the gradient of z; see ``formula.stats_backward``.

    Of a channels_last map i and j may be the extrema themselves instead of their positions: a spike
    then falls on the first value that equals it, and s_i and s_j are used up.
    """
    wide = _maps(d, z)
    shape = tuple(d.shape[:2])
    p, mu = _scalars(shape, wide, p), _scalars(shape[1:], wide, mu)
    flags = 0
    if q is not None and t is not None:
        flags |= WITH_Z
        q, t = _scalars(shape, wide, q), _scalars(shape, wide, t)
    if i is not None and j is not None and s_i is not None and s_j is not None:
        flags |= WITH_SPIKES
        kind = torch.int32
        if i.is_floating_point():
            flags |= BY_VALUE
            kind = wide
        i, j = _scalars(shape, kind, i), _scalars(shape, kind, j)
        s_i, s_j = _scalars(shape, wide, s_i), _scalars(shape, wide, s_j)
    dz = torch.empty_like(d)
    _pass("stats_backward", d, flags, d, z, mu, p, q, t, i, j, s_i, s_j, dz)
    return dz


def norm_relu(z: Tensor, mu: Tensor, a: Tensor, beta: Tensor) -> Tensor:
    """relu(a (z - mu) + beta), as pass F2 without gate and residual."""
    wide = _maps(z)
    mu, a, beta = (_scalars(z.shape[1:2], wide, t) for t in (mu, a, beta))
    y = torch.empty_like(z)
    _pass("affine_tail", z, RECTIFIED, z, None, mu, None, a, beta, y)
    return y


def norm_relu_backward(
    g: Tensor,
    z: Tensor,
    mu: Tensor,
    a: Tensor,
    beta: Tensor,
    rstd: Tensor,
    *,
    batch_stats: bool,
    of_norm: bool,
    of_map: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of z, gamma and beta, as passes B1 and B2; the mask follows from z."""
    wide = _maps(g, z)
    shape = tuple(z.shape[:2])
    mu, a, beta, rstd = (_scalars(shape[1:], wide, t) for t in (mu, a, beta, rstd))
    weight = bias = q = t = None
    flags = RECTIFIED
    if of_norm or batch_stats:
        sums, moments = mu.new_empty(shape), mu.new_empty(shape)
        _pass(
            *("affine_tail_backward", z, RECTIFIED, g, None, z, mu, None, sums, moments),
            *(a, beta),
        )
        bias, s1, weight, q, t = (torch.empty_like(mu) for _ in range(5))
        size = z.numel() // sums.numel()
        args = (None, sums, moments, *[None] * 8, a, mu, rstd, bias, s1, weight, None, q, t)
        _channel_stage(scalars.backward, sums, SUMS, size, *args, None, None)
    if batch_stats:
        flags |= WITH_Z
    dz = None
    if of_map:
        dz = torch.empty_like(z)
        _pass("stats_backward", z, flags, g, z, mu, a, q, t, *[None] * 4, dz, beta)
    return dz, weight, bias


def _stage(kernel: Any, like: Tensor, flags: int, size: int, *args: Tensor | None) -> None:
    """Runs a scalar stage that goes image by image."""
    batch, channels = like.shape
    chunks = -(-batch // _ROWS)
    pieces = chunks if like.numel() > _ALONE else 1
    run(kernel, like.dtype, (chunks, _ROWS, batch, channels, size, flags), pieces, *args)


def _channel_stage(
    kernel: Any, like: Tensor, flags: int, size: int, *args: Tensor | int | None
) -> None:
    """Runs a scalar stage that sums over the images."""
    batch, channels = like.shape
    chunks = -(-channels // (BYTES // like.element_size()))
    pieces = chunks if like.numel() > _ALONE else 1
    run(kernel, like.dtype, (chunks, 0, batch, channels, size, flags), pieces, *args)


def normalise_batch(raw: RawStats, norm: Norm, size: int, moments: bool) -> BatchStats:
    """The statistics of a batch and those of x; see ``formula.normalise_batch``.

    The running statistics move along, if the norm has some.
    """
    wide = raw.mean.dtype
    shape = tuple(raw.mean.shape)
    per_channel = shape[1:]
    flags = SHARED | MOMENTS * moments | _of_extrema(raw)
    affine: list[Tensor | None] = []
    for flag, t in ((WEIGHT, norm.weight), (BIAS, norm.bias)):
        flags |= 0 if t is None else flag
        affine.append(None if t is None else _scalars(per_channel, wide, t.detach()))
    running: list[Tensor | None] = [None, None]
    factor = 0.0
    own = norm.running is not None and all(
        t.dtype == wide and t.is_contiguous() and type(t) is Tensor and not t.is_inference()
        for t in norm.running[:2]
    )
    if norm.running is not None and own:
        flags |= RUNNING
        running[0], running[1], factor = norm.running
    mu = [raw.mean.new_empty(per_channel) for _ in range(5)]
    bits = struct.unpack("2q", struct.pack("2d", norm.eps, factor))
    outs = _normalised(raw, flags, affine, running, mu, bits, size)
    if own:
        torch.autograd.graph.increment_version([t for t in running if t is not None])
    elif norm.running is not None:
        move_running(norm.running, mu[0], mu[1], raw.mean.shape[0] * size)
    return BatchStats(mu[0], mu[1], mu[2], mu[3], mu[4], outs)


def normalised(raw: RawStats, a: Tensor, mu: Tensor, beta: Tensor) -> NormalStats:
    """Statistics of x = a (z - mu) + beta; see ``formula.normalised``."""
    flags = MOMENTS * (raw.mean.dim() == 2) | _of_extrema(raw)
    a, mu, beta = (_scalars(mu.shape, mu.dtype, t) for t in (a, mu, beta))
    return _normalised(raw, flags, [None] * 2, [None] * 2, (mu, None, None, a, beta), (0, 0), 0)


def _of_extrema(raw: RawStats) -> int:
    return EXTREMA * (raw.high.dim() == 2) | POSITIONS * (raw.at_high.dim() == 2)


def _normalised(
    raw: RawStats,
    flags: int,
    affine: Sequence[Tensor | None],
    running: Sequence[Tensor | None],
    norm: Sequence[Tensor | None],
    numbers: Sequence[int],
    size: int,
) -> NormalStats:
    nothing = raw.mean.new_empty(0)
    if not flags:
        return NormalStats(*[nothing] * 6, *[raw.at_high.new_empty(0)] * 2)
    like = raw.mean if flags & (MOMENTS | SHARED) else raw.high
    kinds = (MOMENTS, EXTREMA, POSITIONS)
    two, four, last = (like.shape if flags & kind else (0,) for kind in kinds)
    outs = [like.new_empty(two) for _ in range(2)] + [like.new_empty(four) for _ in range(4)]
    outs += [like.new_empty(last, dtype=torch.int32) for _ in range(2)]
    args = (*affine, *running, *norm, *raw, *outs, *numbers)
    _channel_stage(scalars.forward, like, flags, size, *args)
    return NormalStats(*outs)


def gate_gradient(total: Tensor, moment: Tensor, a: Tensor, beta: Tensor) -> Tensor:
    """dv = a moment + beta total; see ``formula.gate_gradient``."""
    shape, wide = tuple(total.shape), total.dtype
    total, moment = _scalars(shape, wide, total), _scalars(shape, wide, moment)
    a, beta = _scalars(shape[1:], wide, a), _scalars(shape[1:], wide, beta)
    out = torch.empty_like(total)
    _stage(scalars.gate_gradient, total, 0, 0, total, moment, a, beta, out)
    return out


def gradients(
    v: Tensor,
    total: Tensor,
    moment: Tensor,
    into: Incoming,
    of_z: Sequence[Tensor],
    a: Tensor,
    mu: Tensor,
    rstd: Tensor,
    size: int,
    *,
    batch_stats: bool,
    of_norm: bool,
    of_map: bool,
) -> tuple[Tensor | None, Tensor | None, Coefficients | None]:
    """Gradients of gamma and beta, and the coefficients of dz; see ``formula.gradients``."""
    shape, wide = tuple(total.shape), total.dtype
    v, total, moment = (_scalars(shape, wide, t) for t in (v, total, moment))
    a, mu, rstd = (_scalars(shape[1:], wide, t) for t in (a, mu, rstd))
    flags = GATED | SHARED * batch_stats | SUMS * (batch_stats or of_norm) | COEFFICIENTS * of_map
    for kind, gradient in zip((MEAN, VAR, HIGH, LOW), into, strict=True):
        flags |= 0 if gradient is None else kind
    incoming = [None if t is None else _scalars(shape, wide, t) for t in into]
    read = [
        t if flags & kind else None for kind, t in zip((MEAN, VAR, HIGH, LOW), of_z, strict=True)
    ]
    if flags & VAR:
        read[0] = of_z[0]
    s0, s1, weight = (torch.empty_like(mu) for _ in range(3))
    p = q = t = s_i = s_j = None
    if of_map:
        p = torch.empty_like(v)
        if flags & (MEAN | VAR | SHARED):
            q, t = torch.empty_like(v), torch.empty_like(v)
        if flags & (HIGH | LOW):
            s_i, s_j = torch.empty_like(v), torch.empty_like(v)
    outs = (s0, s1, weight, p, q, t, s_i, s_j)
    args = (v, total, moment, *incoming, *read, a, mu, rstd, *outs)
    _channel_stage(scalars.backward, total, flags, size, *args)
    found = None if p is None else Coefficients(p, q, t, s_i, s_j)
    return (weight, s0, found) if flags & SUMS else (None, None, found)
