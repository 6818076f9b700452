"""The scalar stages between the passes, over [B, C] and [C]; what numba compiles.

``spem.ops.formula`` says in torch operations what they compute, and with which names. Here the
maps' type is the compute dtype itself. A chunk is one vector of channels of all images. Torch's
operations in their place make a training step of a ResNet-29 4 to 5 % longer.
"""

from typing import Any

from spem.ops.cpu import language as kl

_NORM, _RAW = kl.arguments("nnnnnnnnn"), kl.arguments("nnnnnpp", start=9)
_NORMAL, _NUMBERS = kl.arguments("nnnnnnpp", start=16), kl.arguments("bb", start=24)
_GATE, _SUMS, _INTO = kl.arguments("nnnnn"), kl.arguments("nnn"), kl.arguments("nnnn", start=3)
_OF_Z, _CONSTANTS = kl.arguments("nnnn", start=7), kl.arguments("nnn", start=11)
_OUT = kl.arguments("nnnnnnn", start=14)
_SPEM, _LAMBDA = kl.arguments("nnnnnnn"), kl.arguments("b", start=7)
_SPEM_OUT = kl.arguments("nnnnnnn", start=8)


@kl.helper
def _at_maximum(a: Any, zeros: Any, high: Any, low: Any, first: Any) -> Any:
    """What belongs to the maximum of a z: position 0 where a = 0, the minimum's where a < 0."""
    return kl.where_equal(a, zeros, first, kl.where_above(zeros, a, low, high))


@kl.helper
def extrema_of(a: Any, zeros: Any, high: Any, low: Any, first: Any) -> tuple[Any, Any]:
    """Where a z has its maximum and its minimum: z_i and z_j, from the extrema of z."""
    # A NaN if anything in the plane is not finite, also where a is 0.
    origin = first + (zeros * high + zeros * low)
    return _at_maximum(a, zeros, high, low, origin), _at_maximum(a, zeros, low, high, origin)


@kl.helper
def forward(block: Any, _image: int, c: int, end: int) -> None:
    """The norm of a batch, if its statistics are not given; then statistics of x.

    mu = mean_b mean_b and var = mean_b (var_b + (mean_b - mu)^2), x = a (z - mu) + beta.
    """
    table, n = kl.table_of(block), end - c
    batch, channels, flags = table[kl.BATCH], table[kl.CHANNELS], table[kl.FLAGS]
    weight, bias, running_mean, running_var, mu_at, var_at, rstd_at, a_at, beta_at = _NORM(block)
    mean, var, high, low, first, at_high, at_low = _RAW(block)
    mean_out, var_out, high_out, low_out, z_i_out, z_j_out, i_out, j_out = _NORMAL(block)
    eps, factor = _NUMBERS(block)
    zeros, ones = kl.every(block, 0), kl.every(block, 1)
    if flags & kl.SHARED:
        s = zeros
        share = ones / kl.every(block, batch)
        for p in range(c, batch * channels, channels):
            s = s + kl.read(mean, p, n)
        mu = s * share
        s = zeros
        for p in range(c, batch * channels, channels):
            off = kl.read(mean, p, n) - mu
            s = s + (kl.read(var, p, n) + off * off)
        spread = s * share
        rstd = ones / kl.root(spread + kl.every(block, eps))
        a, beta = rstd, zeros
        if flags & kl.WEIGHT:
            a = kl.read(weight, c, n) * rstd
        if flags & kl.BIAS:
            beta = kl.read(bias, c, n)
        if flags & kl.RUNNING:
            values, factors = kl.every(block, batch * table[kl.SIZE]), kl.every(block, factor)
            old = kl.read(running_mean, c, n)
            kl.write(running_mean, c, n, factors * (mu - old) + old)
            old = kl.read(running_var, c, n)
            unbiased = values / (values - ones)
            kl.write(running_var, c, n, factors * (spread * unbiased - old) + old)
        kl.write(mu_at, c, n, mu)
        kl.write(var_at, c, n, spread)
        kl.write(rstd_at, c, n, rstd)
        kl.write(a_at, c, n, a)
        kl.write(beta_at, c, n, beta)
    else:
        mu, a, beta = kl.read(mu_at, c, n), kl.read(a_at, c, n), kl.read(beta_at, c, n)
    if not flags & (kl.MOMENTS | kl.EXTREMA):
        return
    for p in range(c, batch * channels, channels):
        if flags & kl.MOMENTS:
            kl.write(mean_out, p, n, a * (kl.read(mean, p, n) - mu) + beta)
            kl.write(var_out, p, n, a * a * kl.read(var, p, n))
        if flags & kl.EXTREMA:
            top, bottom = kl.read(high, p, n), kl.read(low, p, n)
            z_i, z_j = extrema_of(a, zeros, top, bottom, kl.read(first, p, n))
            kl.write(high_out, p, n, a * (z_i - mu) + beta)
            kl.write(low_out, p, n, a * (z_j - mu) + beta)
            kl.write(z_i_out, p, n, z_i)
            kl.write(z_j_out, p, n, z_j)
        if flags & kl.POSITIONS:
            i, j, start = kl.read(at_high, p, n), kl.read(at_low, p, n), kl.every(at_high, 0)
            kl.write(i_out, p, n, _at_maximum(a, zeros, i, j, start))
            kl.write(j_out, p, n, _at_maximum(a, zeros, j, i, start))


