"""The four passes over channels_last maps, row of channels by row; what numba compiles.

The same tables and results as in ``spem.ops.cpu.planes``. A chunk is a range of channels of one
image; its positions are visited in memory order, a few at a time, and what is gathered of them is
kept in the outputs, whose rows fit into the first cache.

What a pass that writes costs is decided by how memory is reached, not by what is computed: several
rows at a time, or stores whose lines were not asked for before, take two to four times as long as
one row after the other with every line asked for ahead of time.
"""

from typing import Any

from spem.ops.cpu import language as kl

GROUP = 8  # positions for which sums are held in registers where maps are only read
AHEAD = 4096  # bytes from what is worked on to what is asked for

_F1, _F2 = kl.arguments("mnnnnnpp"), kl.arguments("mmnnnnm")
_B1, _B2 = kl.arguments("mmmnmnnnn"), kl.arguments("mmnnnnppnnmn")
_EXTREMA = kl.arguments("nn", start=6)  # of B2, where i and j are values


@kl.helper
def _at_a_time(block: Any) -> int:
    """Positions for which a pass that writes holds coefficients and sums in registers."""
    return max(1, 4 // kl.bytes_of(block))


@kl.helper
def gather(block: Any, lean: int, image: int, begin: int, end: int) -> None:
    """Statistics of channels of an image; sums are gathered in ``mean`` and ``var``.

    ``lean``: the extrema or the mean alone. A constant: with one flag more the compiler leaves the
    branches inside the loops.
    """
    table = kl.table_of(block)
    channels, size, flags = table[kl.CHANNELS], table[kl.SIZE], table[kl.FLAGS]
    z, mean, var, high, low, first, at_high, at_low = _F1(block)
    base = image * channels
    x = kl.offset(z, base * size)
    lanes = kl.lanes_of(x)
    zero, zeros = kl.number(x, 0), kl.every(x, 0)
    share = kl.every(x, 1) / kl.every(x, size)
    for k in range(0, size, GROUP):
        rows = min(GROUP, size - k)
        for c in range(begin, end, lanes):
            n, p = min(lanes, end - c), base + c
            row = kl.read(x, c, n)
            shift = kl.finite(row, zeros)
            s = q = zeros
            h = w = row
            i = j = kl.every(at_high, 0)
            if k > 0:
                s, q = kl.read(mean, p, n), kl.read(var, p, n)
                if flags & kl.EXTREMA:
                    h, w = kl.read(high, p, n), kl.read(low, p, n)
                if flags & kl.POSITIONS:
                    i, j = kl.read(at_high, p, n), kl.read(at_low, p, n)
            if flags & kl.POSITIONS:
                for u in range(k, k + rows):
                    value, here = kl.read(x, u * channels + c, n), kl.every(at_high, u)
                    i = kl.where_above(value, h, here, i)
                    j = kl.where_above(w, value, here, j)
                    h, w = kl.larger(value, h), kl.smaller(value, w)
                    value = value - shift
                    s, q = s + value, q + value * value
                kl.write(at_high, p, n, i)
                kl.write(at_low, p, n, j)
            elif lean and flags & kl.EXTREMA:
                for u in range(k, k + rows):
                    value = kl.read(x, u * channels + c, n)
                    h, w = kl.larger(value, h), kl.smaller(value, w)
                    s = s + value
            elif flags & kl.EXTREMA:
                for u in range(k, k + rows):
                    value = kl.read(x, u * channels + c, n)
                    h, w = kl.larger(value, h), kl.smaller(value, w)
                    value = value - shift
                    s, q = s + value, q + value * value
            elif lean:
                for u in range(k, k + rows):
                    s = s + (kl.read(x, u * channels + c, n) - shift)
            else:
                for u in range(k, k + rows):
                    value = kl.read(x, u * channels + c, n) - shift
                    s, q = s + value, q + value * value
            if flags & kl.EXTREMA:
                kl.write(high, p, n, h)
                kl.write(low, p, n, w)
            kl.write(mean, p, n, s)
            kl.write(var, p, n, q)
    for c in range(begin, end, lanes):
        n, p = min(lanes, end - c), base + c
        row = kl.read(x, c, n)
        s = kl.read(mean, p, n)
        m = s * share
        v = (kl.read(var, p, n) - s * m) * share
        kl.write(mean, p, n, kl.finite(row, zeros) + m)
        kl.write(var, p, n, kl.where_above(zeros, v, zeros, v))
        if kl.total(v - v) != zero:
            for u in range(n):
                if var[p + u] - var[p + u] != zero:
                    plane = kl.offset(x, c + u)
                    var[p + u] = kl.large_variance(plane, size, channels, mean[p + u])
        if flags & kl.EXTREMA:
            kl.write(first, p, n, row)
            if kl.total(s - s) != zero:
                for u in range(n):
                    if kl.has_nan(kl.offset(x, c + u), size, channels):
                        high[p + u] = low[p + u] = mean[p + u] - mean[p + u]
                        if flags & kl.POSITIONS:
                            at_high[p + u] = at_low[p + u] = 0


@kl.helper
def plane_stats(block: Any, image: int, begin: int, end: int) -> None:
    """F1."""
    gather(block, 0, image, begin, end)


@kl.helper
def write_rows(
    table: Any, far: int, image: int, begin: int, end: int, maps: Any, scalars: Any
) -> None:
    """relu(v (a (z - mu) + beta) + r) of some channels of an image.

    ``maps`` are z, r and y; ``scalars`` mu, v [B, C], a and beta, the others [C]; ``far`` says
    whether what is read lies further away than in the caches.
    """
    channels, size, flags = table[kl.CHANNELS], table[kl.SIZE], table[kl.FLAGS]
    (z, r, y), (mu, v, a, beta) = maps, scalars
    lanes = kl.lanes_of(z)
    group, ahead = _at_a_time(z), AHEAD // kl.bytes_of(z)
    zeros = kl.every(z, 0)
    for k in range(0, size, group):
        rows = min(group, size - k)
        at = (image * size + k) * channels
        for c in range(begin, end, lanes):
            n = min(lanes, end - c)
            centre, slope = kl.read(mu, c, n), kl.read(a, c, n)
            start = kl.read(beta, c, n)
            if flags & kl.GATED:
                gate = kl.read(v, image * channels + c, n)
                slope = gate * slope
                start = gate * start
            for u in range(rows):
                o = at + u * channels + c
                if far:
                    kl.prefetch(z, o + ahead)
                t = slope * (kl.read(z, o, n) - centre) + start
                if flags & kl.RESIDUAL:
                    if far:
                        kl.prefetch(r, o + ahead)
                    t = t + kl.read(r, o, n)
                t = kl.where_above(zeros, t, zeros, t)
                if flags & kl.STREAM and n >= lanes:
                    kl.stream(y, o, t)
                else:
                    if far:
                        kl.prefetch_to_write(y, o + ahead)
                    kl.write(y, o, n, t)


@kl.helper
def affine_tail(block: Any, image: int, begin: int, end: int) -> None:
    """F2."""
    table = kl.table_of(block)
    z, r, mu, v, a, beta, y = _F2(block)
    write_rows(table, 1, image, begin, end, (z, r, y), (mu, v, a, beta))


@kl.helper
def affine_tail_backward(block: Any, image: int, begin: int, end: int) -> None:
    """B1. The sums are gathered in the outputs."""
    table = kl.table_of(block)
    channels, size, rectified = table[kl.CHANNELS], table[kl.SIZE], table[kl.FLAGS] & kl.RECTIFIED
    g, y, z, mu, d, sums, moments, a, beta = _B1(block)
    lanes = kl.lanes_of(block)
    group, ahead = _at_a_time(block), AHEAD // kl.bytes_of(block)
    zeros = kl.every(block, 0)
    base = image * channels
    for k in range(0, size, group):
        rows = min(group, size - k)
        at = (image * size + k) * channels
        for c in range(begin, end, lanes):
            n = min(lanes, end - c)
            centre = kl.read(mu, c, n)
            slope = start = s = b = zeros
            if rectified:
                slope, start = kl.read(a, c, n), kl.read(beta, c, n)
            if k > 0:
                s, b = kl.read(sums, base + c, n), kl.read(moments, base + c, n)
            for u in range(rows):
                o = at + u * channels + c
                kl.prefetch(g, o + ahead)
                kl.prefetch(z, o + ahead)
                v = kl.read(g, o, n)
                off = kl.read(z, o, n) - centre
                if rectified:
                    v = kl.where_at_most(slope * off + start, zeros, zeros, v)
                else:
                    kl.prefetch(y, o + ahead)
                    kl.prefetch_to_write(d, o + ahead)
                    v = kl.where_at_most(kl.read(y, o, n), zeros, zeros, v)
                    kl.write(d, o, n, v)
                s = s + v
                b = b + v * off
            kl.write(sums, base + c, n, s)
            kl.write(moments, base + c, n, b)


@kl.helper
def stats_backward(block: Any, image: int, begin: int, end: int) -> None:
    """B2. A spike that goes by value is taken out of ``s_i`` or ``s_j`` where it has fallen."""
    table = kl.table_of(block)
    channels, size, flags = table[kl.CHANNELS], table[kl.SIZE], table[kl.FLAGS]
    with_z, spikes = flags & kl.WITH_Z, flags & kl.WITH_SPIKES
    rectified, by_value = flags & kl.RECTIFIED, flags & kl.BY_VALUE
    d, z, mu, p_at, q_at, t_at, i_at, j_at, si_at, sj_at, dz, beta = _B2(block)
    zi_at, zj_at = _EXTREMA(block)
    lanes = kl.lanes_of(block)
    group, ahead = _at_a_time(block), AHEAD // kl.bytes_of(block)
    zeros = kl.every(block, 0)
    base = 0 if rectified else image * channels
    for k in range(0, size, group):
        rows = min(group, size - k)
        at = (image * size + k) * channels
        for c in range(begin, end, lanes):
            n, plane = min(lanes, end - c), base + c
            p = kl.read(p_at, plane, n)
            q = t = centre = start = zi = zj = si = sj = zeros
            i = j = kl.every(i_at, -1)
            if with_z | rectified:
                centre = kl.read(mu, c, n)
            if rectified:
                start = kl.read(beta, c, n)
            if with_z:
                q, t = kl.read(q_at, plane, n), kl.read(t_at, plane, n)
            if by_value:
                zi, zj = kl.read(zi_at, plane, n), kl.read(zj_at, plane, n)
            elif spikes:
                i, j = kl.read(i_at, plane, n), kl.read(j_at, plane, n)
            if spikes:
                si, sj = kl.read(si_at, plane, n), kl.read(sj_at, plane, n)
            for u in range(rows):
                o = at + u * channels + c
                kl.prefetch(d, o + ahead)
                kl.prefetch_to_write(dz, o + ahead)
                v = kl.read(d, o, n)
                value = off = zeros
                if with_z | rectified | by_value:
                    kl.prefetch(z, o + ahead)
                    value = kl.read(z, o, n)
                    off = value - centre
                if rectified:
                    v = kl.where_at_most(p * off + start, zeros, zeros, v)
                v = p * v
                if with_z:
                    v = t * off + (v + q)
                if by_value:
                    v = v + kl.where_equal(value, zi, si, zeros)
                    v = v + kl.where_equal(value, zj, sj, zeros)
                    si = kl.where_equal(value, zi, zeros, si)
                    sj = kl.where_equal(value, zj, zeros, sj)
                elif spikes:
                    here = kl.every(i_at, k + u)
                    v = v + kl.where_equal(i, here, si, zeros)
                    v = v + kl.where_equal(j, here, sj, zeros)
                kl.write(dz, o, n, v)
            if by_value:
                kl.write(si_at, plane, n, si)
                kl.write(sj_at, plane, n, sj)
