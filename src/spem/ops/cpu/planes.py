"""The four passes over contiguous maps, plane by plane; what numba compiles.

Several threads run a kernel on one table: each takes chunks of planes until none is left. What a
plane gives depends on neither the chunks nor the threads. The passes themselves are defined, in
torch operations, in ``spem.ops.formula``.
"""

from typing import Any

from spem.ops.cpu import language as kl

_F1, _F2 = kl.arguments("mnnnnnpp"), kl.arguments("mmnnnnm")
_B1, _B2 = kl.arguments("mmmnmnnnn"), kl.arguments("mmnnnnppnnmn")


@kl.helper
def _first_equal(x: Any, size: int, value: Any) -> int:
    """The first position of the value in a plane that has it.

    Two vectors at a time: a branch for each would be mispredicted on most small planes.
    """
    lanes = kl.lanes_of(x)
    wanted = kl.every(x, value)
    for k in range(0, size, 2 * lanes):
        # What is behind the end counts as equal, hence is never the first.
        n = min(max(size - k - lanes, 0), lanes)
        bits = kl.where_equal_bits(kl.read_or(x, k, size - k, wanted), wanted)
        bits |= kl.where_equal_bits(kl.read_or(x, k + lanes, n, wanted), wanted) << lanes
        if bits != 0:
            return min(k + kl.lowest_bit(bits), size - 1)
    return 0


@kl.helper
def plane_stats(block: Any, image: int, begin: int, end: int) -> None:
    """F1. The sums show for free whether a plane may hold a NaN."""
    table = kl.table_of(block)
    size, flags = table[kl.SIZE], table[kl.FLAGS]
    z, mean, var, high, low, first, at_high, at_low = _F1(block)
    lanes, zero = kl.lanes_of(block), kl.number(block, 0)
    share = kl.number(block, 1) / kl.number(block, size)
    base = image * table[kl.EXTENT]
    for p in range(base + begin, base + end):
        x = kl.offset(z, p * size)
        z0 = kl.element(x, 0)
        h = w = firsts = kl.every(x, z0)
        s = q = kl.every(x, 0)
        shift = z0 if flags & (kl.MOMENTS | kl.MEAN) and z0 - z0 == zero else zero
        shifts = kl.every(x, shift)
        if flags & kl.MEAN:
            for k in range(0, size, lanes):
                s = s + (kl.read_or(x, k, size - k, shifts) - shifts)
        elif flags & kl.MOMENTS:
            for k in range(0, size, lanes):
                # The plane's own first value changes none of the results.
                value = kl.read_or(x, k, size - k, firsts)
                h, w = kl.larger(value, h), kl.smaller(value, w)
                value = value - shifts
                s, q = s + value, q + value * value
        else:
            for k in range(0, size, lanes):
                value = kl.read_or(x, k, size - k, firsts)
                h, w = kl.larger(value, h), kl.smaller(value, w)
                s = s + value
        sum_ = kl.total(s)
        m = sum_ * share
        if flags & (kl.MOMENTS | kl.MEAN):
            mean[p] = shift + m
        if flags & kl.MOMENTS:
            v = (kl.total(q) - sum_ * m) * share
            v = zero if v < zero else v
            var[p] = v if v - v == zero else kl.large_variance(x, size, 1, shift + m)
        if flags & kl.EXTREMA:
            top, bottom = kl.highest(h), kl.lowest(w)
            nan = sum_ - sum_ != zero and kl.has_nan(x, size, 1)
            if nan:
                top = bottom = sum_ - sum_
            high[p], low[p], first[p] = top, bottom, z0
            if flags & kl.POSITIONS:
                at_high[p] = 0 if nan else _first_equal(x, size, top)
                at_low[p] = 0 if nan else _first_equal(x, size, bottom)


