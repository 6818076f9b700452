"""The tail in inference: statistics, gate and result of a few channels at a time.

No gradient is recorded and the norm is constant, so nothing has to be kept, and what a thread has
just read is still in its cache when it writes. One kernel does all three steps, or any of them:

- a gate that takes each channel for itself (SPEM) follows the statistics of some channels at once;
- one that mixes the channels of an image (SE, ECA) follows when a thread has all of the image, or
  in a second run where the threads share an image;
- any other gate is run by torch, between two runs.

The parameters are read where they are, at each call: nothing is kept that could go stale.
"""

import array
import struct
from collections.abc import Collection
from functools import lru_cache
from typing import Any

import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from torch import Tensor

from spem.ops.cpu.launch import address_of
from spem.ops.cpu.memory import (
    element,
    has_nan,
    lanes_of,
    load,
    load_part,
    map_at,
    narrow,
    next_chunk,
    number,
    numbers_at,
    offset,
    read,
    region_of,
    store,
    store_part,
    table_of,
    write,
)
from spem.ops.cpu.sigmoid import sigmoid
from spem.ops.cpu.table import (
    ARGS,
    BATCH,
    CHANNELS,
    CHUNKS,
    COUNTERS,
    FLAGS,
    LINE,
    SIZE,
    STEP,
)
from spem.ops.cpu.vectors import (
    BYTES,
    compiled_inline,
    every,
    fused,
    helper,
    highest,
    larger,
    llvm_type,
    lowest,
    smaller,
    total,
    where_above,
    where_equal,
    where_equal_bits,
)
from spem.ops.formula import Norm
from spem.ops.inference import CompiledGate
from spem.ops.stats import compute_dtype
from spem.ops.threads import launch as run_on_threads

# Flags: the statistics that are gathered, the steps of a run, the gate that is computed.
MEAN, VAR, EXTREMA = 1, 2, 4
COLLECT, GATE, WRITE = 8, 16, 32
TEXT, CODE, FIGURE, ECA, SE = 64, 128, 256, 512, 1024
STREAM = 2048  # the result is written past the caches
NARROW = 4096  # parameters have the dtype of the map, and not the wider one of numbers
SPEM = TEXT | CODE | FIGURE
MIXING = ECA | SE
# Places behind ARGS: addresses of maps, of the norm's tensors (0: none), of rows of scalars [B, C],
# of the numbers (eps and lambda), of the gate's tensors, the width of SE's hidden layer, and the
# address of alpha.
Z, R, Y, WEIGHT, BIAS, MU, SIGMA, HIGH_AT, LOW_AT, MEAN_AT, VAR_AT, V_AT, ROWS, NUMBERS = range(
    ARGS, ARGS + 14
)
W0, W1, W2, W3, P, HIDDEN, WIDTH, ALPHA = range(ARGS + 14, ARGS + 22)
TINY = float(torch.finfo(torch.float32).tiny)
# Rows of scratch memory, [B, C] each: the plane's first value, al and be of the last
# pass, sums.
FIRST, AL, BE, MEANS, HIGHS, LOWS, GATES, SUM = range(8)
ROWS_KEPT = 8
LINES = 4  # of 64 bytes in a vector: 64 channels, or 32 in double precision
GROUP = 8  # positions for which sums are held in registers


@compiled_inline
def _root(context: Any, vector: Any) -> Any:
    """The square root of every lane."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = args[0].type
        name = f"llvm.sqrt.v{vector.lanes}f{vector.element.bitwidth}"
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(kind, [kind]), name
        )
        return builder.call(function, [args[0]])

    return vector(vector), emit


@compiled_inline
def _inverse(context: Any, vector: Any) -> Any:
    """1 over every lane."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        one = ir.Constant(args[0].type, [1.0] * vector.lanes)
        return builder.fdiv(one, args[0])

    return vector(vector), emit


