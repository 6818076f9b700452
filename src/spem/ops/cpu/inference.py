"""The tail in inference: statistics, gate and result of a few channels at a time.

No gradient is recorded and the norm is constant, so nothing has to be kept, and what a thread has
just read is still in its cache when it writes. One kernel does all three steps, or any of them:

- a gate that takes each channel for itself (SPEM) follows the statistics of some channels at once;
- one that mixes the channels of an image (SE, ECA) follows when a thread has all of the image, or
  in a second run where the threads share an image;
- any other gate is run by torch, between two kernels.

The parameters are read where they are, at each call: nothing is kept that could go stale.
"""

import array
import struct
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from spem.ops import threads as on_threads
from spem.ops.cpu import channels as by_channel, language as kl, planes as by_plane
from spem.ops.cpu.launch import address_of
from spem.ops.cpu.scalars import extrema_of, spem_parts
from spem.ops.formula import Norm
from spem.ops.inference import CompiledGate
from spem.ops.stats import compute_dtype

# Flags: the steps of a run, the gate that is computed.
COLLECT, GATE, WRITE, ECA, SE, NARROW, GIVEN = (1 << k for k in range(23, 30))
SPEM, MIXING = kl.TEXT | kl.CODE | kl.FIGURE, ECA | SE
KINDS = {
    "spem_text": kl.TEXT | kl.EXTREMA,
    "spem_code": kl.CODE | kl.EXTREMA,
    "spem_figure": kl.FIGURE | kl.EXTREMA,
    "eca": ECA | kl.MEAN,
    "se": SE | kl.MEAN,
}
# Arguments: those of F1; other maps; rows of scalars [B, C] and SE's hidden units; eps and lambda.
_STATS, _MAPS = kl.arguments("mnnnnn"), kl.arguments("mm", start=8)
_ROWS, _NUMBERS = kl.arguments("nnnnn", start=10), kl.arguments("bb", start=15)
# Places of addresses of parameters (0: none), and of the number of hidden units or taps.
WEIGHT, BIAS, MU, SIGMA, W0, W1, W2, W3, P, ALPHA, WIDTH = range(kl.ARGS + 17, kl.ARGS + 28)
TINY = float(torch.finfo(torch.float32).tiny)
LINES = 4  # of 64 bytes in a vector: 64 channels, or 32 in double precision


@kl.helper
def _parameters(block: Any, place: int, c: int, n: int) -> Any:
    """Parameters c to c + n of a tensor; zeros where there is none."""
    table = kl.table_of(block)
    if table[place] == 0:
        return kl.every(block, 0)
    if table[kl.FLAGS] & NARROW:
        return kl.read(kl.map_at(block, table[place]), c, n)
    return kl.read(kl.numbers_at(block, table[place]), c, n)


@kl.helper
def _parameter(block: Any, place: int, k: int) -> Any:
    """One parameter; 0 where there is none."""
    table = kl.table_of(block)
    if table[place] == 0:
        return kl.number(block, 0)
    if table[kl.FLAGS] & NARROW:
        return kl.element(kl.map_at(block, table[place]), k)
    return kl.element(kl.numbers_at(block, table[place]), k)


@kl.helper
def _slope(block: Any, c: int, n: int) -> Any:
    """a = gamma / sqrt(var + eps) of the channels from c on; 1 without a norm."""
    table, ones = kl.table_of(block), kl.every(block, 1)
    if table[SIGMA] == 0:
        return ones
    eps, _ = _NUMBERS(block)
    a = ones / kl.root(_parameters(block, SIGMA, c, n) + kl.every(block, eps))
    return a if table[WEIGHT] == 0 else a * _parameters(block, WEIGHT, c, n)


@kl.helper
def _normalise(block: Any, base: int, begin: int, end: int) -> None:
    """Statistics of x = a (z - mu) + beta in the place of those of z."""
    table = kl.table_of(block)
    _, mean, _, high, low, first = _STATS(block)
    for c in range(begin, end if table[SIGMA] != 0 else begin, kl.lanes_of(block)):
        n, p = end - c, base + c
        a, mu = _slope(block, c, n), _parameters(block, MU, c, n)
        beta = _parameters(block, BIAS, c, n)
        if table[kl.FLAGS] & kl.MEAN:
            kl.write(mean, p, n, a * (kl.read(mean, p, n) - mu) + beta)
        if table[kl.FLAGS] & kl.EXTREMA:
            h, w, z_0 = kl.read(high, p, n), kl.read(low, p, n), kl.read(first, p, n)
            z_i, z_j = extrema_of(a, kl.every(block, 0), h, w, z_0)
            kl.write(high, p, n, a * (z_i - mu) + beta)
            kl.write(low, p, n, a * (z_j - mu) + beta)


