"""The device code of `spem.ops.cuda`.

One kernel serves both layouts: it works on tiles of P planes by KB positions, and only the address
of a tile's cell depends on the layout (contiguous: plane K + k; channels_last: (image K + k) C +
channel). Maps are read in their own dtype, computed in float32 and written in their own. N is the
number of bytes of one map.

Constants of the compilation: LAST (channels_last), WIDE (int64 offsets), K_UNIT and C_UNIT (powers
of two known to divide K and C), P and KB (the tile), LOOP (a program has more than one tile).
"""

# Triton's language is typed for its compiler, not for a type checker: the parameters of a kernel
# are tensors and pointers without a Python type, and its operators take them as they are.
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false

import triton
import triton.language as tl

# Sizes are not compiled in: what a kernel needs to know of them is in K_UNIT and C_UNIT.
_SIZES = ("planes", "k_units", "c_units", "blocks", "tiles", "parts")
_NOWHERE = tl.constexpr(2**31 - 1)
# Squares are summed of values times this, so that no sum overflows where the variance does not.
_SCALE = tl.constexpr(2.0**-8)
_LARGEST = tl.constexpr(float(2**128 - 2**104))


@triton.jit
def _place(blocks, planes, K, C, LAST: tl.constexpr, WIDE: tl.constexpr, P: tl.constexpr):
    """The program's P planes and its piece of the positions, one of ``blocks``.

    Of each plane: its number in [B, C], channel, offset of position 0, and whether it exists.
    Programs that follow one another work on neighbours in memory.
    """
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    lane = tl.arange(0, P)
    if LAST:
        across = tl.cdiv(C, P)
        channel = (program % across) * P + lane
        block = (program // across) % blocks
        image = program // across // blocks
        index = image * C + channel
        start = image * K * C + channel
        inside = channel < C
    else:
        block = program % blocks
        index = (program // blocks) * P + lane
        channel = index % C
        start = index * K
        inside = index < planes
    return index, channel, start, inside, block


@triton.jit
def _cells(start, inside, k, K, C, LAST: tl.constexpr, WIDE: tl.constexpr):
    """Offsets of the cells of positions k of the planes at ``start``, and which exist; [P, KB].

    k is compared with K alone, whose divisor the compiler knows: it makes the loads wide.
    """
    step = k
    if WIDE:
        step = step.to(tl.int64)
    if LAST:
        step = step * C
    return start[:, None] + step[None, :], inside[:, None] & (k < K)[None, :]


@triton.jit
def _first(value, k, HIGH: tl.constexpr):
    """Extremum of each row of [P, KB] and the least k that has it. NaN if the row has a NaN.

    ``tl.max`` leaves out NaN: a NaN bids the position -1, which is below every other.
    """
    nan = value != value
    if HIGH:
        best = tl.max(tl.where(nan, float("-inf"), value), 1)
    else:
        best = tl.min(tl.where(nan, float("inf"), value), 1)
    bid = tl.where(value == best[:, None], k, _NOWHERE)
    at = tl.min(tl.where(nan, -1, bid), 1)
    return tl.where(at < 0, float("nan"), best), tl.maximum(at, 0)


@triton.jit
def _shift(first):
    """What the moments are taken around: the plane's first value if it is finite, else 0."""
    return tl.where(tl.abs(first) < float("inf"), first, 0.0)


@triton.jit
def _moments(s1, s2, shift, K):
    """Mean and biased variance from the sums of t = z - shift and of (_SCALE t)^2; NaN stays NaN.

    A variance that overflows is the largest number: the norm's factor of 0 times infinity is NaN.
    """
    size = K.to(tl.float32)
    scaled = s1 * (_SCALE * _SCALE)
    var = (s2 - scaled * scaled / size / (_SCALE * _SCALE)) / size
    var = tl.where(var < 0, 0.0, var) / (_SCALE * _SCALE)
    overflown = (s1 - s1 == 0) & ((var != var) | (var > _LARGEST))
    return shift + s1 / size, tl.where(overflown, _LARGEST, var)


@triton.jit(do_not_specialize=_SIZES)
def plane_stats_kernel(
    z,
    mean,
    var,
    high,
    low,
    first,
    at_high,
    at_low,
    planes,
    k_units,
    c_units,
    blocks,
    tiles,
    MOMENTS: tl.constexpr,
    EXTREMA: tl.constexpr,
    PARTIAL: tl.constexpr,
    LOOP: tl.constexpr,
    LAST: tl.constexpr,
    WIDE: tl.constexpr,
    K_UNIT: tl.constexpr,
    C_UNIT: tl.constexpr,
    P: tl.constexpr,
    KB: tl.constexpr,
):
    """F1 for P planes: moments and first extrema of ``tiles`` tiles, in one read.

    Formula:
        s1 = sum_k (z_k - z_0), s2 = sum_k (z_k - z_0)^2, mean = z_0 + s1/K, var = (s2 - s1^2/K)/K
        (s2 is kept times _SCALE^2)
        high = max_k z_k, low = min_k z_k and the first k that has them

    Bytes: reads N, writes up to 28 a plane. With PARTIAL it writes s1 and s2 in place of mean and
    var, all of them as [blocks, B, C], and `merge_stats_kernel` finishes.
    """
    K, C = k_units * K_UNIT, c_units * C_UNIT
    index, _channel, start, inside, block = _place(blocks, planes, K, C, LAST, WIDE, P)
    begin = (block * tiles).to(tl.int32) * KB
    stop = tl.minimum(begin + tiles * KB, K)
    k = begin + tl.arange(0, KB)
    offsets, mask = _cells(start, inside, k, K, C, LAST, WIDE)
    x = tl.load(z + offsets, mask=mask, other=0.0).to(tl.float32)
    z_0 = tl.load(z + start, mask=inside, other=0.0).to(tl.float32)
    shift = _shift(z_0)
    t = tl.where(mask, x - shift[:, None], 0.0)
    s1, s2 = t, (t * _SCALE) * (t * _SCALE)
    # A lane that holds no cell loses ties as well: its position is beyond those of the cells.
    top = tl.where(mask, x, float("-inf"))
    bottom = tl.where(mask, x, float("inf"))
    at_top = tl.broadcast_to(k[None, :], (P, KB))
    at_bottom = at_top
    if LOOP:
        for begin_of_tile in range(begin + KB, stop, KB):
            k = begin_of_tile + tl.arange(0, KB)
            offsets, mask = _cells(start, inside, k, K, C, LAST, WIDE)
            x = tl.load(z + offsets, mask=mask, other=0.0).to(tl.float32)
            if MOMENTS:
                t = tl.where(mask, x - shift[:, None], 0.0)
                s1 += t
                s2 += (t * _SCALE) * (t * _SCALE)
            if EXTREMA:
                # Strictly better only: the first of equals stays; a NaN is taken and kept.
                better = mask & ((x > top) | (x != x))
                top = tl.where(better, x, top)
                at_top = tl.where(better, k[None, :], at_top)
                better = mask & ((x < bottom) | (x != x))
                bottom = tl.where(better, x, bottom)
                at_bottom = tl.where(better, k[None, :], at_bottom)
    cell = block * planes + index
    if MOMENTS:
        sum_1 = tl.sum(s1, 1)
        sum_2 = tl.sum(s2, 1)
        if not PARTIAL:
            sum_1, sum_2 = _moments(sum_1, sum_2, shift, K)
        tl.store(mean + cell, sum_1, mask=inside)
        tl.store(var + cell, sum_2, mask=inside)
    if EXTREMA:
        best, at = _first(top, at_top, True)
        tl.store(high + cell, best, mask=inside)
        tl.store(at_high + cell, at, mask=inside)
        best, at = _first(bottom, at_bottom, False)
        tl.store(low + cell, best, mask=inside)
        tl.store(at_low + cell, at, mask=inside)
    if EXTREMA or PARTIAL:
        # All parts of a plane store the same value.
        tl.store(first + index, z_0, mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def merge_stats_kernel(
    sum_1,
    sum_2,
    highs,
    lows,
    first,
    at_highs,
    at_lows,
    mean,
    var,
    high,
    low,
    at_high,
    at_low,
    planes,
    parts,
    k_units,
    MOMENTS: tl.constexpr,
    EXTREMA: tl.constexpr,
    K_UNIT: tl.constexpr,
    P: tl.constexpr,
):
    """Merges F1's partial results [parts, B, C] in the order of the parts: the first wins ties.

    The parts of a plane share one shift, so their sums simply add. Only few planes are split, so
    int32 will do here. Bytes: reads 24 a plane and part, writes 24 a plane.
    """
    index = tl.program_id(0) * P + tl.arange(0, P)
    inside = index < planes
    if MOMENTS:
        s1 = tl.zeros((P,), tl.float32)
        s2 = tl.zeros((P,), tl.float32)
        for part in range(parts):
            cell = part * planes + index
            s1 += tl.load(sum_1 + cell, mask=inside, other=0.0)
            s2 += tl.load(sum_2 + cell, mask=inside, other=0.0)
        shift = _shift(tl.load(first + index, mask=inside, other=0.0))
        s1, s2 = _moments(s1, s2, shift, k_units * K_UNIT)
        tl.store(mean + index, s1, mask=inside)
        tl.store(var + index, s2, mask=inside)
    if EXTREMA:
        top = tl.load(highs + index, mask=inside, other=0.0)
        bottom = tl.load(lows + index, mask=inside, other=0.0)
        at_top = tl.load(at_highs + index, mask=inside, other=0)
        at_bottom = tl.load(at_lows + index, mask=inside, other=0)
        for part in range(1, parts):
            cell = part * planes + index
            x = tl.load(highs + cell, mask=inside, other=0.0)
            better = (x > top) | (x != x)
            top = tl.where(better, x, top)
            at_top = tl.where(better, tl.load(at_highs + cell, mask=inside, other=0), at_top)
            x = tl.load(lows + cell, mask=inside, other=0.0)
            better = (x < bottom) | (x != x)
            bottom = tl.where(better, x, bottom)
            at_bottom = tl.where(better, tl.load(at_lows + cell, mask=inside, other=0), at_bottom)
        tl.store(high + index, top, mask=inside)
        tl.store(low + index, bottom, mask=inside)
        tl.store(at_high + index, at_top, mask=inside)
        tl.store(at_low + index, at_bottom, mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def affine_tail_kernel(
    z,
    r,
    mu,
    v,
    a,
    beta,
    y,
    planes,
    k_units,
    c_units,
    blocks,
    LAST: tl.constexpr,
    WIDE: tl.constexpr,
    K_UNIT: tl.constexpr,
    C_UNIT: tl.constexpr,
    P: tl.constexpr,
    KB: tl.constexpr,
):
    """F2 for one tile: y = relu(v (a (z - mu) + beta) + r), NaN kept. Reads 2N bytes, writes N."""
    K, C = k_units * K_UNIT, c_units * C_UNIT
    index, channel, start, inside, block = _place(blocks, planes, K, C, LAST, WIDE, P)
    k = (block * KB).to(tl.int32) + tl.arange(0, KB)
    offsets, mask = _cells(start, inside, k, K, C, LAST, WIDE)
    x = tl.load(z + offsets, mask=mask, other=0.0).to(tl.float32)
    shortcut = tl.load(r + offsets, mask=mask, other=0.0).to(tl.float32)
    centre = tl.load(mu + channel, mask=inside, other=0.0)
    gate = tl.load(v + index, mask=inside, other=0.0)
    slope = gate * tl.load(a + channel, mask=inside, other=0.0)
    shift = gate * tl.load(beta + channel, mask=inside, other=0.0)
    t = slope[:, None] * (x - centre[:, None]) + shift[:, None] + shortcut
    t = tl.where(t < 0, 0.0, t)
    tl.store(y + offsets, t.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _masked(g, y, z, d, offsets, mask, centre):
    """Stores d of the cells; returns d and d (z - mu)."""
    gradient = tl.load(g + offsets, mask=mask, other=0.0).to(tl.float32)
    output = tl.load(y + offsets, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(z + offsets, mask=mask, other=0.0).to(tl.float32)
    passed = tl.where(output <= 0, 0.0, gradient)
    tl.store(d + offsets, passed.to(d.dtype.element_ty), mask=mask)
    # The mask once more: mu may be infinite or NaN, and 0 times that is NaN.
    return passed, tl.where(mask, passed * (x - centre[:, None]), 0.0)


@triton.jit(do_not_specialize=_SIZES)
def affine_tail_backward_kernel(
    g,
    y,
    z,
    mu,
    d,
    total,
    moment,
    planes,
    k_units,
    c_units,
    blocks,
    tiles,
    LOOP: tl.constexpr,
    LAST: tl.constexpr,
    WIDE: tl.constexpr,
    K_UNIT: tl.constexpr,
    C_UNIT: tl.constexpr,
    P: tl.constexpr,
    KB: tl.constexpr,
):
    """B1 for P planes: d = g where y > 0 or NaN, else 0; total = sum d; moment = sum d (z - mu).

    Bytes: reads 3N (g, y, z), writes N (d) and 8 a plane; the sums as [blocks, B, C].
    """
    K, C = k_units * K_UNIT, c_units * C_UNIT
    index, channel, start, inside, block = _place(blocks, planes, K, C, LAST, WIDE, P)
    begin = (block * tiles).to(tl.int32) * KB
    stop = tl.minimum(begin + tiles * KB, K)
    centre = tl.load(mu + channel, mask=inside, other=0.0)
    offsets, mask = _cells(start, inside, begin + tl.arange(0, KB), K, C, LAST, WIDE)
    s, m = _masked(g, y, z, d, offsets, mask, centre)
    if LOOP:
        for begin_of_tile in range(begin + KB, stop, KB):
            k = begin_of_tile + tl.arange(0, KB)
            offsets, mask = _cells(start, inside, k, K, C, LAST, WIDE)
            s_of_tile, m_of_tile = _masked(g, y, z, d, offsets, mask, centre)
            s += s_of_tile
            m += m_of_tile
    cell = block * planes + index
    tl.store(total + cell, tl.sum(s, 1), mask=inside)
    tl.store(moment + cell, tl.sum(m, 1), mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def stats_backward_kernel(
    d,
    z,
    mu,
    p,
    q,
    t,
    i,
    j,
    s_i,
    s_j,
    dz,
    planes,
    k_units,
    c_units,
    blocks,
    AFFINE: tl.constexpr,
    SHARED: tl.constexpr,
    SPIKES: tl.constexpr,
    LAST: tl.constexpr,
    WIDE: tl.constexpr,
    K_UNIT: tl.constexpr,
    C_UNIT: tl.constexpr,
    P: tl.constexpr,
    KB: tl.constexpr,
):
    """B2 for one tile: dz = p d + q + t (z - mu) + [k=i] s_i + [k=j] s_j.

    Without AFFINE the terms of q and t are left out and z is not read, without SPIKES those of s_i
    and s_j. With SHARED q and t are [C], the same for all images.

    Bytes: reads 2N (d, z; N without AFFINE), writes N (dz).
    """
    K, C = k_units * K_UNIT, c_units * C_UNIT
    index, channel, start, inside, block = _place(blocks, planes, K, C, LAST, WIDE, P)
    k = (block * KB).to(tl.int32) + tl.arange(0, KB)
    offsets, mask = _cells(start, inside, k, K, C, LAST, WIDE)
    gradient = tl.load(d + offsets, mask=mask, other=0.0).to(tl.float32)
    out = tl.load(p + index, mask=inside, other=0.0)[:, None] * gradient
    if AFFINE:
        x = tl.load(z + offsets, mask=mask, other=0.0).to(tl.float32)
        centre = tl.load(mu + channel, mask=inside, other=0.0)
        cell = channel if SHARED else index
        constant = tl.load(q + cell, mask=inside, other=0.0)
        slope = tl.load(t + cell, mask=inside, other=0.0)
        out += constant[:, None] + slope[:, None] * (x - centre[:, None])
    if SPIKES:
        at = tl.load(i + index, mask=inside, other=-1)
        spike = tl.load(s_i + index, mask=inside, other=0.0)
        out += tl.where(k[None, :] == at[:, None], spike[:, None], 0.0)
        at = tl.load(j + index, mask=inside, other=-1)
        spike = tl.load(s_j + index, mask=inside, other=0.0)
        out += tl.where(k[None, :] == at[:, None], spike[:, None], 0.0)
    tl.store(dz + offsets, out.to(dz.dtype.element_ty), mask=mask)


INTERPRETED: bool = not isinstance(plane_stats_kernel, triton.JITFunction)
"""Whether the kernels run in Triton's interpreter; fixed when this module is imported."""