@compiled_inline
def _stream(context: Any, pointer: Any, index: Any, value: Any) -> Any:
    """Stores all lanes past the caches; their address is a multiple of 64."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        raw = narrow(builder, args[2], pointer)
        place = builder.gep(args[0], [args[1]], source_etype=llvm_type(pointer.dtype))
        place = builder.bitcast(place, raw.type.as_pointer())
        instruction = builder.store(raw, place, align=64)
        instruction.set_metadata(
            "nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
        )
        return context.get_dummy_value()

    return types.void(pointer, types.int64, value), emit


@helper
def _row(block: Any, table: Any, which: int) -> Any:
    rows = numbers_at(block, table[ROWS])
    return offset(rows, which * table[BATCH] * table[CHANNELS])


@helper
def _parameters(block: Any, table: Any, address: int, c: int, n: int, fill: Any) -> Any:
    """Parameters c to c + n of a tensor."""
    if table[FLAGS] & NARROW:
        return read(map_at(block, address), c, n, fill)
    return read(numbers_at(block, address), c, n, fill)


@helper
def _parameter(block: Any, table: Any, address: int, k: int) -> Any:
    """One parameter."""
    if table[FLAGS] & NARROW:
        return element(map_at(block, address), k)
    return element(numbers_at(block, address), k)


@helper
def _slope(block: Any, table: Any, c: int, n: int) -> Any:
    """a = gamma / sqrt(var + eps) of the channels from c on; 1 without a norm."""
    zero, one = number(block, 0), number(block, 1)
    if table[SIGMA] == 0:
        return every(block, one)
    eps = every(block, numbers_at(block, table[NUMBERS])[0])
    a = _inverse(_root(_parameters(block, table, table[SIGMA], c, n, one) + eps))
    if table[WEIGHT] == 0:
        return a
    return a * _parameters(block, table, table[WEIGHT], c, n, zero)


@helper
def _optional(block: Any, table: Any, address: int, c: int, n: int) -> Any:
    """The numbers from c on; zeros where there are none."""
    zero = number(block, 0)
    if address == 0:
        return every(block, zero)
    return _parameters(block, table, address, c, n, zero)


@helper
def _shift(row: Any, zeros: Any) -> Any:
    """The first position where it is finite, else 0."""
    return where_equal(row - row, zeros, row, zeros)


@helper
def _collect_channels(block: Any, table: Any, x: Any, base: int, begin: int, end: int) -> None:
    """Raw statistics of channels begin to end of a channels_last image, in memory order."""
    channels, size, flags = table[CHANNELS], table[SIZE], table[FLAGS]
    mean, var = numbers_at(block, table[MEAN_AT]), numbers_at(block, table[VAR_AT])
    high, low = numbers_at(block, table[HIGH_AT]), numbers_at(block, table[LOW_AT])
    # Sums that show whether a value is not finite; the mean's own where it is wanted.
    sums = mean if flags & MEAN else _row(block, table, SUM)
    lanes = lanes_of(block)
    zero = number(block, 0)
    zeros = every(block, zero)
    share = every(block, number(block, 1) / number(block, size))
    root = _root(share)
    for k in range(0, size, GROUP):
        count = min(GROUP, size - k)
        for c in range(begin, end, lanes):
            n = min(lanes, end - c)
            p = base + c
            shift = h = w = s = q = zeros
            if k == 0:
                h = w = read(x, c, n, zero)
                if flags & (MEAN | VAR):
                    shift = _shift(h, zeros)
            else:
                s = read(sums, p, n, zero)
                if flags & EXTREMA:
                    h, w = read(high, p, n, zero), read(low, p, n, zero)
                if flags & VAR:
                    q = read(var, p, n, zero)
                if flags & (MEAN | VAR):
                    shift = _shift(read(x, c, n, zero), zeros)
            if flags & EXTREMA and not flags & (MEAN | VAR):
                for u in range(k, k + count):
                    value = read(x, u * channels + c, n, zero)
                    h = larger(value, h)
                    w = smaller(value, w)
                    s = s + value
            elif flags & (EXTREMA | VAR):
                for u in range(k, k + count):
                    value = read(x, u * channels + c, n, zero)
                    h = larger(value, h)
                    w = smaller(value, w)
                    value = value - shift
                    s = s + value
                    value = value * root  # the sum is the variance at most, and does not overflow
                    q = q + value * value
            else:
                for u in range(k, k + count):
                    s = s + (read(x, u * channels + c, n, zero) - shift)
            write(sums, p, n, s)
            if flags & EXTREMA:
                write(high, p, n, h)
                write(low, p, n, w)
            if flags & VAR:
                write(var, p, n, q)
    ones = every(block, number(block, 1))
    for c in range(begin, end, lanes):
        n = min(lanes, end - c)
        p = base + c
        row = read(x, c, n, zero)
        s = read(sums, p, n, zero)
        m = s * share
        if flags & MEAN:
            write(mean, p, n, _shift(row, zeros) + m)
        if flags & VAR:
            v = read(var, p, n, zero) - m * m
            write(var, p, n, where_above(zeros, v, zeros, v))
        if flags & EXTREMA:
            write(_row(block, table, FIRST), p, n, row)
            if where_equal_bits(where_equal(s - s, zeros, zeros, ones), ones) != 0:
                for u in range(n):
                    if has_nan(offset(x, c + u), size, channels):
                        high[p + u] = low[p + u] = zero / zero


@helper
def _collect_planes(block: Any, table: Any, x: Any, p: int, n: int) -> None:
    """Raw statistics of n neighbouring planes."""
    size, flags = table[SIZE], table[FLAGS]
    mean, var = numbers_at(block, table[MEAN_AT]), numbers_at(block, table[VAR_AT])
    high, low = numbers_at(block, table[HIGH_AT]), numbers_at(block, table[LOW_AT])
    first = _row(block, table, FIRST)
    lanes = lanes_of(block)
    zero = number(block, 0)
    zeros = every(block, zero)
    share = number(block, 1) / number(block, size)
    root = _root(every(block, share))
    for u in range(n):
        plane = offset(x, u * size)
        z0 = element(plane, 0)
        h = w = every(block, z0)
        s = q = zeros
        k = 0
        if flags & EXTREMA and not flags & (MEAN | VAR):
            while k + lanes <= size:
                value = load(plane, k)
                h = larger(value, h)
                w = smaller(value, w)
                s = s + value
                k += lanes
            if k < size:
                value = load_part(plane, k, size - k, z0)
                h = larger(value, h)
                w = smaller(value, w)
                s = s + value
        else:
            shift = z0 if z0 - z0 == zero else zero
            shifts = every(block, shift)
            if flags & (EXTREMA | VAR):
                while k < size:
                    # The plane's own first value changes none of the results.
                    value = read(plane, k, size - k, z0)
                    h = larger(value, h)
                    w = smaller(value, w)
                    value = value - shifts
                    s = s + value
                    value = value * root
                    q = q + value * value
                    k += lanes
            else:
                while k + lanes <= size:
                    s = s + (load(plane, k) - shifts)
                    k += lanes
                if k < size:
                    s = s + (load_part(plane, k, size - k, shift) - shifts)
            m = total(s) * share
            if flags & MEAN:
                mean[p + u] = shift + m
            if flags & VAR:
                v = total(q) - m * m
                var[p + u] = zero if v < zero else v
        if flags & EXTREMA:
            top, bottom = highest(h), lowest(w)
            rest = total(s)
            if rest - rest != zero and has_nan(plane, size, 1):
                top = bottom = zero / zero
            high[p + u] = top
            low[p + u] = bottom
            first[p + u] = z0


@helper
def _normalise(block: Any, table: Any, base: int, begin: int, end: int) -> None:
    """Statistics of x = a (z - mu) + beta in the place of those of z."""
    flags = table[FLAGS]
    mean, var = numbers_at(block, table[MEAN_AT]), numbers_at(block, table[VAR_AT])
    high, low = numbers_at(block, table[HIGH_AT]), numbers_at(block, table[LOW_AT])
    lanes = lanes_of(block)
    zero = number(block, 0)
    zeros = every(block, zero)
    for c in range(begin, end if table[SIGMA] != 0 else begin, lanes):
        n = min(lanes, end - c)
        p = base + c
        slope = _slope(block, table, c, n)
        centre = _optional(block, table, table[MU], c, n)
        start = _optional(block, table, table[BIAS], c, n)
        if flags & MEAN:
            write(mean, p, n, slope * (read(mean, p, n, zero) - centre) + start)
        if flags & VAR:
            write(var, p, n, slope * slope * read(var, p, n, zero))
        if flags & EXTREMA:
            h, w = read(high, p, n, zero), read(low, p, n, zero)
            # Where the slope is 0 all positions tie, and the first one counts; it is NaN there if
            # anything in the plane is not finite.
            row = read(_row(block, table, FIRST), p, n, zero) + (zeros * h + zeros * w)
            top = where_equal(slope, zeros, row, where_above(zeros, slope, w, h))
            bottom = where_equal(slope, zeros, row, where_above(zeros, slope, h, w))
            write(high, p, n, slope * (top - centre) + start)
            write(low, p, n, slope * (bottom - centre) + start)


@helper
def _lambda(block: Any, table: Any) -> Any:
    """The weight of the maximum: a number, or p0^2 / (p0^2 + p1^2)."""
    if table[P] == 0:
        return numbers_at(block, table[NUMBERS])[1]
    a, b = _parameter(block, table, table[P], 0), _parameter(block, table, table[P], 1)
    scale = max(abs(a), abs(b))
    if scale < TINY:
        return number(block, 1) / number(block, 2)
    a, b = a / scale, b / scale
    return a * a / (a * a + b * b)


@helper
def _spem(block: Any, table: Any, p: int, c: int, n: int) -> Any:
    """SPEM's gate of n channels, in its three forms; the reweighting is that of the sum."""
    flags = table[FLAGS]
    zero, one = number(block, 0), number(block, 1)
    lam = _lambda(block, table)
    high = read(numbers_at(block, table[HIGH_AT]), p, n, zero)
    low = read(numbers_at(block, table[LOW_AT]), p, n, zero)
    u = every(block, lam) * high + every(block, one - lam) * low
    w_r = _parameters(block, table, table[W2], c, n, zero)
    b_r = _parameters(block, table, table[W3], c, n, zero)
    factor = sigmoid(w_r * (high + low) + (b_r + b_r))
    if flags & CODE:
        u = w_r * u + b_r
    e = _parameters(block, table, table[W0], c, n, zero) * u
    e = e + _parameters(block, table, table[W1], c, n, zero)
    return sigmoid(e * factor) if flags & FIGURE else sigmoid(e) * factor


