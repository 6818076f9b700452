"""The passes and the scalar stages on a CPU, compiled by numba; the package's only way to numba.

Every function does what the one of the same name does in ``spem.ops.formula``: it checks shapes,
allocates the outputs, writes addresses and sizes into a table and has the kernel run on it. A
kernel is compiled when first used, for one dtype, and kept on disk where numba can write. Whether
a map's device and dtype have kernels, `spem.ops.dispatch` has asked.
"""

import struct
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from spem.ops.cpu import channels as by_channel, language as kl, planes as by_plane, scalars
from spem.ops.cpu.inference import fused_tail as fused_tail
from spem.ops.cpu.launch import run
from spem.ops.formula import (
    BatchStats,
    Coefficients,
    Norm,
    NormalStats,
    RawStats,
    Scalars,
    constants,
    empty_stats,
    move_running,
)
from spem.ops.library import check_maps
from spem.ops.stats import compute_dtype

_CHUNK = 128 << 10  # bytes of one map that a thread takes at a time
_ALONE = 8 << 10  # scalars up to which one thread is faster than several
_LANES = 16  # channels a chunk are a multiple of this


def _pass(name: str, z: Tensor, flags: int, *args: Tensor | None) -> None:
    """Runs a pass over maps like z, in whole planes or, channels_last, in ranges of channels."""
    batch, channels = z.shape[:2]
    size = z.numel() // (batch * channels)
    plane_bytes, lines = size * z.element_size(), 2
    if z.is_contiguous():
        kernel = getattr(by_plane, name)
        step, extent, images = max(1, _CHUNK // plane_bytes), batch * channels, 1
    elif z.movedim(1, -1).is_contiguous():
        kernel = getattr(by_channel, name)
        step = max(1, _CHUNK // plane_bytes // _LANES) * _LANES
        if step >= channels or batch >= 4 * torch.get_num_threads():
            step = channels  # memory in its own order, where there are images enough to share
        lines = 1 if step % (2 * _LANES) else 2
        extent, images = channels, batch
    else:
        raise ValueError(
            f"a map must be contiguous or channels_last, not have strides {z.stride()}. "
            f"Call contiguous() first."
        )
    head = (images * -(-extent // step), step, extent, batch, channels, size, flags)
    run(kernel, z.dtype, head, *args, lines=lines)


def _scalars(shape: Sequence[int], dtype: torch.dtype, *given: Tensor) -> list[Tensor]:
    """Plane or channel scalars as kernels read them: of this shape and dtype, and dense."""
    found: list[Tensor] = []
    for t in given:
        if t.shape != shape:
            raise ValueError(f"scalars of shape {list(shape)} expected, not {list(t.shape)}.")
        dense = t.dtype == dtype and t.is_contiguous()  # asked first: two calls of torch less
        found.append(t if dense else t.to(dtype).contiguous())
    return found


def plane_stats(z: Tensor, moments: bool, extrema: bool, positions: bool = True) -> RawStats:
    """Pass F1: statistics of every plane; see ``formula.plane_stats``.

    Positions cost much where a map is channels_last, and `stats_backward` can do without them.
    """
    # The moments' memory is used in any case: channels_last gathers the sums in it.
    raw = empty_stats(z, True, extrema, positions=positions)
    flags = kl.MOMENTS * moments | (kl.EXTREMA | kl.POSITIONS * positions) * extrema
    _pass("plane_stats", z, flags, z, *raw)
    if moments:
        return raw
    return raw._replace(mean=raw.mean.new_empty(0), var=raw.var.new_empty(0))


def norm_stats(z: Tensor, norm: Norm | None, read: Collection[str]) -> tuple[Tensor, ...]:
    """Mean, variance, maximum and minimum of x = norm(z); [0] of a pair that is not read."""
    moments, extrema = bool({"mean", "var"} & set(read)), bool({"max", "min"} & set(read))
    raw = plane_stats(z, moments, extrema, positions=False)
    if norm is None:
        return raw[:4]
    mu, a, beta, _ = constants(norm, z, copy=False)
    return normalised(raw, a, mu, beta)[:4]


def affine_tail(z: Tensor, r: Tensor, mu: Tensor, v: Tensor, a: Tensor, beta: Tensor) -> Tensor:
    """Pass F2: y = relu(v (a (z - mu) + beta) + r); see ``formula.affine_tail``."""
    check_maps(z, r)
    wide = compute_dtype(z.dtype)
    (v,) = _scalars(z.shape[:2], wide, v)
    mu, a, beta = _scalars(z.shape[1:2], wide, mu, a, beta)
    y = torch.empty_like(z)
    _pass("affine_tail", z, kl.GATED | kl.RESIDUAL, z, r, mu, v, a, beta, y)
    return y


def affine_tail_backward(
    g: Tensor, y: Tensor, z: Tensor, mu: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Pass B1: d, its sums, and those of d (z - mu); see ``formula.affine_tail_backward``."""
    check_maps(z, g, y)
    wide = compute_dtype(z.dtype)
    (mu,) = _scalars(z.shape[1:2], wide, mu)
    sums, moments = (z.new_empty(z.shape[:2], dtype=wide) for _ in range(2))
    d = torch.empty_like(z)
    _pass("affine_tail_backward", z, 0, g, y, z, mu, d, sums, moments)
    return d, sums, moments


def stats_backward(d: Tensor, z: Tensor, mu: Tensor, p: Tensor, *terms: Tensor | None) -> Tensor:
    """Pass B2: the gradient of z; see ``formula.stats_backward``.

    Of a channels_last map i and j may be the extrema themselves instead of their positions: a spike
    then falls on the first value that equals it, and s_i and s_j are used up.
    """
    q, t, i, j, s_i, s_j = terms
    check_maps(d, z)
    shape, wide = d.shape[:2], compute_dtype(d.dtype)
    (p,), (mu,) = _scalars(shape, wide, p), _scalars(shape[1:], wide, mu)
    flags = 0
    if q is not None and t is not None:
        flags |= kl.WITH_Z
        q, t = _scalars(shape, wide, q, t)
    if i is not None and j is not None and s_i is not None and s_j is not None:
        by_value = i.is_floating_point()
        flags |= kl.WITH_SPIKES | kl.BY_VALUE * by_value
        i, j = _scalars(shape, wide if by_value else torch.int32, i, j)
        s_i, s_j = _scalars(shape, wide, s_i, s_j)
    dz = torch.empty_like(d)
    _pass("stats_backward", d, flags, d, z, mu, p, q, t, i, j, s_i, s_j, dz)
    return dz


def norm_relu(z: Tensor, mu: Tensor, a: Tensor, beta: Tensor) -> Tensor:
    """relu(a (z - mu) + beta), as pass F2 without gate and residual."""
    mu, a, beta = _scalars(z.shape[1:2], compute_dtype(z.dtype), mu, a, beta)
    y = torch.empty_like(z)
    _pass("affine_tail", z, 0, z, None, mu, None, a, beta, y)
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
    check_maps(g, z)
    weight = bias = q = t = dz = None
    if of_norm or batch_stats:
        sums, moments = mu.new_empty(z.shape[:2]), mu.new_empty(z.shape[:2])
        maps = (g, None, z, mu, None, sums, moments, a, beta)
        _pass("affine_tail_backward", z, kl.RECTIFIED, *maps)
        bias, weight, q, t = (torch.empty_like(mu) for _ in range(4))
        args = (None, sums, moments, *[None] * 8, a, mu, rstd, bias, weight, None, q, t)
        size = z.numel() // sums.numel()
        _stage(scalars.backward, sums, kl.RECTIFIED | kl.SUMS, size, *args)
    if of_map:
        dz = torch.empty_like(z)
        flags = kl.RECTIFIED | kl.WITH_Z * batch_stats
        _pass("stats_backward", z, flags, g, z, mu, a, q, t, *[None] * 4, dz, beta)
    return dz, weight, bias


def _stage(kernel: Any, like: Tensor, flags: int, size: int, *args: Tensor | int | None) -> None:
    """Runs a scalar stage, which takes a vector of channels of all images at a time."""
    batch, channels = like.shape
    lanes = kl.BYTES // like.element_size()
    head = (-(-channels // lanes), lanes, channels, batch, channels, size, flags)
    run(kernel, like.dtype, head, *args, alone=like.numel() <= _ALONE)


def normalise_batch(raw: RawStats, norm: Norm, size: int, moments: bool) -> BatchStats:
    """The statistics of a batch and those of x; see ``formula.normalise_batch``.

    The running statistics move along, if the norm has some.
    """
    shape, wide = raw.mean.shape[1:], raw.mean.dtype
    weight, bias = (
        None if t is None else _scalars(shape, wide, t.detach())[0]
        for t in (norm.weight, norm.bias)
    )
    flags = kl.SHARED | kl.MOMENTS * moments
    flags |= kl.WEIGHT * (weight is not None) | kl.BIAS * (bias is not None)
    own = norm.running
    if own is not None and not all(
        t.dtype == wide and t.is_contiguous() and type(t) is Tensor and not t.is_inference()
        for t in own[:2]
    ):
        own = None  # torch moves them
    *running, factor = own or (None, None, 0.0)
    flags |= kl.RUNNING * (own is not None)
    found = [raw.mean.new_empty(shape) for _ in range(5)]
    outs = _normalised(raw, flags, (weight, bias, *running, *found), (norm.eps, factor), size)
    if own is not None:
        torch.autograd.graph.increment_version(own[:2])
    elif norm.running is not None:
        move_running(norm.running, found[0], found[1], raw.mean.shape[0] * size)
    mu, var, rstd, a, beta = found
    return BatchStats(mu, var, rstd, a, beta, outs)


def normalised(raw: RawStats, a: Tensor, mu: Tensor, beta: Tensor) -> NormalStats:
    """Statistics of x = a (z - mu) + beta; see ``formula.normalised``."""
    a, mu, beta = _scalars(mu.shape, mu.dtype, a, mu, beta)
    flags = kl.MOMENTS * (raw.mean.dim() == 2)
    return _normalised(raw, flags, (*[None] * 4, mu, None, None, a, beta), (0.0, 0.0), 0)


def _normalised(
    raw: RawStats,
    flags: int,
    norm: Sequence[Tensor | None],
    numbers: tuple[float, float],
    size: int,
) -> NormalStats:
    flags |= kl.EXTREMA * (raw.high.dim() == 2) | kl.POSITIONS * (raw.at_high.dim() == 2)
    like = raw.mean if raw.mean.dim() == 2 else raw.high
    kinds = [kl.MOMENTS] * 2 + [kl.EXTREMA] * 4
    outs = [like.new_empty(like.shape if flags & kind else (0,)) for kind in kinds]
    outs += [torch.empty_like(raw.at_high) for _ in range(2)]
    if flags:
        bits = struct.unpack("2q", struct.pack("2d", *numbers))
        _stage(scalars.forward, like, flags, size, *norm, *raw, *outs, *bits)
    return NormalStats(*outs)


def gate_gradient(total: Tensor, moment: Tensor, a: Tensor, beta: Tensor) -> Tensor:
    """dv = a moment + beta total; see ``formula.gate_gradient``."""
    out = torch.empty_like(total)
    _stage(scalars.gate_gradient, total, 0, 0, total, moment, a, beta, out)
    return out


def gradients(
    *given: Any, batch_stats: bool, of_norm: bool, of_map: bool
) -> tuple[Tensor | None, Tensor | None, Coefficients | None]:
    """Gradients of gamma and beta, and the coefficients of dz; see ``formula.gradients``."""
    s = Scalars(*given)
    summed = batch_stats or of_norm
    flags = kl.SHARED * batch_stats | kl.SUMS * summed | kl.COEFFICIENTS * of_map
    for kind, t in zip((kl.MEAN, kl.VAR, kl.HIGH, kl.LOW), s.into, strict=True):
        flags |= 0 if t is None else kind

    def outputs(count: int, like: Tensor, *, wanted: int) -> list[Tensor | None]:
        return [torch.empty_like(like) if wanted else None for _ in range(count)]

    bias, weight = outputs(2, s.mu, wanted=summed)
    (p,) = outputs(1, s.v, wanted=of_map)
    q, t = outputs(2, s.v, wanted=of_map and flags & (kl.MEAN | kl.VAR | kl.SHARED))
    s_i, s_j = outputs(2, s.v, wanted=of_map and flags & (kl.HIGH | kl.LOW))
    outs = (bias, weight, p, q, t, s_i, s_j)
    args = (s.v, s.total, s.moment, *s.into, *s.of_z, s.a, s.mu, s.rstd, *outs)
    _stage(scalars.backward, s.total, flags, s.size, *args)
    return weight, bias, None if p is None else Coefficients(p, q, t, s_i, s_j)


_FORMS = {"text": kl.TEXT, "code": kl.CODE, "figure": kl.FIGURE}


def spem_gate(
    form: str, lam: float, dv: Tensor | None, high: Tensor, low: Tensor, *weights: Tensor
) -> list[Tensor]:
    """SPEM's gate [N, C] of maxima and minima; weights are w_e, b_e, w_r, b_r [C] in their dtype.

    With dv instead the gradients of maxima, minima and weights, and of lambda for each channel.
    """
    bits = struct.unpack("q", struct.pack("d", lam))
    like = [high] if dv is None else [high, low, *weights, weights[0]]
    found = [torch.empty_like(t) for t in like]
    flags, rest = (_FORMS[form], ()) if dv is None else (_FORMS[form] | kl.SUMS, found)
    v = found[0] if dv is None else dv
    _stage(scalars.spem_gate, high, flags, 0, high, low, *weights, v, *bits, *rest)
    return found
