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

    ``lean``: the extrema or the mean alone.
    """
    table = kl.table_of(block)
    channels, size, flags = table[kl.CHANNELS], table[kl.SIZE], table[kl.FLAGS]
    z, mean, var, high, low, first, at_high, at_low = _F1(block)
    base = image * channels
    x = kl.offset(z, base * size)
    lanes = kl.lanes_of(x)
    zero = kl.number(x, 0)
    zeros = kl.every(x, zero)
    share = kl.every(x, kl.number(x, 1) / kl.number(x, size))
    for k in range(0, size, GROUP):
        rows = min(GROUP, size - k)
        for c in range(begin, end, lanes):
            n, p = min(lanes, end - c), base + c
            row = kl.read(x, c, n, zero)
            shift = kl.finite(row, zeros)
            s = q = zeros
            h = w = row
            i = j = kl.every_position(x, 0)
            if k > 0:
                s, q = kl.read(mean, p, n, zero), kl.read(var, p, n, zero)
                if flags & kl.EXTREMA:
                    h, w = kl.read(high, p, n, zero), kl.read(low, p, n, zero)
                if flags & kl.POSITIONS:
                    i = kl.load_positions(x, at_high, p, n)
                    j = kl.load_positions(x, at_low, p, n)
            if flags & kl.POSITIONS:
                for u in range(k, k + rows):
                    value, here = kl.read(x, u * channels + c, n, zero), kl.every_position(x, u)
                    i = kl.where_above(value, h, here, i)
                    j = kl.where_above(w, value, here, j)
                    h, w = kl.larger(value, h), kl.smaller(value, w)
                    value = value - shift
                    s, q = s + value, q + value * value
                kl.store_part(at_high, p, n, i)
                kl.store_part(at_low, p, n, j)
            elif lean and flags & kl.EXTREMA:
                for u in range(k, k + rows):
                    value = kl.read(x, u * channels + c, n, zero)
                    h, w = kl.larger(value, h), kl.smaller(value, w)
                    s = s + value
            elif flags & kl.EXTREMA:
                for u in range(k, k + rows):
                    value = kl.read(x, u * channels + c, n, zero)
                    h, w = kl.larger(value, h), kl.smaller(value, w)
                    value = value - shift
                    s, q = s + value, q + value * value
            elif lean:
                for u in range(k, k + rows):
                    s = s + (kl.read(x, u * channels + c, n, zero) - shift)
            else:
                for u in range(k, k + rows):
                    value = kl.read(x, u * channels + c, n, zero) - shift
                    s, q = s + value, q + value * value
            if flags & kl.EXTREMA:
                kl.write(high, p, n, h)
                kl.write(low, p, n, w)
            kl.write(mean, p, n, s)
            kl.write(var, p, n, q)
    for c in range(begin, end, lanes):
        n, p = min(lanes, end - c), base + c
        row = kl.read(x, c, n, zero)
        s = kl.read(mean, p, n, zero)
        m = s * share
        v = (kl.read(var, p, n, zero) - s * m) * share
        kl.write(mean, p, n, kl.finite(row, zeros) + m)
        kl.write(var, p, n, kl.where_above(zeros, v, zeros, v))
        if not kl.all_equal(v - v, zeros):
            for u in range(n):
                if var[p + u] - var[p + u] != zero:
                    plane = kl.offset(x, c + u)
                    var[p + u] = kl.large_variance(plane, size, channels, mean[p + u])
        if flags & kl.EXTREMA:
            kl.write(first, p, n, row)
            if not kl.all_equal(s - s, zeros):
                for u in range(n):
                    if kl.has_nan(kl.offset(x, c + u), size, channels):
                        high[p + u] = low[p + u] = mean[p + u] - mean[p + u]
                        if flags & kl.POSITIONS:
                            at_high[p + u] = at_low[p + u] = 0


def plane_stats(block: Any) -> None:
    """F1."""
    table = kl.table_of(block)
    region = kl.region_of(table)
    while True:
        image, begin, end = kl.next_image(table, region)
        if image < 0:
            return
        gather(block, 0, image, begin, end)


@kl.helper
def write_rows(
    table: Any,
    gated: int,
    far: int,
    image: int,
    begin: int,
    end: int,
    z: Any,
    r: Any,
    y: Any,
    mu: Any,
    v: Any,
    a: Any,
    beta: Any,
) -> None:
    """relu(v (a (z - mu) + beta) + r) of some channels of an image; v [B, C], others [C].

    ``far``: whether what is read lies further away than in the caches.
    """
    channels, size, flags = table[kl.CHANNELS], table[kl.SIZE], table[kl.FLAGS]
    lanes = kl.lanes_of(z)
    group, ahead = _at_a_time(z), AHEAD // kl.bytes_of(z)
    zero = kl.number(z, 0)
    zeros = kl.every(z, zero)
    for k in range(0, size, group):
        rows = min(group, size - k)
        at = (image * size + k) * channels
        for c in range(begin, end, lanes):
            n = min(lanes, end - c)
            centre, slope = kl.read(mu, c, n, zero), kl.read(a, c, n, zero)
            start = kl.read(beta, c, n, zero)
            if gated:
                gate = kl.read(v, image * channels + c, n, zero)
                slope = gate * slope
                start = gate * start
            for u in range(rows):
                o = at + u * channels + c
                if far:
                    kl.prefetch(z, o + ahead)
                t = slope * (kl.read(z, o, n, zero) - centre) + start
                if flags & kl.RESIDUAL:
                    if far:
                        kl.prefetch(r, o + ahead)
                    t = t + kl.read(r, o, n, zero)
                t = kl.where_above(zeros, t, zeros, t)
                if flags & kl.STREAM and n >= lanes:
                    kl.stream(y, o, t)
                else:
                    if far:
                        kl.prefetch_to_write(y, o + ahead)
                    kl.write(y, o, n, t)


def affine_tail(block: Any) -> None:
    """F2."""
    table = kl.table_of(block)
    z, r, mu, v, a, beta, y = _F2(block)
    region = kl.region_of(table)
    while True:
        image, begin, end = kl.next_image(table, region)
        if image < 0:
            return
        gated = table[kl.FLAGS] & kl.GATED
        write_rows(table, gated, 1, image, begin, end, z, r, y, mu, v, a, beta)


def affine_tail_backward(block: Any) -> None:
    """B1. The sums are gathered in the outputs."""
    table = kl.table_of(block)
    channels, size, rectified = table[kl.CHANNELS], table[kl.SIZE], table[kl.FLAGS] & kl.RECTIFIED
    g, y, z, mu, d, sums, moments, a, beta = _B1(block)
    lanes = kl.lanes_of(block)
    group, ahead = _at_a_time(block), AHEAD // kl.bytes_of(block)
    zero = kl.number(block, 0)
    zeros = kl.every(block, zero)
    region = kl.region_of(table)
    while True:
        image, begin, end = kl.next_image(table, region)
        if image < 0:
            return
        base = image * channels
        for k in range(0, size, group):
            rows = min(group, size - k)
            at = (image * size + k) * channels
            for c in range(begin, end, lanes):
                n = min(lanes, end - c)
                centre = kl.read(mu, c, n, zero)
                slope = start = s = b = zeros
                if rectified:
                    slope, start = kl.read(a, c, n, zero), kl.read(beta, c, n, zero)
                if k > 0:
                    s = kl.read(sums, base + c, n, zero)
                    b = kl.read(moments, base + c, n, zero)
                for u in range(rows):
                    o = at + u * channels + c
                    kl.prefetch(g, o + ahead)
                    kl.prefetch(z, o + ahead)
                    v = kl.read(g, o, n, zero)
                    off = kl.read(z, o, n, zero) - centre
                    if rectified:
                        v = kl.where_at_most(slope * off + start, zeros, zeros, v)
                    else:
                        kl.prefetch(y, o + ahead)
                        kl.prefetch_to_write(d, o + ahead)
                        v = kl.where_at_most(kl.read(y, o, n, zero), zeros, zeros, v)
                        kl.write(d, o, n, v)
                    s = s + v
                    b = b + v * off
                kl.write(sums, base + c, n, s)
                kl.write(moments, base + c, n, b)


def stats_backward(block: Any) -> None:
    """B2. A spike that goes by value is taken out of ``s_i`` or ``s_j`` where it has fallen."""
    table = kl.table_of(block)
    channels, size, flags = table[kl.CHANNELS], table[kl.SIZE], table[kl.FLAGS]
    with_z, spikes = flags & kl.WITH_Z, flags & kl.WITH_SPIKES
    rectified, by_value = flags & kl.RECTIFIED, flags & kl.BY_VALUE
    d, z, mu, p_at, q_at, t_at, i_at, j_at, si_at, sj_at, dz, beta = _B2(block)
    zi_at, zj_at = _EXTREMA(block)
    lanes = kl.lanes_of(block)
    group, ahead = _at_a_time(block), AHEAD // kl.bytes_of(block)
    zero = kl.number(block, 0)
    zeros = kl.every(block, zero)
    region = kl.region_of(table)
    while True:
        image, begin, end = kl.next_image(table, region)
        if image < 0:
            return
        base = 0 if rectified else image * channels
        for k in range(0, size, group):
            rows = min(group, size - k)
            at = (image * size + k) * channels
            for c in range(begin, end, lanes):
                n, plane = min(lanes, end - c), base + c
                p = kl.read(p_at, plane, n, zero)
                q = t = centre = start = zi = zj = si = sj = zeros
                i = j = kl.every_position(block, -1)
                if with_z | rectified:
                    centre = kl.read(mu, c, n, zero)
                if rectified:
                    start = kl.read(beta, c, n, zero)
                if with_z:
                    q, t = kl.read(q_at, plane, n, zero), kl.read(t_at, plane, n, zero)
                if by_value:
                    zi, zj = kl.read(zi_at, plane, n, zero), kl.read(zj_at, plane, n, zero)
                elif spikes:
                    i = kl.load_positions(block, i_at, plane, n)
                    j = kl.load_positions(block, j_at, plane, n)
                if spikes:
                    si, sj = kl.read(si_at, plane, n, zero), kl.read(sj_at, plane, n, zero)
                for u in range(rows):
                    o = at + u * channels + c
                    kl.prefetch(d, o + ahead)
                    kl.prefetch_to_write(dz, o + ahead)
                    v = kl.read(d, o, n, zero)
                    value = off = zeros
                    if with_z | rectified | by_value:
                        kl.prefetch(z, o + ahead)
                        value = kl.read(z, o, n, zero)
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
                        here = kl.every_position(block, k + u)
                        v = v + kl.where_equal(i, here, si, zeros)
                        v = v + kl.where_equal(j, here, sj, zeros)
                    kl.write(dz, o, n, v)
                if by_value:
                    kl.write(si_at, plane, n, si)
                    kl.write(sj_at, plane, n, sj)