@helper
def _dot(block: Any, row: Any, x: Any, size: int) -> Any:
    lanes = lanes_of(block)
    zero = number(block, 0)
    s = every(block, zero)
    k = 0
    while k + lanes <= size:
        s = s + load(row, k) * load(x, k)
        k += lanes
    if k < size:
        s = s + load_part(row, k, size - k, zero) * load_part(x, k, size - k, zero)
    return total(s)


@helper
def _product(block: Any, table: Any, address: int, row: int, x: Any, size: int) -> Any:
    """A row of a matrix, and x."""
    if table[FLAGS] & NARROW:
        return _dot(block, offset(map_at(block, address), row * size), x, size)
    return _dot(block, offset(numbers_at(block, address), row * size), x, size)


@helper
def _hidden(block: Any, table: Any, image: int, begin: int, end: int) -> None:
    """Units begin to end of SE's hidden layer: relu(W0 mean + w1)."""
    channels = table[CHANNELS]
    zero = number(block, 0)
    x = offset(numbers_at(block, table[MEAN_AT]), image * channels)
    out = offset(numbers_at(block, table[HIDDEN]), image * table[WIDTH])
    for j in range(begin, end):
        s = _product(block, table, table[W0], j, x, channels)
        if table[W1] != 0:
            s = s + _parameter(block, table, table[W1], j)
        out[j] = zero if s < zero else s


