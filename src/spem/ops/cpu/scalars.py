"""The scalar stages between the passes, over [B, C] and [C]; what numba compiles.

``spem.ops.formula`` says in torch operations what they compute, and with which names. Here the
maps' type is the compute dtype itself. Stages that sum over the images take one vector of channels
as a chunk, the others a few images.
"""

from typing import Any

from spem.ops.cpu.memory import (
    lanes_of,
    load_positions,
    next_chunk,
    number,
    numbers_at,
    positions_at,
    read,
    region_of,
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
    HIGH,
    LOW,
    MEAN,
    MOMENTS,
    SHARED,
    SIZE,
    STEP,
    VAR,
)
from spem.ops.cpu.vectors import (
    every,
    every_position,
    where_above,
    where_equal,
)


def channel_moments(block: Any) -> None:
    """mu = mean_b mean_b and var = mean_b (var_b + (mean_b - mu)^2)."""
    table = table_of(block)
    batch, channels = table[BATCH], table[CHANNELS]
    mean = numbers_at(block, table[ARGS])
    var = numbers_at(block, table[ARGS + 1])
    mu = numbers_at(block, table[ARGS + 2])
    out = numbers_at(block, table[ARGS + 3])
    lanes = lanes_of(block)
    zero = number(block, 0)
    share = every(block, number(block, 1) / number(block, batch))
    region = region_of(table)
    while True:
        c = next_chunk(table, region) * lanes
        if c < 0:
            return
        n = min(lanes, channels - c)
        s = every(block, zero)
        for b in range(batch):
            s = s + read(mean, b * channels + c, n, zero)
        centre = s * share
        s = every(block, zero)
        for b in range(batch):
            off = read(mean, b * channels + c, n, zero) - centre
            s = s + (read(var, b * channels + c, n, zero) + off * off)
        write(mu, c, n, centre)
        write(out, c, n, s * share)


def normalised(block: Any) -> None:
    """Statistics of x = a (z - mu) + beta; ``a`` = 0 takes position 0, ``a`` < 0 swaps extrema."""
    table = table_of(block)
    batch, channels, step, flags = table[BATCH], table[CHANNELS], table[STEP], table[FLAGS]
    a_at = numbers_at(block, table[ARGS])
    mu_at = numbers_at(block, table[ARGS + 1])
    beta_at = numbers_at(block, table[ARGS + 2])
    mean = numbers_at(block, table[ARGS + 3])
    var = numbers_at(block, table[ARGS + 4])
    high = numbers_at(block, table[ARGS + 5])
    low = numbers_at(block, table[ARGS + 6])
    first = numbers_at(block, table[ARGS + 7])
    at_high = positions_at(table[ARGS + 8])
    at_low = positions_at(table[ARGS + 9])
    mean_out = numbers_at(block, table[ARGS + 10])
    var_out = numbers_at(block, table[ARGS + 11])
    high_out = numbers_at(block, table[ARGS + 12])
    low_out = numbers_at(block, table[ARGS + 13])
    z_i_out = numbers_at(block, table[ARGS + 14])
    z_j_out = numbers_at(block, table[ARGS + 15])
    i_out = positions_at(table[ARGS + 16])
    j_out = positions_at(table[ARGS + 17])
    lanes = lanes_of(block)
    zero = number(block, 0)
    zeros = every(block, zero)
    start = every_position(block, 0)
    region = region_of(table)
    while True:
        chunk = next_chunk(table, region)
        if chunk < 0:
            return
        for b in range(chunk * step, min(batch, (chunk + 1) * step)):
            for c in range(0, channels, lanes):
                n = min(lanes, channels - c)
                p = b * channels + c
                a = read(a_at, c, n, zero)
                mu = read(mu_at, c, n, zero)
                beta = read(beta_at, c, n, zero)
                if flags & MOMENTS:
                    write(mean_out, p, n, a * (read(mean, p, n, zero) - mu) + beta)
                    write(var_out, p, n, a * a * read(var, p, n, zero))
                if flags & EXTREMA:
                    top = read(high, p, n, zero)
                    bottom = read(low, p, n, zero)
                    # A NaN if anything in the plane is not finite, also where a is 0.
                    origin = read(first, p, n, zero) + (zeros * top + zeros * bottom)
                    at_top = load_positions(block, at_high, p, n)
                    at_bottom = load_positions(block, at_low, p, n)
                    z_i = where_equal(a, zeros, origin, where_above(zeros, a, bottom, top))
                    z_j = where_equal(a, zeros, origin, where_above(zeros, a, top, bottom))
                    i = where_equal(a, zeros, start, where_above(zeros, a, at_bottom, at_top))
                    j = where_equal(a, zeros, start, where_above(zeros, a, at_top, at_bottom))
                    write(high_out, p, n, a * (z_i - mu) + beta)
                    write(low_out, p, n, a * (z_j - mu) + beta)
                    write(z_i_out, p, n, z_i)
                    write(z_j_out, p, n, z_j)
                    store_part(i_out, p, n, i)
                    store_part(j_out, p, n, j)


def gate_gradient(block: Any) -> None:
    """dv = a moment + beta total."""
    table = table_of(block)
    batch, channels, step = table[BATCH], table[CHANNELS], table[STEP]
    total_at = numbers_at(block, table[ARGS])
    moment_at = numbers_at(block, table[ARGS + 1])
    a_at = numbers_at(block, table[ARGS + 2])
    beta_at = numbers_at(block, table[ARGS + 3])
    out = numbers_at(block, table[ARGS + 4])
    lanes = lanes_of(block)
    zero = number(block, 0)
    region = region_of(table)
    while True:
        chunk = next_chunk(table, region)
        if chunk < 0:
            return
        for b in range(chunk * step, min(batch, (chunk + 1) * step)):
            for c in range(0, channels, lanes):
                n = min(lanes, channels - c)
                p = b * channels + c
                dv = read(a_at, c, n, zero) * read(moment_at, p, n, zero)
                write(out, p, n, dv + read(beta_at, c, n, zero) * read(total_at, p, n, zero))