@kl.helper
def _lambda(block: Any) -> Any:
    """The weight of the maximum: a number, or p0^2 / (p0^2 + p1^2)."""
    if kl.table_of(block)[P] == 0:
        _, lam = _NUMBERS(block)
        return lam
    a, b = _parameter(block, P, 0), _parameter(block, P, 1)
    scale = max(abs(a), abs(b))
    if scale < TINY:
        return kl.number(block, 1) / kl.number(block, 2)
    a, b = a / scale, b / scale
    return a * a / (a * a + b * b)


@kl.helper
def _spem(block: Any, p: int, c: int, n: int) -> Any:
    """SPEM's gate of n channels, in its three forms; the reweighting is that of the sum."""
    flags, lam = kl.table_of(block)[kl.FLAGS], _lambda(block)
    _, _, _, high_at, low_at, _ = _STATS(block)
    high, low = kl.read(high_at, p, n), kl.read(low_at, p, n)
    w_e, b_e = _parameters(block, W0, c, n), _parameters(block, W1, c, n)
    w_r, b_r = _parameters(block, W2, c, n), _parameters(block, W3, c, n)
    mixed = kl.every(block, lam) * high + kl.every(block, kl.number(block, 1) - lam) * low
    _, e, factor = spem_parts(flags, mixed, high + low, w_e, b_e, w_r, b_r)
    return kl.sigmoid(e * factor) if flags & kl.FIGURE else kl.sigmoid(e) * factor


@kl.helper
def _dot(row: Any, x: Any, size: int) -> Any:
    s = kl.every(x, 0)
    for k in range(0, size, kl.lanes_of(x)):
        s = s + kl.read(row, k, size - k) * kl.read(x, k, size - k)
    return kl.total(s)


@kl.helper
def _layer(block: Any, place: int, row: int, x: Any, size: int) -> Any:
    """A unit of a layer: a row of the matrix at a place times x, and the bias behind it."""
    table = kl.table_of(block)
    bias = _parameter(block, place + 1, row)
    if table[kl.FLAGS] & NARROW:
        return _dot(kl.offset(kl.map_at(block, table[place]), row * size), x, size) + bias
    return _dot(kl.offset(kl.numbers_at(block, table[place]), row * size), x, size) + bias


@kl.helper
def _hidden(block: Any, image: int, begin: int, end: int) -> None:
    """Units begin to end of SE's hidden layer: relu(W0 mean + w1)."""
    table, zero = kl.table_of(block), kl.number(block, 0)
    _, means, _, _, _, _ = _STATS(block)
    _, _, _, _, hidden = _ROWS(block)
    x = kl.offset(means, image * table[kl.CHANNELS])
    for j in range(begin, end):
        s = _layer(block, W0, j, x, table[kl.CHANNELS])
        hidden[image * table[WIDTH] + j] = zero if s < zero else s


@kl.helper
def _mixed(block: Any, image: int, begin: int, end: int) -> None:
    """The gates of channels begin to end of an image whose means are all there; ECA's or SE's."""
    table = kl.table_of(block)
    channels, width = table[kl.CHANNELS], table[WIDTH]
    _, means, _, _, _, _ = _STATS(block)
    v, _, _, _, hidden = _ROWS(block)
    base = image * channels
    if table[kl.FLAGS] & SE:
        x = kl.offset(hidden, image * width)
        for c in range(begin, end):
            v[base + c] = _layer(block, W2, c, x, width)
    else:
        reach, lanes, c = width // 2, kl.lanes_of(block), begin
        while c < end:  # one at a time where some taps or lanes are outside
            n = lanes if c >= reach and c + lanes <= min(end, channels - reach) else 1
            s = kl.every(block, 0)
            for k in range(max(0, reach - c), min(width, channels + reach - c)):
                tap = kl.every(block, _parameter(block, W2, k))
                s = s + tap * kl.read(means, base + c + k - reach, n)
            kl.write(v, base + c, n, s)
            c += n
    for c in range(begin, end, kl.lanes_of(block)):
        kl.write(v, base + c, end - c, kl.sigmoid(kl.read(v, base + c, end - c)))