@helper
def _mixed(block: Any, table: Any, image: int, begin: int, end: int) -> None:
    """The gates of channels begin to end of an image whose means are all there; ECA's or SE's."""
    channels, flags, width = table[CHANNELS], table[FLAGS], table[WIDTH]
    zero = number(block, 0)
    v = offset(numbers_at(block, table[V_AT]), image * channels)
    lanes = lanes_of(block)
    if flags & ECA:
        x = offset(numbers_at(block, table[MEAN_AT]), image * channels)
        reach = width // 2
        c = begin
        while c < end:
            inside = c >= reach and c + lanes + reach <= channels and c + lanes <= end
            if inside:
                t = every(block, zero)
                for k in range(width):
                    t = t + every(block, _parameter(block, table, table[W2], k)) * load(
                        x, c + k - reach
                    )
                store(v, c, t)
                c += lanes
            else:
                s = zero
                for k in range(max(0, reach - c), min(width, channels + reach - c)):
                    weight = _parameter(block, table, table[W2], k)
                    s = fused(weight, x[c + k - reach], s)
                v[c] = s
                c += 1
    else:
        x = offset(numbers_at(block, table[HIDDEN]), image * width)
        for c in range(begin, end):
            s = _product(block, table, table[W2], c, x, width)
            if table[W3] != 0:
                s = s + _parameter(block, table, table[W3], c)
            v[c] = s
    for c in range(begin, end, lanes):
        n = min(lanes, end - c)
        write(v, c, n, sigmoid(read(v, c, n, zero)))


