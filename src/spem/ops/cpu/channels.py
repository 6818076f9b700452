"""The four passes over channels_last maps, row of channels by row; what numba compiles.

The same tables and results as in ``spem.ops.cpu.planes``. A chunk is a range of channels of one
image; its positions are visited in memory order, a few at a time, and what is gathered of them is
kept in the outputs, whose rows fit into the first cache.

What a pass that writes costs is decided by how memory is reached, not by what is computed: several
rows at a time, or stores whose lines were not asked for before, take two to four times as long as
one row after the other with every line asked for ahead of time.
"""

from typing import Any

from spem.ops.cpu.memory import (
    bytes_of,
    has_nan,
    lanes_of,
    large_variance,
    load_positions,
    map_at,
    next_chunk,
    number,
    numbers_at,
    offset,
    positions_at,
    prefetch,
    prefetch_to_write,
    read,
    region_of,
    store_part,
    table_of,
    write,
)
from spem.ops.cpu.table import (
    ARGS,
    BY_VALUE,
    CHANNELS,
    EXTREMA,
    FLAGS,
    POSITIONS,
    RECTIFIED,
    SIZE,
    STEP,
    WITH_SPIKES,
    WITH_Z,
)
from spem.ops.cpu.vectors import (
    every,
    every_position,
    helper,
    larger,
    smaller,
    where_above,
    where_at_most,
    where_equal,
    where_equal_bits,
)

GROUP = 8  # positions for which sums are held in registers where maps are only read
AHEAD = 4096  # bytes from what is worked on to what is asked for