@kl.helper
def _gates(block: Any, image: int, begin: int, end: int) -> None:
    """The gates v of some channels, and what the last pass makes of them: v a, v beta, mu."""
    table, ones = kl.table_of(block), kl.every(block, 1)
    flags, base = table[kl.FLAGS], image * table[kl.CHANNELS]
    if flags & MIXING and flags & GATE:
        if flags & SE and flags & COLLECT:
            _hidden(block, image, 0, table[WIDTH])
        _mixed(block, image, begin, end)
    gates, slopes, starts, centres, _ = _ROWS(block)
    for c in range(begin, end, kl.lanes_of(block)):
        n, p = end - c, base + c
        v = ones
        if flags & SPEM:
            v = _spem(block, p, c, n)
        elif flags & GIVEN:
            v = kl.read(gates, p, n)
        if table[ALPHA] != 0:
            v = ones + kl.every(block, _parameter(block, ALPHA, 0)) * (v - ones)
        kl.write(slopes, p, n, v * _slope(block, c, n))
        kl.write(starts, p, n, v * _parameters(block, BIAS, c, n))
        kl.write(centres, p, n, _parameters(block, MU, c, n))


@kl.helper
def tail_of_channels(block: Any, image: int, begin: int, end: int) -> None:
    """Channels_last; a chunk is a range of channels of an image."""
    table = kl.table_of(block)
    z, _, _, _, _, _ = _STATS(block)
    r, y = _MAPS(block)
    gates, slopes, starts, centres, _ = _ROWS(block)
    base = image * table[kl.CHANNELS]
    if table[kl.FLAGS] & COLLECT:
        by_channel.gather(block, 1, image, begin, end)
        _normalise(block, base, begin, end)
    if table[kl.FLAGS] & WRITE:
        _gates(block, image, begin, end)
        mu, a, beta = kl.offset(centres, base), kl.offset(slopes, base), kl.offset(starts, base)
        by_channel.write_rows(table, 0, image, begin, end, (z, r, y), (mu, gates, a, beta))


@kl.helper
def tail_of_planes(block: Any, image: int, begin: int, end: int) -> None:
    """Contiguous maps; a chunk is a range of channels of an image."""
    table = kl.table_of(block)
    z, _, _, _, _, _ = _STATS(block)
    r, y = _MAPS(block)
    _, slopes, starts, centres, _ = _ROWS(block)
    base = image * table[kl.CHANNELS]
    if table[kl.FLAGS] & COLLECT:
        by_plane.plane_stats(block, image, begin, end)
        _normalise(block, base, begin, end)
    if table[kl.FLAGS] & WRITE:
        _gates(block, image, begin, end)
        for p in range(base + begin, base + end):
            at = p * table[kl.SIZE]
            by_plane.write_plane(table, z, r, y, at, centres[p], slopes[p], starts[p])


@kl.helper
def matrix_rows(block: Any, _image: int, begin: int, end: int) -> None:
    """SE's hidden layer of all images, or with GATE its gates; a chunk is a range of rows."""
    table = kl.table_of(block)
    for image in range(table[kl.BATCH]):
        if table[kl.FLAGS] & GATE:
            _mixed(block, image, begin, end)
        else:
            _hidden(block, image, begin, end)