@helper
def _gate(block: Any, table: Any, p: int, c: int, n: int) -> Any:
    """The gate of n channels: computed now, or before, or 1."""
    if table[FLAGS] & SPEM:
        v = _spem(block, table, p, c, n)
        write(numbers_at(block, table[V_AT]), p, n, v)
        return v
    if table[V_AT] == 0:
        return every(block, number(block, 1))
    return read(numbers_at(block, table[V_AT]), p, n, number(block, 0))


@helper
def _coefficients(block: Any, table: Any, base: int, begin: int, end: int) -> None:
    """al = v a and be = v beta of some channels, after a gate that takes each for itself."""
    slopes, starts = _row(block, table, AL), _row(block, table, BE)
    lanes = lanes_of(block)
    for c in range(begin, end, lanes):
        n = min(lanes, end - c)
        v = _gate(block, table, base + c, c, n)
        if table[ALPHA] != 0:
            one = every(block, number(block, 1))
            v = one + every(block, _parameter(block, table, table[ALPHA], 0)) * (v - one)
        write(slopes, base + c, n, v * _slope(block, table, c, n))
        write(starts, base + c, n, v * _optional(block, table, table[BIAS], c, n))


@helper
def _write_channels(block: Any, table: Any, image: int, begin: int, end: int) -> None:
    channels, size = table[CHANNELS], table[SIZE]
    base = image * channels
    start_of_image = base * size
    z, r = (
        offset(map_at(block, table[Z]), start_of_image),
        offset(map_at(block, table[R]), start_of_image),
    )
    y = offset(map_at(block, table[Y]), start_of_image)
    slopes, starts = _row(block, table, AL), _row(block, table, BE)
    lanes = lanes_of(block)
    zero = number(block, 0)
    zeros = every(block, zero)
    stream = table[FLAGS] & STREAM != 0
    # Row by row, in the order of memory: what is fetched ahead counts more than coefficients that
    # are read again.
    for k in range(size):
        for c in range(begin, end, lanes):
            n = min(lanes, end - c)
            slope, start = read(slopes, base + c, n, zero), read(starts, base + c, n, zero)
            centre = _optional(block, table, table[MU], c, n)
            o = k * channels + c
            t = slope * (read(z, o, n, zero) - centre) + start + read(r, o, n, zero)
            if stream and n >= lanes:
                _stream(y, o, where_above(zeros, t, zeros, t))
            else:
                write(y, o, n, where_above(zeros, t, zeros, t))