@helper
def _at_a_time(block: Any) -> int:
    """Positions for which a pass that writes holds coefficients and sums in registers."""
    return max(1, 4 // bytes_of(block))


@helper
def _shift(row: Any, zeros: Any) -> Any:
    """The first position where it is finite, else 0."""
    return where_equal(row - row, zeros, row, zeros)


def plane_stats(block: Any) -> None:
    """F1. Sums are gathered in ``mean`` and ``var``, which are always there."""
    table = table_of(block)
    channels, size, step = table[CHANNELS], table[SIZE], table[STEP]
    parts = (channels + step - 1) // step
    z = map_at(block, table[ARGS])
    mean = numbers_at(block, table[ARGS + 1])
    var = numbers_at(block, table[ARGS + 2])
    high = numbers_at(block, table[ARGS + 3])
    low = numbers_at(block, table[ARGS + 4])
    first = numbers_at(block, table[ARGS + 5])
    at_high = positions_at(table[ARGS + 6])
    at_low = positions_at(table[ARGS + 7])
    flags = table[FLAGS]
    lanes = lanes_of(block)
    zero = number(block, 0)
    zeros = every(block, zero)
    share = every(block, number(block, 1) / number(block, size))
    full = (1 << lanes) - 1
    region = region_of(table)
    while True:
        chunk = next_chunk(table, region)
        if chunk < 0:
            return
        image = chunk // parts
        begin = (chunk - image * parts) * step
        end = min(begin + step, channels)
        x = offset(z, image * size * channels)
        base = image * channels
        for c in range(begin, end, lanes):
            n = min(lanes, end - c)
            row = read(x, c, n, zero)
            write(mean, base + c, n, zeros)
            write(var, base + c, n, zeros)
            if flags & EXTREMA:
                write(high, base + c, n, row)
                write(low, base + c, n, row)
                write(first, base + c, n, row)
            if flags & POSITIONS:
                store_part(at_high, base + c, n, every_position(block, 0))
                store_part(at_low, base + c, n, every_position(block, 0))
        for k in range(0, size, GROUP):
            rows = min(GROUP, size - k)
            for c in range(begin, end, lanes):
                n = min(lanes, end - c)
                p = base + c
                shift = _shift(read(x, c, n, zero), zeros)
                s = read(mean, p, n, zero)
                q = read(var, p, n, zero)
                if flags & POSITIONS:
                    h = read(high, p, n, zero)
                    w = read(low, p, n, zero)
                    i = load_positions(block, at_high, p, n)
                    j = load_positions(block, at_low, p, n)
                    for u in range(rows):
                        value = read(x, (k + u) * channels + c, n, zero)
                        here = every_position(block, k + u)
                        i = where_above(value, h, here, i)
                        j = where_above(w, value, here, j)
                        h = larger(value, h)
                        w = smaller(value, w)
                        value = value - shift
                        s = s + value
                        q = q + value * value
                    write(high, p, n, h)
                    write(low, p, n, w)
                    store_part(at_high, p, n, i)
                    store_part(at_low, p, n, j)
                elif flags & EXTREMA:
                    h = read(high, p, n, zero)
                    w = read(low, p, n, zero)
                    for u in range(rows):
                        value = read(x, (k + u) * channels + c, n, zero)
                        h = larger(value, h)
                        w = smaller(value, w)
                        value = value - shift
                        s = s + value
                        q = q + value * value
                    write(high, p, n, h)
                    write(low, p, n, w)
                else:
                    for u in range(rows):
                        value = read(x, (k + u) * channels + c, n, zero) - shift
                        s = s + value
                        q = q + value * value
                write(mean, p, n, s)
                write(var, p, n, q)
        for c in range(begin, end, lanes):
            n = min(lanes, end - c)
            p = base + c
            s = read(mean, p, n, zero)
            m = s * share
            v = (read(var, p, n, zero) - s * m) * share
            write(mean, p, n, _shift(read(x, c, n, zero), zeros) + m)
            write(var, p, n, where_above(zeros, v, zeros, v))
            if where_equal_bits(v - v, zeros) != full:
                for u in range(n):
                    if var[p + u] - var[p + u] != zero:
                        var[p + u] = large_variance(offset(x, c + u), size, channels, mean[p + u])
            if flags & EXTREMA and where_equal_bits(s - s, zeros) != full:
                for u in range(n):
                    if has_nan(offset(x, c + u), size, channels):
                        nan = mean[p + u] - mean[p + u]
                        high[p + u] = nan
                        low[p + u] = nan
                        if flags & POSITIONS:
                            at_high[p + u] = 0
                            at_low[p + u] = 0


def affine_tail(block: Any) -> None:
    """F2."""
    table = table_of(block)
    channels, size, step = table[CHANNELS], table[SIZE], table[STEP]
    rectified = table[FLAGS] & RECTIFIED
    parts = (channels + step - 1) // step
    z = map_at(block, table[ARGS])
    r = map_at(block, table[ARGS + 1])
    mu = numbers_at(block, table[ARGS + 2])
    v = numbers_at(block, table[ARGS + 3])
    a = numbers_at(block, table[ARGS + 4])
    beta = numbers_at(block, table[ARGS + 5])
    y = map_at(block, table[ARGS + 6])
    lanes = lanes_of(block)
    group, ahead = _at_a_time(block), AHEAD // bytes_of(block)
    zero = number(block, 0)
    zeros = every(block, zero)
    region = region_of(table)
    while True:
        chunk = next_chunk(table, region)
        if chunk < 0:
            return
        image = chunk // parts
        begin = (chunk - image * parts) * step
        end = min(begin + step, channels)
        base = image * channels
        for k in range(0, size, group):
            rows = min(group, size - k)
            at = (image * size + k) * channels
            for c in range(begin, end, lanes):
                n = min(lanes, end - c)
                centre = read(mu, c, n, zero)
                slope = read(a, c, n, zero)
                start = read(beta, c, n, zero)
                if not rectified:
                    gate = read(v, base + c, n, zero)
                    slope = gate * slope
                    start = gate * start
                for u in range(rows):
                    o = at + u * channels + c
                    prefetch(z, o + ahead)
                    prefetch_to_write(y, o + ahead)
                    t = slope * (read(z, o, n, zero) - centre) + start
                    if not rectified:
                        prefetch(r, o + ahead)
                        t = t + read(r, o, n, zero)
                    write(y, o, n, where_above(zeros, t, zeros, t))


def affine_tail_backward(block: Any) -> None:
    """B1. The sums are gathered in the outputs."""
    table = table_of(block)
    channels, size, step = table[CHANNELS], table[SIZE], table[STEP]
    rectified = table[FLAGS] & RECTIFIED
    parts = (channels + step - 1) // step
    g = map_at(block, table[ARGS])
    y = map_at(block, table[ARGS + 1])
    z = map_at(block, table[ARGS + 2])
    mu = numbers_at(block, table[ARGS + 3])
    d = map_at(block, table[ARGS + 4])
    sums = numbers_at(block, table[ARGS + 5])
    moments = numbers_at(block, table[ARGS + 6])
    a = numbers_at(block, table[ARGS + 7])
    beta = numbers_at(block, table[ARGS + 8])
    lanes = lanes_of(block)
    group, ahead = _at_a_time(block), AHEAD // bytes_of(block)
    zero = number(block, 0)
    zeros = every(block, zero)
    region = region_of(table)
    while True:
        chunk = next_chunk(table, region)
        if chunk < 0:
            return
        image = chunk // parts
        begin = (chunk - image * parts) * step
        end = min(begin + step, channels)
        base = image * channels
        for k in range(0, size, group):
            rows = min(group, size - k)
            at = (image * size + k) * channels
            for c in range(begin, end, lanes):
                n = min(lanes, end - c)
                centre = read(mu, c, n, zero)
                slope = start = s = b = zeros
                if rectified:
                    slope = read(a, c, n, zero)
                    start = read(beta, c, n, zero)
                if k > 0:
                    s = read(sums, base + c, n, zero)
                    b = read(moments, base + c, n, zero)
                for u in range(rows):
                    o = at + u * channels + c
                    prefetch(g, o + ahead)
                    prefetch(z, o + ahead)
                    v = read(g, o, n, zero)
                    off = read(z, o, n, zero) - centre
                    if rectified:
                        v = where_at_most(slope * off + start, zeros, zeros, v)
                    else:
                        prefetch(y, o + ahead)
                        prefetch_to_write(d, o + ahead)
                        v = where_at_most(read(y, o, n, zero), zeros, zeros, v)
                        write(d, o, n, v)
                    s = s + v
                    b = b + v * off
                write(sums, base + c, n, s)
                write(moments, base + c, n, b)


def stats_backward(block: Any) -> None:
    """B2. A spike that goes by value is taken out of ``s_i`` or ``s_j`` where it has fallen."""
    table = table_of(block)
    channels, size, step = table[CHANNELS], table[SIZE], table[STEP]
    parts = (channels + step - 1) // step
    d = map_at(block, table[ARGS])
    z = map_at(block, table[ARGS + 1])
    mu = numbers_at(block, table[ARGS + 2])
    p_at = numbers_at(block, table[ARGS + 3])
    q_at = numbers_at(block, table[ARGS + 4])
    t_at = numbers_at(block, table[ARGS + 5])
    i_at = positions_at(table[ARGS + 6])
    j_at = positions_at(table[ARGS + 7])
    zi_at = numbers_at(block, table[ARGS + 6])
    zj_at = numbers_at(block, table[ARGS + 7])
    si_at = numbers_at(block, table[ARGS + 8])
    sj_at = numbers_at(block, table[ARGS + 9])
    dz = map_at(block, table[ARGS + 10])
    beta = numbers_at(block, table[ARGS + 11])
    lanes = lanes_of(block)
    zero = number(block, 0)
    zeros = every(block, zero)
    nowhere = every_position(block, -1)
    with_z, spikes = table[FLAGS] & WITH_Z, table[FLAGS] & WITH_SPIKES
    rectified, by_value = table[FLAGS] & RECTIFIED, table[FLAGS] & BY_VALUE
    group, ahead = _at_a_time(block), AHEAD // bytes_of(block)
    region = region_of(table)
    while True:
        chunk = next_chunk(table, region)
        if chunk < 0:
            return
        image = chunk // parts
        begin = (chunk - image * parts) * step
        end = min(begin + step, channels)
        base = 0 if rectified else image * channels
        for k in range(0, size, group):
            rows = min(group, size - k)
            at = (image * size + k) * channels
            for c in range(begin, end, lanes):
                n = min(lanes, end - c)
                p = read(p_at, base + c, n, zero)
                q = t = centre = start = zi = zj = si = sj = zeros
                i = j = nowhere
                if with_z | rectified:
                    centre = read(mu, c, n, zero)
                if rectified:
                    start = read(beta, c, n, zero)
                if with_z:
                    q = read(q_at, base + c, n, zero)
                    t = read(t_at, base + c, n, zero)
                if spikes and not by_value:
                    i = load_positions(block, i_at, base + c, n)
                    j = load_positions(block, j_at, base + c, n)
                if by_value:
                    zi = read(zi_at, base + c, n, zero)
                    zj = read(zj_at, base + c, n, zero)
                if spikes:
                    si = read(si_at, base + c, n, zero)
                    sj = read(sj_at, base + c, n, zero)
                for u in range(rows):
                    o = at + u * channels + c
                    prefetch(d, o + ahead)
                    prefetch_to_write(dz, o + ahead)
                    v = read(d, o, n, zero)
                    value = off = zeros
                    if with_z | rectified | by_value:
                        prefetch(z, o + ahead)
                        value = read(z, o, n, zero)
                        off = value - centre
                    if rectified:
                        v = where_at_most(p * off + start, zeros, zeros, v)
                    v = p * v
                    if with_z:
                        v = t * off + (v + q)
                    if by_value:
                        v = v + where_equal(value, zi, si, zeros)
                        v = v + where_equal(value, zj, sj, zeros)
                        si = where_equal(value, zi, zeros, si)
                        sj = where_equal(value, zj, zeros, sj)
                    elif spikes:
                        here = every_position(block, k + u)
                        v = v + where_equal(i, here, si, zeros)
                        v = v + where_equal(j, here, sj, zeros)
                    write(dz, o, n, v)
                if by_value:
                    write(si_at, base + c, n, si)
                    write(sj_at, base + c, n, sj)
