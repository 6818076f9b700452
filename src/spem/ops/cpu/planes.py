"""The four passes over contiguous maps, plane by plane; what numba compiles.

``block`` is a table of int64 (``spem.ops.cpu.table``), typed as a pointer to the map's elements.
Several threads run a kernel on one table: each takes chunks of planes until none is left. What a
plane gives depends on neither the chunks nor the threads. The passes themselves are defined, in
torch operations, in ``spem.ops.formula``.
"""

from typing import Any

from spem.ops.cpu.memory import (
    element,
    has_nan,
    lanes_of,
    large_variance,
    load,
    load_part,
    map_at,
    next_chunk,
    number,
    numbers_at,
    offset,
    positions_at,
    read,
    region_of,
    set_element,
    store,
    store_part,
    table_of,
    write,
)
from spem.ops.cpu.table import (
    ARGS,
    BATCH,
    CHANNELS,
    EXTREMA,
    FLAGS,
    MOMENTS,
    RECTIFIED,
    SIZE,
    STEP,
    WITH_SPIKES,
    WITH_Z,
)
from spem.ops.cpu.vectors import (
    every,
    helper,
    highest,
    larger,
    lowest,
    lowest_bit,
    smaller,
    total,
    where_above,
    where_at_most,
    where_equal_bits,
)


@helper
def _first_equal(x: Any, size: int, value: Any) -> int:
    """The first position of the value in a plane that has it.

    Four vectors at a time: a branch for each would be mispredicted on most small planes.
    """
    lanes = lanes_of(x)
    wanted = every(x, value)
    k = 0
    while k + 4 * lanes <= size:
        bits = where_equal_bits(load(x, k), wanted)
        for u in range(1, 4):
            bits |= where_equal_bits(load(x, k + u * lanes), wanted) << u * lanes
        if bits != 0:
            return k + lowest_bit(bits)
        k += 4 * lanes
    # What is behind the end counts as equal, hence is never the first.
    bits = 0
    for u in range(4):
        n = min(max(size - k - u * lanes, 0), lanes)
        bits |= where_equal_bits(load_part(x, k + u * lanes, n, value), wanted) << u * lanes
    return min(k + lowest_bit(bits), size - 1)


def plane_stats(block: Any) -> None:
    """F1. The sums say for free whether a plane may hold a NaN, which no maximum would show."""
    table = table_of(block)
    planes, size, step = table[BATCH] * table[CHANNELS], table[SIZE], table[STEP]
    flags = table[FLAGS]
    z = map_at(block, table[ARGS])
    mean = numbers_at(block, table[ARGS + 1])
    var = numbers_at(block, table[ARGS + 2])
    high = numbers_at(block, table[ARGS + 3])
    low = numbers_at(block, table[ARGS + 4])
    first = numbers_at(block, table[ARGS + 5])
    at_high = positions_at(table[ARGS + 6])
    at_low = positions_at(table[ARGS + 7])
    lanes = lanes_of(block)
    zero = number(block, 0)
    share = number(block, 1) / number(block, size)
    region = region_of(table)
    while True:
        chunk = next_chunk(table, region)
        if chunk < 0:
            return
        for p in range(chunk * step, min(planes, (chunk + 1) * step)):
            x = offset(z, p * size)
            z0 = element(x, 0)
            shift = z0 if z0 - z0 == zero else zero
            shifts = every(block, shift)
            h0 = h1 = l0 = l1 = every(block, z0)
            s0 = s1 = q0 = q1 = every(block, zero)
            k = 0
            if not flags & MOMENTS:
                # The sum of the values also shows whether one of them is not finite.
                while k + 2 * lanes <= size:
                    a = load(x, k)
                    b = load(x, k + lanes)
                    h0 = larger(a, h0)
                    h1 = larger(b, h1)
                    l0 = smaller(a, l0)
                    l1 = smaller(b, l1)
                    s0 = s0 + a
                    s1 = s1 + b
                    k += 2 * lanes
            while k + 2 * lanes <= size:
                a = load(x, k)
                b = load(x, k + lanes)
                h0 = larger(a, h0)
                h1 = larger(b, h1)
                l0 = smaller(a, l0)
                l1 = smaller(b, l1)
                a = a - shifts
                b = b - shifts
                s0 = s0 + a
                s1 = s1 + b
                q0 = q0 + a * a
                q1 = q1 + b * b
                k += 2 * lanes
            while k < size:
                # The plane's own first value changes none of the results.
                a = load_part(x, k, min(size - k, lanes), z0)
                h0 = larger(a, h0)
                l0 = smaller(a, l0)
                a = a - shifts
                s0 = s0 + a
                q0 = q0 + a * a
                k += lanes
            s = total(s0 + s1)
            if flags & MOMENTS:
                m = s * share
                v = (total(q0 + q1) - s * m) * share
                v = zero if v < zero else v
                mean[p] = shift + m
                var[p] = v if v - v == zero else large_variance(x, size, 1, shift + m)
            if flags & EXTREMA:
                top = highest(larger(h0, h1))
                bottom = lowest(smaller(l0, l1))
                nan = s - s != zero and has_nan(x, size, 1)
                if nan:
                    top = bottom = s - s
                first[p] = z0
                at_high[p] = 0 if nan else _first_equal(x, size, top)
                at_low[p] = 0 if nan else _first_equal(x, size, bottom)
                high[p] = top
                low[p] = bottom