@helper
def _write_planes(block: Any, table: Any, image: int, begin: int, end: int) -> None:
    channels, size = table[CHANNELS], table[SIZE]
    base = image * channels
    slopes, starts = _row(block, table, AL), _row(block, table, BE)
    lanes = lanes_of(block)
    zero = number(block, 0)
    zeros = every(block, zero)
    stream = table[FLAGS] & STREAM != 0
    for c in range(begin, end):
        slope, start = every(block, slopes[base + c]), every(block, starts[base + c])
        centre = zeros
        if table[MU] != 0:
            centre = every(block, _parameter(block, table, table[MU], c))
        at = (base + c) * size
        z, r = offset(map_at(block, table[Z]), at), offset(map_at(block, table[R]), at)
        y = offset(map_at(block, table[Y]), at)
        k = 0
        while k + lanes <= size:
            t = slope * (load(z, k) - centre) + start + load(r, k)
            if stream:
                _stream(y, k, where_above(zeros, t, zeros, t))
            else:
                store(y, k, where_above(zeros, t, zeros, t))
            k += lanes
        if k < size:
            n = size - k
            t = slope * (load_part(z, k, n, zero) - centre) + start + load_part(r, k, n, zero)
            store_part(y, k, n, where_above(zeros, t, zeros, t))


@helper
def _next(block: Any, table: Any, region: int) -> Any:
    """A chunk as an image and a range of its channels; image -1 where none is left."""
    chunk = next_chunk(table, region)
    batch, step = table[BATCH], table[STEP]
    begin = chunk // batch * step
    return (chunk % batch if chunk >= 0 else -1), begin, min(begin + step, table[CHANNELS])


@helper
def _gates(block: Any, table: Any, image: int, begin: int, end: int) -> None:
    """The gates of some channels, and what the last pass makes of them."""
    flags = table[FLAGS]
    if flags & MIXING and flags & GATE:
        if flags & SE and flags & COLLECT:
            _hidden(block, table, image, 0, table[WIDTH])
        _mixed(block, table, image, begin, end)
    _coefficients(block, table, image * table[CHANNELS], begin, end)


def tail_of_channels(block: Any) -> None:
    """Channels_last; a chunk is a range of channels of an image."""
    table = table_of(block)
    region = region_of(table)
    while True:
        image, begin, end = _next(block, table, region)
        if image < 0:
            return
        base = image * table[CHANNELS]
        if table[FLAGS] & COLLECT:
            x = offset(map_at(block, table[Z]), base * table[SIZE])
            _collect_channels(block, table, x, base, begin, end)
            _normalise(block, table, base, begin, end)
        if table[FLAGS] & WRITE:
            _gates(block, table, image, begin, end)
            _write_channels(block, table, image, begin, end)


def tail_of_planes(block: Any) -> None:
    """Contiguous maps; a chunk is a range of channels of an image."""
    table = table_of(block)
    region = region_of(table)
    while True:
        image, begin, end = _next(block, table, region)
        if image < 0:
            return
        base = image * table[CHANNELS]
        if table[FLAGS] & COLLECT:
            x = offset(map_at(block, table[Z]), (base + begin) * table[SIZE])
            _collect_planes(block, table, x, base + begin, end - begin)
            _normalise(block, table, base, begin, end)
        if table[FLAGS] & WRITE:
            _gates(block, table, image, begin, end)
            _write_planes(block, table, image, begin, end)


def matrix_rows(block: Any) -> None:
    """SE's hidden layer of all images, or with GATE its gates; a chunk is a range of rows."""
    table = table_of(block)
    gates = table[FLAGS] & GATE != 0
    rows = table[CHANNELS] if gates else table[WIDTH]
    step, region = table[STEP], region_of(table)
    while True:
        begin = next_chunk(table, region) * step
        if begin < 0:
            return
        for image in range(table[BATCH]):
            if gates:
                _mixed(block, table, image, begin, min(begin + step, rows))
            else:
                _hidden(block, table, image, begin, min(begin + step, rows))


_KINDS = {
    "spem_text": TEXT | EXTREMA,
    "spem_code": CODE | EXTREMA,
    "spem_figure": FIGURE | EXTREMA,
    "eca": ECA | MEAN,
    "se": SE | MEAN,
}


class _Call:
    """What a call needs besides its tensors: the table with its counters, and scratch memory."""

    def __init__(self, threads: int, size: int) -> None:
        self.threads, self.size = threads, size
        self.table = array.array("q", bytes(8 * (COUNTERS + LINE * threads) + BYTES))
        address = self.table.buffer_info()[0]
        self.start = -address % BYTES // 8  # counters have cache lines of their own
        self.address = address + 8 * self.start
        self.memory = array.array("b", bytes(size + 2 * BYTES))
        address = self.memory.buffer_info()[0]
        self.numbers = -address % BYTES  # in bytes; the rows follow them
        self.rows = address + self.numbers + BYTES


