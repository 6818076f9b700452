"""The tail of whole images, gate and all, while each of them is in the cache; for numba.

Both passes run on one image at a time, as they are, with a table of their own for each thread; in
between runs the gate's program (``spem.ops.program``). What a thread needs for an image lies in its
part of a workspace: the two tables, then rows of numbers, the statistics first.
"""

from typing import Any

from spem.ops.cpu import channels, planes
from spem.ops.cpu.logistic import logistic
from spem.ops.cpu.memory import (
    lanes_of,
    map_at,
    next_chunk,
    number,
    numbers_at,
    offset,
    read,
    region_of,
    table_of,
    write,
)
from spem.ops.cpu.table import (
    ARGS,
    BATCH,
    CHANNELS,
    CHUNKS,
    COUNTER,
    COUNTERS,
    FLAGS,
    REGIONS,
    SIZE,
    STEP,
)
from spem.ops.cpu.vectors import every, helper, total, where_above
from spem.ops.program import ADD, FIELDS, FUSE, LINEAR, MARGIN, MULTIPLY, SCALE, SIGMOID, SLOTS

TABLE = 64  # int64 of one of a thread's tables
# Places behind ARGS: addresses of z, r, y, mu, a, beta; the workspace and bytes of a thread's part;
# bytes of an image and of a number; numbers of a row; the program, its length, numbers and tensors;
# where its result is.
Z, R, Y, MU, A, BETA, WORK, PART, IMAGE, NUMBER, STRIDE, CODE, LENGTH, KS, TENSORS, RESULT = range(
    ARGS, ARGS + 16
)

_stats_of_planes, _tail_of_planes = helper(planes.plane_stats), helper(planes.affine_tail)
_stats_of_channels, _tail_of_channels = helper(channels.plane_stats), helper(channels.affine_tail)


@helper
def _prepared(block: Any, region: int) -> int:
    """Fills a thread's two tables; returns the address of the first."""
    table = table_of(block)
    base = table[WORK] + region * table[PART]
    rows = base + 2 * TABLE * 8
    stats, tail = table_of(map_at(block, base)), table_of(map_at(block, base + TABLE * 8))
    for k in range(2):
        own = stats if k == 0 else tail
        own[CHUNKS] = own[BATCH] = own[REGIONS] = 1
        own[STEP] = own[CHANNELS] = table[CHANNELS]
        own[SIZE] = table[SIZE]
        own[FLAGS] = table[FLAGS] if k == 0 else 0
    for k in range(SLOTS):
        stats[ARGS + 1 + k] = rows + (k * table[STRIDE] + MARGIN) * table[NUMBER]
    for k in range(5, 8):
        stats[ARGS + k] = 0
    stats[ARGS + 8] = tail[ARGS + 4] = table[A]
    stats[ARGS + 9] = tail[ARGS + 2] = table[MU]
    stats[ARGS + 10] = tail[ARGS + 5] = table[BETA]
    tail[ARGS + 3] = rows + table[RESULT] * table[NUMBER]
    return base


@helper
def _next_image(block: Any, base: int, region: int) -> bool:
    """Points a thread's tables to the next image; False if there is none."""
    table = table_of(block)
    image = next_chunk(table, region)
    if image < 0:
        return False
    stats, tail = table_of(map_at(block, base)), table_of(map_at(block, base + TABLE * 8))
    at = image * table[IMAGE]
    stats[COUNTER] = stats[COUNTERS] = tail[COUNTER] = tail[COUNTERS] = 0
    stats[ARGS] = tail[ARGS] = table[Z] + at
    tail[ARGS + 1] = table[R] + at
    tail[ARGS + 6] = table[Y] + at
    return True


@helper
def _operand(rows: Any, block: Any, tensors: Any, which: int) -> Any:
    return offset(rows, which) if which >= 0 else numbers_at(block, tensors[-1 - which])


@helper
def _multiply(
    block: Any, out: Any, x: Any, matrix: Any, bias: Any, biased: bool, rows: int, columns: int
) -> None:
    lanes = lanes_of(block)
    zero = number(block, 0)
    for j in range(rows):
        row = offset(matrix, j * columns)
        s = every(block, zero)
        for p in range(0, columns, lanes):
            n = min(lanes, columns - p)
            s = s + read(row, p, n, zero) * read(x, p, n, zero)
        product = total(s)
        out[j] = product + bias[j] if biased else product


@helper
def _compute_gate(block: Any, base: int) -> None:
    table = table_of(block)
    rows = numbers_at(block, base + 2 * TABLE * 8)
    code = table_of(map_at(block, table[CODE]))
    tensors = table_of(map_at(block, table[TENSORS]))
    ks = numbers_at(block, table[KS])
    lanes = lanes_of(block)
    zero = number(block, 0)
    zeros = every(block, zero)
    for i in range(table[LENGTH]):
        op = code[FIELDS * i]
        out = offset(rows, code[FIELDS * i + 1])
        a = _operand(rows, block, tensors, code[FIELDS * i + 2])
        b = _operand(rows, block, tensors, code[FIELDS * i + 3])
        c = _operand(rows, block, tensors, code[FIELDS * i + 4])
        factor = ks[code[FIELDS * i + 5]]
        count = code[FIELDS * i + 6]
        if op == LINEAR:
            _multiply(block, out, a, b, c, factor != zero, count, code[FIELDS * i + 7])
            continue
        k = every(block, factor)
        for p in range(0, count, lanes):
            n = min(lanes, count - p)
            x = read(a, p, n, zero)
            if op == ADD:
                x = x + k * read(b, p, n, zero)
            elif op == MULTIPLY:
                x = x * read(b, p, n, zero)
            elif op == FUSE:
                x = x + read(b, p, n, zero) * read(c, p, n, zero)
            elif op == SCALE:
                x = k * x
            elif op == SIGMOID:
                x = logistic(x)
            else:
                x = where_above(zeros, x, zeros, x)
            write(out, p, n, x)


def tail_of_planes(block: Any) -> None:
    """Contiguous images."""
    region = region_of(table_of(block))
    base = _prepared(block, region)
    while _next_image(block, base, region):
        _stats_of_planes(map_at(block, base))
        _compute_gate(block, base)
        _tail_of_planes(map_at(block, base + TABLE * 8))


def tail_of_channels(block: Any) -> None:
    """Channels_last images."""
    region = region_of(table_of(block))
    base = _prepared(block, region)
    while _next_image(block, base, region):
        _stats_of_channels(map_at(block, base))
        _compute_gate(block, base)
        _tail_of_channels(map_at(block, base + TABLE * 8))