class _Memory:
    """What a call needs besides its tensors: a table for its threads, and scratch behind it."""

    def __init__(self, threads: int, size: int) -> None:
        self.threads, self.size = threads, size
        places = kl.COUNTERS + kl.LINE * threads
        self.table = array.array("q", bytes(8 * places + -(-size // 8) * 8 + kl.BYTES))
        address = self.table.buffer_info()[0]
        self.start = -address % kl.BYTES // 8  # counters have cache lines of their own
        self.address = address + 8 * self.start
        self.rows = self.address + 8 * places


# A call takes one and gives it back: no two that run at once share any, whatever their threads.
_free: list[_Memory] = []
_KEPT = 1 << 22  # bytes of scratch up to which it is kept
_TABLE = struct.Struct("23q2d11q")  # from CHUNKS on: head, maps and rows; eps, lambda; parameters
_CACHED = 1 << 18  # bytes of a chunk that are still in a core's second cache when it writes
_LARGE = 8 << 20  # bytes of a map that no cache keeps for whoever reads it next
_SMALL_WEIGHTS = 1 << 18  # bytes of SE's matrices up to which each image may read them again


@lru_cache(maxsize=1024)
def _plan(
    dtype: torch.dtype, shape: torch.Size, contiguous: bool, flags: int, width: int, threads: int
) -> list[tuple[int, int, tuple[int, ...]]]:
    """How a map is cut and what is run on it: kernels' addresses, threads, heads of tables."""
    batch, channels = shape[:2]
    size, item = shape[2:].numel(), compute_dtype(dtype).itemsize
    mixing = flags & MIXING
    # SE's matrices are read once for all images, if they are large.
    apart = mixing & SE and batch > 1 and 2 * channels * width * item > _SMALL_WEIGHTS
    if mixing and not apart and batch >= threads:
        parts = 1  # a thread has all of an image
    elif contiguous:
        parts = -(-size * channels * dtype.itemsize // _CACHED)
        if threads > 1:
            parts = max(parts, -(-4 * threads // batch))
    else:  # rows are not cut, but where threads would have nothing to do
        parts = threads if batch < 4 * threads and batch % threads else 1
    grain = 16 if contiguous else LINES * kl.BYTES // item
    blocks = -(-channels // grain)
    step = -(-blocks // min(parts, blocks)) * grain
    # Streams are written in whole cache lines.
    if (size if contiguous else channels) * dtype.itemsize % kl.BYTES:
        flags &= ~kl.STREAM

    def launch(kernel: Any, flags: int, step: int, extent: int, images: int = 1) -> Any:
        chunks = -(-extent // step) * images
        regions = min(threads, chunks)
        head = (chunks, step, extent, batch, channels, size, flags, regions)
        return address_of(kernel, dtype, LINES), regions, head

    def tail(flags: int) -> Any:
        return launch(
            tail_of_planes if contiguous else tail_of_channels, flags, step, channels, batch
        )

    if not mixing or (step >= channels and not apart):
        return [tail(flags)]
    found = [tail(flags & ~(GATE | WRITE))]
    if mixing & SE:
        found.append(launch(matrix_rows, flags & ~GATE, max(1, -(-width // (4 * threads))), width))
    if apart:
        step_of_rows = max(16, -(-channels // (4 * threads)))
        found.append(launch(matrix_rows, flags, step_of_rows, channels))
    return [*found, tail(flags & ~COLLECT & ~(GATE if apart else 0))]


def fused_tail(
    z: Tensor, r: Tensor, norm: Norm | None, gate: CompiledGate | None, v: Tensor | None = None
) -> Tensor:
    """y = relu(v x + r) with x = norm(z); v is given, or 1, or a compiled gate's."""
    dtype, wide, (batch, channels) = z.dtype, compute_dtype(z.dtype), z.shape[:2]
    y = torch.empty_like(z)
    flags, width, lam = WRITE | kl.RESIDUAL, 0, 0.0
    if z.numel() * z.element_size() >= _LARGE and y.data_ptr() % kl.BYTES == 0:
        flags |= kl.STREAM
    parameters: list[Tensor | None] = [None] * 10
    if norm is not None:
        parameters[:4] = norm.weight, norm.bias, norm.mean, norm.var
    if gate is not None:
        parameters[4:] = *gate.tensors, gate.alpha
        flags |= COLLECT | GATE | GIVEN | KINDS[gate.kind]
        width, lam = gate.width, gate.number
    elif v is not None:
        flags |= GIVEN
        v = v.to(wide).contiguous()
    # Those of a network that was converted as a whole are read as they are.
    kind = wide
    if dtype == torch.bfloat16 and all(t is None or t.dtype == dtype for t in parameters):
        kind = dtype
        flags |= NARROW
    places = [0] * 10
    for k, t in enumerate(parameters):
        if t is not None:
            if t.dtype != kind or not t.is_contiguous():
                parameters[k] = t = t.to(kind).contiguous()  # lives as long as its address is used
            places[k] = t.data_ptr()
    threads, row = torch.get_num_threads(), batch * channels * wide.itemsize
    scratch = 9 * row + batch * width * wide.itemsize
    try:
        memory = _free.pop()
    except IndexError:
        memory = None
    if memory is None or memory.size < scratch or memory.threads < threads:
        memory = _Memory(max(threads, 8), max(scratch, 1 << 16))
    mean, var, high, low, first, own, *others = range(memory.rows, memory.rows + 10 * row, row)
    maps = (r.data_ptr(), y.data_ptr(), own if v is None else v.data_ptr())
    args = (z.data_ptr(), mean, var, high, low, first, 0, 0, *maps, *others)
    numbers = (0.0 if norm is None else norm.eps, lam)
    table, start = memory.table, memory.start
    for address, regions, head in _plan(dtype, z.shape, z.is_contiguous(), flags, width, threads):
        table[start + kl.COUNTER] = 0
        for k in range(start + kl.COUNTERS, start + kl.COUNTERS + kl.LINE * regions, kl.LINE):
            table[k] = 0
        _TABLE.pack_into(table, 8 * (start + kl.CHUNKS), *head, *args, *numbers, *places, width)
        on_threads.launch(address, memory.address, regions)
    if memory.size <= _KEPT:
        _free.append(memory)
    return y