# A call takes one and gives it back: no two that run at once share any, whatever their threads.
_free: list[_Call] = []
_KEPT = 1 << 22  # bytes of scratch memory up to which it is kept
_NUMBERS = {4: struct.Struct("2f"), 8: struct.Struct("2d")}
_TABLE = struct.Struct(f"{ALPHA + 1 - CHUNKS}q")
_CACHED = 1 << 18  # bytes of a chunk that are still in a core's second cache when it writes
_LARGE = 8 << 20  # bytes of a map that no cache keeps for whoever reads it next
_SMALL_WEIGHTS = 1 << 18  # bytes of SE's matrices up to which each image may read them again


def fused_tail(
    z: Tensor, r: Tensor, norm: Norm | None, gate: CompiledGate | None, v: Tensor | None = None
) -> Tensor:
    """y = relu(v x + r) with x = norm(z); v is given, or 1, or a compiled gate's.

    A compiled gate writes its values into v, if there is one; its own, from which alpha leads on.
    """
    y = torch.empty_like(z)
    flags = WRITE
    if z.numel() * z.element_size() >= _LARGE and y.data_ptr() % BYTES == 0:
        flags |= STREAM
    if gate is not None:
        flags |= COLLECT | GATE | _KINDS[gate.kind]
    _run(z, r, y, norm, flags, (None, None, None, None), v, gate)
    return y


def norm_stats(z: Tensor, norm: Norm | None, read: Collection[str]) -> list[Tensor | None]:
    """Mean, variance, maximum and minimum of x = norm(z); None where nobody reads them."""
    extrema = "max" in read or "min" in read
    wide = compute_dtype(z.dtype)
    found = [
        z.new_empty(z.shape[:2], dtype=wide) if wanted else None
        for wanted in ("mean" in read, "var" in read, extrema, extrema)
    ]
    flags = COLLECT | MEAN * ("mean" in read) | VAR * ("var" in read) | EXTREMA * extrema
    _run(z, None, None, norm, flags, tuple(found), None, None)
    return found