@kl.helper
def gate_gradient(block: Any, _image: int, c: int, end: int) -> None:
    """dv = a moment + beta total."""
    table, n = kl.table_of(block), end - c
    total, moment, a_at, beta_at, out = _GATE(block)
    a, beta = kl.read(a_at, c, n), kl.read(beta_at, c, n)
    for p in range(c, table[kl.BATCH] * table[kl.CHANNELS], table[kl.CHANNELS]):
        kl.write(out, p, n, a * kl.read(moment, p, n) + beta * kl.read(total, p, n))


@kl.helper
def _with(dx: Any, dxz: Any, gradient: Any, place: Any, mu: Any, p: int, n: int) -> tuple[Any, Any]:
    """dx and dx (z - mu) with a gradient that falls on one place of each plane."""
    d = kl.read(gradient, p, n)
    return dx + d, dxz + d * (kl.read(place, p, n) - mu)


@kl.helper
def backward(block: Any, _image: int, c: int, end: int) -> None:
    """S0 = sum of dx over a channel, S1 = sum of dx (z - mu); then the coefficients of dz.

    q and t are written if anything but the extrema enters them. What is divided by the number of
    values is the sums, where the statistics are those of the batch. A tail without a gate
    (RECTIFIED) has q and t of channels.
    """
    table, n = kl.table_of(block), end - c
    batch, channels, flags = table[kl.BATCH], table[kl.CHANNELS], table[kl.FLAGS]
    v_at, total, moment = _SUMS(block)
    d_mean, d_var, d_high, d_low = _INTO(block)
    mean, var, z_i, z_j = _OF_Z(block)
    a_at, mu_at, rstd_at = _CONSTANTS(block)
    bias_out, weight_out, p_out, q_out, t_out, si_out, sj_out = _OUT(block)
    zeros, ones = kl.every(block, 0), kl.every(block, 1)
    share = ones / kl.every(block, table[kl.SIZE])
    mu, a, rstd = kl.read(mu_at, c, n), kl.read(a_at, c, n), kl.read(rstd_at, c, n)
    s0 = s1 = zeros
    if flags & kl.SUMS:
        for p in range(c, batch * channels, channels):
            dx, dxz = kl.read(total, p, n), kl.read(moment, p, n)
            if not flags & kl.RECTIFIED:
                v = kl.read(v_at, p, n)
                dx, dxz = v * dx, v * dxz
            if flags & kl.MEAN:
                dx, dxz = _with(dx, dxz, d_mean, mean, mu, p, n)
            if flags & kl.VAR:
                d = a * kl.read(d_var, p, n)
                dxz = dxz + (d + d) * kl.read(var, p, n)
            if flags & kl.HIGH:
                dx, dxz = _with(dx, dxz, d_high, z_i, mu, p, n)
            if flags & kl.LOW:
                dx, dxz = _with(dx, dxz, d_low, z_j, mu, p, n)
            s0, s1 = s0 + dx, s1 + dxz
        kl.write(bias_out, c, n, s0)
        kl.write(weight_out, c, n, rstd * s1)
        each = ones / kl.every(block, batch * table[kl.SIZE])
        s0, s1 = s0 * each, rstd * rstd * s1 * each
        if flags & kl.RECTIFIED:
            kl.write(q_out, c, n, zeros - a * s0)
            kl.write(t_out, c, n, zeros - a * s1)
    if not flags & kl.COEFFICIENTS:
        return
    for p in range(c, batch * channels, channels):
        kl.write(p_out, p, n, a * kl.read(v_at, p, n))
        q = t = zeros
        if flags & kl.MEAN:
            q = kl.read(d_mean, p, n) * share
        if flags & kl.VAR:
            t = a * kl.read(d_var, p, n) * share
            t = t + t
            q = q - t * (kl.read(mean, p, n) - mu)
        if flags & kl.SHARED:
            q, t = q - s0, t - s1
        if flags & (kl.MEAN | kl.VAR | kl.SHARED):
            kl.write(q_out, p, n, a * q)
            kl.write(t_out, p, n, a * t)
        if flags & (kl.HIGH | kl.LOW):
            si = sj = zeros
            if flags & kl.HIGH:
                si = a * kl.read(d_high, p, n)
            if flags & kl.LOW:
                sj = a * kl.read(d_low, p, n)
            kl.write(si_out, p, n, si)
            kl.write(sj_out, p, n, sj)