def affine_tail(block: Any) -> None:
    """F2."""
    table = table_of(block)
    planes, size, step = table[BATCH] * table[CHANNELS], table[SIZE], table[STEP]
    channels, rectified = table[CHANNELS], table[FLAGS] & RECTIFIED
    z = map_at(block, table[ARGS])
    r = map_at(block, table[ARGS + 1])
    mu = numbers_at(block, table[ARGS + 2])
    v = numbers_at(block, table[ARGS + 3])
    a = numbers_at(block, table[ARGS + 4])
    beta = numbers_at(block, table[ARGS + 5])
    y = map_at(block, table[ARGS + 6])
    lanes = lanes_of(block)
    zero = number(block, 0)
    zeros = every(block, zero)
    region = region_of(table)
    while True:
        chunk = next_chunk(table, region)
        if chunk < 0:
            return
        c = chunk * step % channels
        for p in range(chunk * step, min(planes, (chunk + 1) * step)):
            zp = offset(z, p * size)
            rp = offset(r, p * size)
            yp = offset(y, p * size)
            centre = every(block, mu[c])
            slope = every(block, a[c])
            start = every(block, beta[c])
            if not rectified:
                slope = every(block, v[p] * a[c])
                start = every(block, v[p] * beta[c])
            k = 0
            while k + lanes <= size:
                t = slope * (load(zp, k) - centre) + start
                if not rectified:
                    t = t + load(rp, k)
                store(yp, k, where_above(zeros, t, zeros, t))
                k += lanes
            if k < size:
                n = size - k
                t = slope * (load_part(zp, k, n, zero) - centre) + start
                if not rectified:
                    t = t + load_part(rp, k, n, zero)
                store_part(yp, k, n, where_above(zeros, t, zeros, t))
            c = c + 1 if c + 1 < channels else 0


def affine_tail_backward(block: Any) -> None:
    """B1."""
    table = table_of(block)
    planes, size, step = table[BATCH] * table[CHANNELS], table[SIZE], table[STEP]
    channels, rectified = table[CHANNELS], table[FLAGS] & RECTIFIED
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
    zero = number(block, 0)
    zeros = every(block, zero)
    region = region_of(table)
    while True:
        chunk = next_chunk(table, region)
        if chunk < 0:
            return
        c = chunk * step % channels
        for p in range(chunk * step, min(planes, (chunk + 1) * step)):
            gp = offset(g, p * size)
            yp = offset(y, p * size)
            zp = offset(z, p * size)
            dp = offset(d, p * size)
            centre = every(block, mu[c])
            s0 = s1 = b0 = b1 = zeros
            k = 0
            if rectified:
                slope = every(block, a[c])
                start = every(block, beta[c])
                while k < size:
                    n = min(size - k, lanes)
                    off = read(zp, k, n, zero) - centre
                    v = read(gp, k, n, zero)  # 0 behind the end
                    v = where_at_most(slope * off + start, zeros, zeros, v)
                    s0 = s0 + v
                    b0 = b0 + v * off
                    k += lanes
            while k + 2 * lanes <= size:
                v = where_at_most(load(yp, k), zeros, zeros, load(gp, k))
                w = where_at_most(load(yp, k + lanes), zeros, zeros, load(gp, k + lanes))
                store(dp, k, v)
                store(dp, k + lanes, w)
                s0 = s0 + v
                s1 = s1 + w
                b0 = b0 + v * (load(zp, k) - centre)
                b1 = b1 + w * (load(zp, k + lanes) - centre)
                k += 2 * lanes
            while k < size:
                n = min(size - k, lanes)
                v = load_part(gp, k, n, zero)
                v = where_at_most(load_part(yp, k, n, zero), zeros, zeros, v)
                store_part(dp, k, n, v)
                s0 = s0 + v
                b0 = b0 + v * (load_part(zp, k, n, zero) - centre)
                k += lanes
            sums[p] = total(s0 + s1)
            moments[p] = total(b0 + b1)
            c = c + 1 if c + 1 < channels else 0