@lru_cache(maxsize=1024)
def _plan(
    dtype: torch.dtype,
    batch: int,
    channels: int,
    values: int,
    contiguous: bool,
    flags: int,
    width: int,
    threads: int,
) -> tuple[torch.dtype, list[tuple[int, int, tuple[int, ...]]], int, int]:
    """How a map is cut and what is run on it: compute dtype, launches, bytes of a row and of all.

    A launch is a kernel's address, its threads and the head of its table: chunks, channels (or
    rows) a chunk, B, C, K, flags, threads.
    """
    wide = compute_dtype(dtype)
    size = values // (batch * channels)
    lanes = LINES * BYTES // wide.itemsize
    mixing = flags & MIXING
    # SE's matrices are read once for all images, if they are large.
    apart = mixing & SE and batch > 1 and 2 * channels * width * wide.itemsize > _SMALL_WEIGHTS
    if mixing and not apart and batch >= threads:
        parts = 1  # a thread has all of an image
    elif contiguous:
        parts = -(-size * channels * dtype.itemsize // _CACHED)
        if threads > 1:
            parts = max(parts, -(-4 * threads // batch))
    else:  # rows are not cut, but where threads would have nothing to do
        parts = threads if batch < 4 * threads and batch % threads else 1
    grain = 16 if contiguous else lanes
    blocks = -(-channels // grain)
    step = -(-blocks // min(parts, blocks)) * grain
    launches: list[tuple[int, int, tuple[int, ...]]] = []
    # Streams are written in whole cache lines.
    if (size if contiguous else channels) * dtype.itemsize % BYTES:
        flags &= ~STREAM

    def launch(kernel: Any, flags: int, chunks: int, step: int) -> None:
        regions = min(threads, chunks)
        head = (chunks, step, batch, channels, size, flags, regions)
        launches.append((address_of(kernel, dtype, LINES), regions, head))

    kernel = tail_of_planes if contiguous else tail_of_channels
    chunks = -(-channels // step) * batch
    if not mixing or (step >= channels and not apart):
        launch(kernel, flags, chunks, step)
    else:
        launch(kernel, flags & ~(GATE | WRITE), chunks, step)
        if mixing & SE:
            units = max(1, -(-width // (4 * threads)))
            launch(matrix_rows, flags & ~GATE, -(-width // units), units)
        if apart:
            units = max(16, -(-channels // (4 * threads)))
            launch(matrix_rows, flags, -(-channels // units), units)
        launch(kernel, flags & ~COLLECT & ~(GATE if apart else 0), chunks, step)
    row = batch * channels * wide.itemsize
    return wide, launches, row, ROWS_KEPT * row + batch * width * wide.itemsize


def _are(dtype: torch.dtype, norm: Norm | None, gate: CompiledGate | None) -> bool:
    """Whether all parameters have this dtype, as those of a network converted to it."""
    tensors: list[Tensor | None] = []
    if norm is not None:
        tensors += norm.weight, norm.bias, norm.mean, norm.var
    if gate is not None:
        tensors += *gate.tensors, gate.alpha
    return all(t is None or t.dtype == dtype for t in tensors)


def _run(
    z: Tensor,
    r: Tensor | None,
    y: Tensor | None,
    norm: Norm | None,
    flags: int,
    stats: tuple[Tensor | None, ...],
    v: Tensor | None,
    gate: CompiledGate | None,
) -> None:
    """Runs the kernel on maps of one dtype and layout, once or as often as the gate needs it."""
    dtype, shape, threads = z.dtype, z.shape, torch.get_num_threads()
    width = 0 if gate is None else gate.width
    narrow = dtype == torch.bfloat16 and _are(dtype, norm, gate)
    flags |= NARROW * narrow
    wide, launches, row, scratch = _plan(
        dtype, shape[0], shape[1], z.numel(), z.is_contiguous(), flags, width, threads
    )
    kept: list[Tensor] = []  # copies of what lies otherwise than a kernel reads it
    kind = dtype if narrow else wide

    def place(t: Tensor | None, kind: torch.dtype = kind) -> int:
        if t is None:
            return 0
        if t.dtype != kind or not t.is_contiguous():
            t = t.to(kind).contiguous()
            kept.append(t)
        return t.data_ptr()

    try:
        call = _free.pop()
    except IndexError:
        call = None
    if call is None or call.size < scratch or call.threads < threads:
        call = _Call(max(threads, 8), max(scratch, 1 << 16))
    rows = call.rows
    weight, bias, mu, sigma, eps = (0, 0, 0, 0, 0.0)
    if norm is not None:
        weight, bias, mu, sigma = (
            place(norm.weight),
            place(norm.bias),
            place(norm.mean),
            place(norm.var),
        )
        eps = norm.eps
    if gate is None:
        mean, var, high, low = (place(t, wide) for t in stats)
        weights, lam, v_at, alpha = (0, 0, 0, 0, 0), 0.0, place(v, wide), 0
    else:
        mean, high, low, v_at = (rows + k * row for k in (MEANS, HIGHS, LOWS, GATES))
        var, v_at = 0, v_at if v is None else v.data_ptr()
        weights, lam, alpha = map(place, gate.tensors), gate.number, place(gate.alpha)
    _NUMBERS[wide.itemsize].pack_into(call.memory, call.numbers, eps, lam)
    maps = z.data_ptr(), 0 if r is None else r.data_ptr(), 0 if y is None else y.data_ptr()
    rest = (*maps, weight, bias, mu, sigma, high, low, mean, var, v_at, rows, rows - BYTES)
    rest = (*rest, *weights, rows + ROWS_KEPT * row, width, alpha)
    table, start = call.table, call.start
    for address, regions, head in launches:
        table[start] = 0
        for k in range(start + COUNTERS, start + COUNTERS + LINE * regions, LINE):
            table[k] = 0
        _TABLE.pack_into(table, 8 * (start + CHUNKS), *head, *rest)
        run_on_threads(address, call.address, regions)
    if call.size <= _KEPT:
        _free.append(call)
