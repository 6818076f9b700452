"""The scalar stages between the passes, over [B, C] and [C]; what numba compiles.

``spem.ops.formula`` says in torch operations what they compute, and with which names. Here the
maps' type is the compute dtype itself. A chunk is one vector of channels of all images, or a few
images.
"""

from typing import Any

from spem.ops.cpu.memory import (
    lanes_of,
    load_positions,
    next_chunk,
    number,
    number_of_bits,
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
    BIAS,
    CHANNELS,
    COEFFICIENTS,
    EXTREMA,
    FLAGS,
    GATED,
    HIGH,
    LOW,
    MEAN,
    MOMENTS,
    POSITIONS,
    RUNNING,
    SHARED,
    SIZE,
    STEP,
    SUMS,
    VAR,
    WEIGHT,
)
from spem.ops.cpu.vectors import (
    every,
    every_position,
    inverse_root,
    where_above,
    where_equal,
)


def forward(block: Any) -> None:
    """The norm of a batch, if its statistics are not given; then statistics of x.

    mu = mean_b mean_b and var = mean_b (var_b + (mean_b - mu)^2), x = a (z - mu) + beta. ``a`` = 0
    takes position 0, ``a`` < 0 swaps extrema.
    """
    table = table_of(block)
    batch, channels, flags = table[BATCH], table[CHANNELS], table[FLAGS]
    weight_at = numbers_at(block, table[ARGS])
    bias_at = numbers_at(block, table[ARGS + 1])
    running_mean = numbers_at(block, table[ARGS + 2])
    running_var = numbers_at(block, table[ARGS + 3])
    mu_at = numbers_at(block, table[ARGS + 4])
    var_at = numbers_at(block, table[ARGS + 5])
    rstd_at = numbers_at(block, table[ARGS + 6])
    a_at = numbers_at(block, table[ARGS + 7])
    beta_at = numbers_at(block, table[ARGS + 8])
    mean = numbers_at(block, table[ARGS + 9])
    var = numbers_at(block, table[ARGS + 10])
    high = numbers_at(block, table[ARGS + 11])
    low = numbers_at(block, table[ARGS + 12])
    first = numbers_at(block, table[ARGS + 13])
    at_high = positions_at(table[ARGS + 14])
    at_low = positions_at(table[ARGS + 15])
    mean_out = numbers_at(block, table[ARGS + 16])
    var_out = numbers_at(block, table[ARGS + 17])
    high_out = numbers_at(block, table[ARGS + 18])
    low_out = numbers_at(block, table[ARGS + 19])
    z_i_out = numbers_at(block, table[ARGS + 20])
    z_j_out = numbers_at(block, table[ARGS + 21])
    i_out = positions_at(table[ARGS + 22])
    j_out = positions_at(table[ARGS + 23])
    eps = every(block, number_of_bits(block, table[ARGS + 24]))
    factor = every(block, number_of_bits(block, table[ARGS + 25]))
    lanes = lanes_of(block)
    zero, one = number(block, 0), number(block, 1)
    zeros = every(block, zero)
    share = every(block, one / number(block, batch))
    values = number(block, batch * table[SIZE])
    unbiased = every(block, values / (values - one))
    start = every_position(block, 0)
    region = region_of(table)
    while True:
        c = next_chunk(table, region) * lanes
        if c < 0:
            return
        n = min(lanes, channels - c)
        if flags & SHARED:
            s = zeros
            for b in range(batch):
                s = s + read(mean, b * channels + c, n, zero)
            mu = s * share
            s = zeros
            for b in range(batch):
                off = read(mean, b * channels + c, n, zero) - mu
                s = s + (read(var, b * channels + c, n, zero) + off * off)
            spread = s * share
            rstd = inverse_root(spread + eps)
            a = rstd
            if flags & WEIGHT:
                a = read(weight_at, c, n, zero) * rstd
            beta = zeros
            if flags & BIAS:
                beta = read(bias_at, c, n, zero)
            if flags & RUNNING:
                old = read(running_mean, c, n, zero)
                write(running_mean, c, n, factor * (mu - old) + old)
                old = read(running_var, c, n, zero)
                write(running_var, c, n, factor * (spread * unbiased - old) + old)
            write(mu_at, c, n, mu)
            write(var_at, c, n, spread)
            write(rstd_at, c, n, rstd)
            write(a_at, c, n, a)
            write(beta_at, c, n, beta)
        else:
            mu = read(mu_at, c, n, zero)
            a = read(a_at, c, n, zero)
            beta = read(beta_at, c, n, zero)
        if not flags & (MOMENTS | EXTREMA):
            continue
        for b in range(batch):
            p = b * channels + c
            if flags & MOMENTS:
                write(mean_out, p, n, a * (read(mean, p, n, zero) - mu) + beta)
                write(var_out, p, n, a * a * read(var, p, n, zero))
            if flags & EXTREMA:
                top = read(high, p, n, zero)
                bottom = read(low, p, n, zero)
                # A NaN if anything in the plane is not finite, also where a is 0.
                origin = read(first, p, n, zero) + (zeros * top + zeros * bottom)
                z_i = where_equal(a, zeros, origin, where_above(zeros, a, bottom, top))
                z_j = where_equal(a, zeros, origin, where_above(zeros, a, top, bottom))
                write(high_out, p, n, a * (z_i - mu) + beta)
                write(low_out, p, n, a * (z_j - mu) + beta)
                write(z_i_out, p, n, z_i)
                write(z_j_out, p, n, z_j)
            if flags & POSITIONS:
                at_top = load_positions(block, at_high, p, n)
                at_bottom = load_positions(block, at_low, p, n)
                i = where_equal(a, zeros, start, where_above(zeros, a, at_bottom, at_top))
                j = where_equal(a, zeros, start, where_above(zeros, a, at_top, at_bottom))
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