def stats_backward(block: Any) -> None:
    """B2."""
    table = table_of(block)
    planes, size, step = table[BATCH] * table[CHANNELS], table[SIZE], table[STEP]
    channels = table[CHANNELS]
    with_z, spikes = table[FLAGS] & WITH_Z, table[FLAGS] & WITH_SPIKES
    d = map_at(block, table[ARGS])
    z = map_at(block, table[ARGS + 1])
    mu = numbers_at(block, table[ARGS + 2])
    p_at = numbers_at(block, table[ARGS + 3])
    q_at = numbers_at(block, table[ARGS + 4])
    t_at = numbers_at(block, table[ARGS + 5])
    i_at = positions_at(table[ARGS + 6])
    j_at = positions_at(table[ARGS + 7])
    si_at = numbers_at(block, table[ARGS + 8])
    sj_at = numbers_at(block, table[ARGS + 9])
    dz = map_at(block, table[ARGS + 10])
    beta = numbers_at(block, table[ARGS + 11])
    lanes = lanes_of(block)
    rectified = table[FLAGS] & RECTIFIED
    zero = number(block, 0)
    zeros = every(block, zero)
    region = region_of(table)
    while True:
        chunk = next_chunk(table, region)
        if chunk < 0:
            return
        c = chunk * step % channels
        for plane in range(chunk * step, min(planes, (chunk + 1) * step)):
            dp = offset(d, plane * size)
            zp = offset(z, plane * size)
            out = offset(dz, plane * size)
            at = c if rectified else plane
            p = p_at[at]
            ps = every(block, p)
            q = t = centre = zero
            k = 0
            if rectified:
                starts, centres = every(block, beta[c]), every(block, mu[c])
                qs = ts = zeros
                if with_z:
                    qs, ts = every(block, q_at[c]), every(block, t_at[c])
                while k < size:
                    n = min(size - k, lanes)
                    off = read(zp, k, n, zero) - centres
                    v = where_at_most(ps * off + starts, zeros, zeros, read(dp, k, n, zero))
                    write(out, k, n, ts * off + (ps * v + qs))
                    k += lanes
            elif with_z:
                q, t, centre = q_at[plane], t_at[plane], mu[c]
                qs, ts, centres = every(block, q), every(block, t), every(block, centre)
                while k + lanes <= size:
                    store(out, k, ts * (load(zp, k) - centres) + (ps * load(dp, k) + qs))
                    k += lanes
                if k < size:
                    n = size - k
                    v = ps * load_part(dp, k, n, zero) + qs
                    store_part(out, k, n, ts * (load_part(zp, k, n, zero) - centres) + v)
            else:
                while k + lanes <= size:
                    store(out, k, ps * load(dp, k))
                    k += lanes
                if k < size:
                    store_part(out, k, size - k, ps * load_part(dp, k, size - k, zero))
            if spikes:
                # Again from the maps, not from what was stored: that may be rounded.
                i, j = i_at[plane], j_at[plane]
                v = p * element(dp, i)
                w = p * element(dp, j)
                if with_z:
                    v = t * (element(zp, i) - centre) + (v + q)
                    w = t * (element(zp, j) - centre) + (w + q)
                if i == j:
                    v = v + sj_at[plane]
                v = v + si_at[plane]
                set_element(out, j, w + sj_at[plane])
                set_element(out, i, v)
            c = c + 1 if c + 1 < channels else 0
