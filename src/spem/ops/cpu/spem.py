"""SPEM's gate of the text form with a shared sum, and its gradients; what numba compiles.

Of [B, C] scalars the gate takes 30 of torch's operations and its gradients 54: on maps of 8 x 8
more time than all passes over the maps. A chunk is one vector of channels of all images.
"""

from typing import Any

from spem.ops.cpu.memory import (
    lanes_of,
    next_chunk,
    number,
    numbers_at,
    read,
    region_of,
    table_of,
    write,
)
from spem.ops.cpu.sigmoid import sigmoid
from spem.ops.cpu.table import ARGS, BATCH, CHANNELS
from spem.ops.cpu.vectors import every, total


def forward(block: Any) -> None:
    """v = s(e) R with e = w_e (lam M + (1 - lam) m) + b_e and R = s(w_r (M + m) + 2 b_r)."""
    table = table_of(block)
    batch, channels = table[BATCH], table[CHANNELS]
    lam_at = numbers_at(block, table[ARGS])
    high_at = numbers_at(block, table[ARGS + 1])
    low_at = numbers_at(block, table[ARGS + 2])
    w_e_at = numbers_at(block, table[ARGS + 3])
    b_e_at = numbers_at(block, table[ARGS + 4])
    w_r_at = numbers_at(block, table[ARGS + 5])
    b_r_at = numbers_at(block, table[ARGS + 6])
    excited_out = numbers_at(block, table[ARGS + 7])
    factor_out = numbers_at(block, table[ARGS + 8])
    out = numbers_at(block, table[ARGS + 9])
    lanes = lanes_of(block)
    zero = number(block, 0)
    to_high = every(block, lam_at[0])
    to_low = every(block, number(block, 1) - lam_at[0])
    region = region_of(table)
    while True:
        c = next_chunk(table, region) * lanes
        if c < 0:
            return
        n = min(lanes, channels - c)
        w_e, b_e = read(w_e_at, c, n, zero), read(b_e_at, c, n, zero)
        w_r, b_r = read(w_r_at, c, n, zero), read(b_r_at, c, n, zero)
        b_r = b_r + b_r
        for b in range(batch):
            p = b * channels + c
            high, low = read(high_at, p, n, zero), read(low_at, p, n, zero)
            excited = sigmoid(w_e * (to_high * high + to_low * low) + b_e)
            factor = sigmoid(w_r * (high + low) + b_r)
            write(excited_out, p, n, excited)
            write(factor_out, p, n, factor)
            write(out, p, n, excited * factor)


def backward(block: Any) -> None:
    """Gradients of the extrema, of the weights summed over images, and of lambda by channel."""
    table = table_of(block)
    batch, channels = table[BATCH], table[CHANNELS]
    grad_at = numbers_at(block, table[ARGS])
    lam_at = numbers_at(block, table[ARGS + 1])
    high_at = numbers_at(block, table[ARGS + 2])
    low_at = numbers_at(block, table[ARGS + 3])
    w_e_at = numbers_at(block, table[ARGS + 4])
    w_r_at = numbers_at(block, table[ARGS + 5])
    excited_at = numbers_at(block, table[ARGS + 6])
    factor_at = numbers_at(block, table[ARGS + 7])
    high_out = numbers_at(block, table[ARGS + 8])
    low_out = numbers_at(block, table[ARGS + 9])
    w_e_out = numbers_at(block, table[ARGS + 10])
    b_e_out = numbers_at(block, table[ARGS + 11])
    w_r_out = numbers_at(block, table[ARGS + 12])
    b_r_out = numbers_at(block, table[ARGS + 13])
    lam_out = numbers_at(block, table[ARGS + 14])
    lanes = lanes_of(block)
    zero, one = number(block, 0), number(block, 1)
    zeros, ones = every(block, zero), every(block, one)
    to_high, to_low = every(block, lam_at[0]), every(block, one - lam_at[0])
    region = region_of(table)
    while True:
        chunk = next_chunk(table, region)
        if chunk < 0:
            return
        c = chunk * lanes
        n = min(lanes, channels - c)
        w_e, w_r = read(w_e_at, c, n, zero), read(w_r_at, c, n, zero)
        d_w_e = d_b_e = d_w_r = d_b_r = d_lam = zeros
        for b in range(batch):
            p = b * channels + c
            high, low = read(high_at, p, n, zero), read(low_at, p, n, zero)
            excited, factor = read(excited_at, p, n, zero), read(factor_at, p, n, zero)
            dv = read(grad_at, p, n, zero) * excited * factor
            de, dr = dv * (ones - excited), dv * (ones - factor)
            du, shared = de * w_e, dr * w_r
            write(high_out, p, n, to_high * du + shared)
            write(low_out, p, n, to_low * du + shared)
            d_w_e = d_w_e + de * (to_high * high + to_low * low)
            d_b_e = d_b_e + de
            d_w_r = d_w_r + dr * (high + low)
            d_b_r = d_b_r + dr
            d_lam = d_lam + du * (high - low)
        write(w_e_out, c, n, d_w_e)
        write(b_e_out, c, n, d_b_e)
        write(w_r_out, c, n, d_w_r)
        write(b_r_out, c, n, d_b_r + d_b_r)
        lam_out[chunk] = total(d_lam)