def backward(block: Any) -> None:
    """S0 = sum of dx over a channel, S1 = sum of dx (z - mu); then the coefficients of dz.

    q and t are written if anything but the extrema enters them. What is divided by the number of
    values is the sums, where the statistics are those of the batch: of this one, or as given.
    """
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
    rstd_at = numbers_at(block, table[ARGS + 13])
    out0 = numbers_at(block, table[ARGS + 14])
    out1 = numbers_at(block, table[ARGS + 15])
    weight_out = numbers_at(block, table[ARGS + 16])
    p_out = numbers_at(block, table[ARGS + 17])
    q_out = numbers_at(block, table[ARGS + 18])
    t_out = numbers_at(block, table[ARGS + 19])
    si_out = numbers_at(block, table[ARGS + 20])
    sj_out = numbers_at(block, table[ARGS + 21])
    lanes = lanes_of(block)
    zero, one = number(block, 0), number(block, 1)
    zeros, ones = every(block, zero), every(block, one)
    share = every(block, one / number(block, table[SIZE]))
    each = every(block, one / number(block, batch * table[SIZE]))
    region = region_of(table)
    while True:
        c = next_chunk(table, region) * lanes
        if c < 0:
            return
        n = min(lanes, channels - c)
        mu = read(mu_at, c, n, zero)
        a = read(a_at, c, n, zero)
        rstd = read(rstd_at, c, n, zero)
        s0 = zeros
        s1 = zeros
        if flags & SUMS:
            for b in range(batch):
                p = b * channels + c
                v = ones
                if flags & GATED:
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
            write(weight_out, c, n, rstd * s1)
            s0 = s0 * each
            s1 = rstd * rstd * s1 * each
            if not flags & GATED:
                write(q_out, c, n, zeros - a * s0)
                write(t_out, c, n, zeros - a * s1)
        elif flags & SHARED:
            s0 = read(out0, c, n, zero)
            s1 = read(out1, c, n, zero)
        if not flags & COEFFICIENTS:
            continue
        for b in range(batch):
            p = b * channels + c
            write(p_out, p, n, a * read(v_at, p, n, zero))
            q = zeros
            t = zeros
            if flags & MEAN:
                q = read(d_mean, p, n, zero) * share
            if flags & VAR:
                t = a * read(d_var, p, n, zero) * share
                t = t + t
                q = q - t * (read(mean, p, n, zero) - mu)
            if flags & SHARED:
                q = q - s0
                t = t - s1
            if flags & (MEAN | VAR | SHARED):
                write(q_out, p, n, a * q)
                write(t_out, p, n, a * t)
            if flags & (HIGH | LOW):
                si = zeros
                sj = zeros
                if flags & HIGH:
                    si = a * read(d_high, p, n, zero)
                if flags & LOW:
                    sj = a * read(d_low, p, n, zero)
                write(si_out, p, n, si)
                write(sj_out, p, n, sj)