@kl.helper
def spem_parts(
    flags: int, mixed: Any, both: Any, w_e: Any, b_e: Any, w_r: Any, b_r: Any
) -> tuple[Any, Any, Any]:
    """What excitation takes, e, and the factor R, of the mixed extrema and their sum."""
    u = mixed
    if flags & kl.CODE:
        u = w_r * mixed + b_r
    return u, w_e * u + b_e, kl.sigmoid(w_r * both + (b_r + b_r))


@kl.helper
def spem_gate(block: Any, _image: int, c: int, end: int) -> None:
    """SPEM's gate v in its three forms; with SUMS the gradients that follow from dv instead.

    These are of maxima and minima, of the parameters, and of lambda for each channel.
    """
    table, n = kl.table_of(block), end - c
    batch, channels, flags = table[kl.BATCH], table[kl.CHANNELS], table[kl.FLAGS]
    high_at, low_at, w_e_at, b_e_at, w_r_at, b_r_at, v_at = _SPEM(block)
    d_high, d_low, d_w_e, d_b_e, d_w_r, d_b_r, d_lam = _SPEM_OUT(block)
    (lam,) = _LAMBDA(block)
    zeros, ones = kl.every(block, 0), kl.every(block, 1)
    of_high, of_low = kl.every(block, lam), kl.every(block, kl.number(block, 1) - lam)
    w_e, b_e = kl.read(w_e_at, c, n), kl.read(b_e_at, c, n)
    w_r, b_r = kl.read(w_r_at, c, n), kl.read(b_r_at, c, n)
    of_w_e = of_b_e = of_w_r = of_b_r = of_lam = zeros
    for p in range(c, batch * channels, channels):
        high, low = kl.read(high_at, p, n), kl.read(low_at, p, n)
        both, mixed = high + low, of_high * high + of_low * low
        u, e, factor = spem_parts(flags, mixed, both, w_e, b_e, w_r, b_r)
        s = kl.sigmoid(e * factor if flags & kl.FIGURE else e)
        if not flags & kl.SUMS:
            kl.write(v_at, p, n, s if flags & kl.FIGURE else s * factor)
            continue
        dv = kl.read(v_at, p, n)
        if flags & kl.FIGURE:
            inner = dv * s * (ones - s)
            de, df = inner * factor, inner * e
        else:
            de, df = dv * factor * s * (ones - s), dv * s
        dt = df * factor * (ones - factor)  # of w_r (M + m) + 2 b_r
        du = de * w_e
        of_w_e, of_b_e = of_w_e + de * u, of_b_e + de
        of_w_r, of_b_r = of_w_r + dt * both, of_b_r + (dt + dt)
        if flags & kl.CODE:
            of_w_r, of_b_r = of_w_r + du * mixed, of_b_r + du
            du = du * w_r
        of_lam = of_lam + du * (high - low)
        kl.write(d_high, p, n, of_high * du + dt * w_r)
        kl.write(d_low, p, n, of_low * du + dt * w_r)
    if flags & kl.SUMS:
        kl.write(d_w_e, c, n, of_w_e)
        kl.write(d_b_e, c, n, of_b_e)
        kl.write(d_w_r, c, n, of_w_r)
        kl.write(d_b_r, c, n, of_b_r)
        kl.write(d_lam, c, n, of_lam)