@kl.helper
def write_plane(
    table: Any, z: Any, r: Any, y: Any, at: int, centre: Any, slope: Any, start: Any
) -> None:
    """relu(slope (z - centre) + start + r) of the plane that begins at ``at``."""
    size, flags, lanes = table[kl.SIZE], table[kl.FLAGS], kl.lanes_of(z)
    zeros = kl.every(z, 0)
    centres, slopes, starts = kl.every(z, centre), kl.every(z, slope), kl.every(z, start)
    for k in range(0, size, lanes):
        t = slopes * (kl.read(z, at + k, size - k) - centres) + starts
        if flags & kl.RESIDUAL:
            t = t + kl.read(r, at + k, size - k)
        t = kl.where_above(zeros, t, zeros, t)
        if flags & kl.STREAM and size - k >= lanes:
            kl.stream(y, at + k, t)
        else:
            kl.write(y, at + k, size - k, t)


@kl.helper
def affine_tail(block: Any, _image: int, begin: int, end: int) -> None:
    """F2."""
    table = kl.table_of(block)
    size, flags = table[kl.SIZE], table[kl.FLAGS]
    z, r, mu, v, a, beta, y = _F2(block)
    for p in range(begin, end):
        c = p % table[kl.CHANNELS]
        gate = v[p] if flags & kl.GATED else kl.number(block, 1)
        write_plane(table, z, r, y, p * size, mu[c], gate * a[c], gate * beta[c])


@kl.helper
def affine_tail_backward(block: Any, _image: int, begin: int, end: int) -> None:
    """B1."""
    table = kl.table_of(block)
    size, rectified = table[kl.SIZE], table[kl.FLAGS] & kl.RECTIFIED
    g, y, z, mu, d, sums, moments, a, beta = _B1(block)
    zeros = kl.every(block, 0)
    for p in range(begin, end):
        c = p % table[kl.CHANNELS]
        centre = kl.every(block, mu[c])
        slope = start = s = b = zeros
        if rectified:
            slope, start = kl.every(block, a[c]), kl.every(block, beta[c])
        for k in range(0, size, kl.lanes_of(block)):
            n, at = size - k, p * size + k
            off = kl.read(z, at, n) - centre
            v = kl.read(g, at, n)  # 0 behind the end
            if rectified:
                v = kl.where_at_most(slope * off + start, zeros, zeros, v)
            else:
                v = kl.where_at_most(kl.read(y, at, n), zeros, zeros, v)
                kl.write(d, at, n, v)
            s = s + v
            b = b + v * off
        sums[p] = kl.total(s)
        moments[p] = kl.total(b)


@kl.helper
def stats_backward(block: Any, _image: int, begin: int, end: int) -> None:
    """B2."""
    table = kl.table_of(block)
    size, flags = table[kl.SIZE], table[kl.FLAGS]
    with_z, rectified = flags & kl.WITH_Z, flags & kl.RECTIFIED
    d, z, mu, p_at, q_at, t_at, i_at, j_at, si_at, sj_at, dz, beta = _B2(block)
    zero, zeros = kl.number(block, 0), kl.every(block, 0)
    for plane in range(begin, end):
        c = plane % table[kl.CHANNELS]
        at = c if rectified else plane
        p, q, t, centre, start = p_at[at], zero, zero, mu[c], zeros
        if with_z:
            q, t = q_at[at], t_at[at]
        if rectified:
            start = kl.every(block, beta[c])
        ps, qs, ts = kl.every(block, p), kl.every(block, q), kl.every(block, t)
        centres = kl.every(block, centre)
        for k in range(0, size, kl.lanes_of(block)):
            n, o = size - k, plane * size + k
            v = kl.read(d, o, n)
            off = zeros
            if with_z | rectified:
                off = kl.read(z, o, n) - centres
            if rectified:
                v = kl.where_at_most(ps * off + start, zeros, zeros, v)
            v = ps * v
            if with_z:
                v = ts * off + (v + qs)
            kl.write(dz, o, n, v)
        if flags & kl.WITH_SPIKES:
            # Again from the maps, not from what was stored: that may be rounded.
            i, j = plane * size + i_at[plane], plane * size + j_at[plane]
            v, w = p * kl.element(d, i), p * kl.element(d, j)
            if with_z:
                v = t * (kl.element(z, i) - centre) + (v + q)
                w = t * (kl.element(z, j) - centre) + (w + q)
            if i == j:
                v = v + sj_at[plane]
            kl.set_element(dz, j, w + sj_at[plane])
            kl.set_element(dz, i, v + si_at[plane])