def channel_sums(block: Any) -> None:
    """S0 = sum of dx over a channel, S1 = sum of dx (z - mu)."""
    table = table_of(block)
    batch, channels, flags = table[BATCH], table[CHANNELS], table[FLAGS]
    v_at = numbers_at(block, table[ARGS])
    total_at = numbers_at(block, table[ARGS + 1])
    moment_at = numbers_at(block, table[ARGS + 2])
    d_mean = numbers_at(block, table[ARGS + 3])
    d_var = numbers_at(block, table[ARGS + 4])
    d_high = numbers_at(block, table[ARGS + 5])
    d_low = numbers_at(block, table[ARGS + 6])
    mean = numbers_at(block, table[ARGS + 7])
    var = numbers_at(block, table[ARGS + 8])
    z_i = numbers_at(block, table[ARGS + 9])
    z_j = numbers_at(block, table[ARGS + 10])
    a_at = numbers_at(block, table[ARGS + 11])
    mu_at = numbers_at(block, table[ARGS + 12])
    out0 = numbers_at(block, table[ARGS + 13])
    out1 = numbers_at(block, table[ARGS + 14])
    lanes = lanes_of(block)
    zero = number(block, 0)
    region = region_of(table)
    while True:
        c = next_chunk(table, region) * lanes
        if c < 0:
            return
        n = min(lanes, channels - c)
        mu = read(mu_at, c, n, zero)
        a = read(a_at, c, n, zero)
        s0 = every(block, zero)
        s1 = every(block, zero)
        for b in range(batch):
            p = b * channels + c
            v = read(v_at, p, n, zero)
            dx = v * read(total_at, p, n, zero)
            dxz = v * read(moment_at, p, n, zero)
            if flags & MEAN:
                d = read(d_mean, p, n, zero)
                dx = dx + d
                dxz = dxz + d * (read(mean, p, n, zero) - mu)
            if flags & VAR:
                d = a * read(d_var, p, n, zero)
                dxz = dxz + (d + d) * read(var, p, n, zero)
            if flags & HIGH:
                d = read(d_high, p, n, zero)
                dx = dx + d
                dxz = dxz + d * (read(z_i, p, n, zero) - mu)
            if flags & LOW:
                d = read(d_low, p, n, zero)
                dx = dx + d
                dxz = dxz + d * (read(z_j, p, n, zero) - mu)
            s0 = s0 + dx
            s1 = s1 + dxz
        write(out0, c, n, s0)
        write(out1, c, n, s1)


def coefficients(block: Any) -> None:
    """The coefficients of dz; q and t are written if anything but the extrema enters them."""
    table = table_of(block)
    batch, channels, step, flags = table[BATCH], table[CHANNELS], table[STEP], table[FLAGS]
    v_at = numbers_at(block, table[ARGS])
    d_mean = numbers_at(block, table[ARGS + 1])
    d_var = numbers_at(block, table[ARGS + 2])
    d_high = numbers_at(block, table[ARGS + 3])
    d_low = numbers_at(block, table[ARGS + 4])
    mean = numbers_at(block, table[ARGS + 5])
    a_at = numbers_at(block, table[ARGS + 6])
    mu_at = numbers_at(block, table[ARGS + 7])
    shared0 = numbers_at(block, table[ARGS + 8])
    shared1 = numbers_at(block, table[ARGS + 9])
    p_out = numbers_at(block, table[ARGS + 10])
    q_out = numbers_at(block, table[ARGS + 11])
    t_out = numbers_at(block, table[ARGS + 12])
    si_out = numbers_at(block, table[ARGS + 13])
    sj_out = numbers_at(block, table[ARGS + 14])
    lanes = lanes_of(block)
    zero = number(block, 0)
    share = every(block, number(block, 1) / number(block, table[SIZE]))
    region = region_of(table)
    while True:
        chunk = next_chunk(table, region)
        if chunk < 0:
            return
        for b in range(chunk * step, min(batch, (chunk + 1) * step)):
            for c in range(0, channels, lanes):
                n = min(lanes, channels - c)
                p = b * channels + c
                a = read(a_at, c, n, zero)
                write(p_out, p, n, a * read(v_at, p, n, zero))
                q = every(block, zero)
                t = every(block, zero)
                if flags & MEAN:
                    q = read(d_mean, p, n, zero) * share
                if flags & VAR:
                    t = a * read(d_var, p, n, zero) * share
                    t = t + t
                    q = q - t * (read(mean, p, n, zero) - read(mu_at, c, n, zero))
                if flags & SHARED:
                    q = q - read(shared0, c, n, zero)
                    t = t - read(shared1, c, n, zero)
                if flags & (MEAN | VAR | SHARED):
                    write(q_out, p, n, a * q)
                    write(t_out, p, n, a * t)
                if flags & (HIGH | LOW):
                    si = every(block, zero)
                    sj = every(block, zero)
                    if flags & HIGH:
                        si = a * read(d_high, p, n, zero)
                    if flags & LOW:
                        sj = a * read(d_low, p, n, zero)
                    write(si_out, p, n, si)
                    write(sj_out, p, n, sj)
