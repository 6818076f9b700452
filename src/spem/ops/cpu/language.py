"""The language of the CPU kernels: explicit lanes, so that speed hangs on no optimiser.

A loop that keeps a maximum is vectorised automatically only under the promise that no NaN occurs,
and that promise would be broken. ``a * b + c`` on vectors is one instruction on the machines that
have it, and smaller registers split it in two or four.

A kernel gets one typed pointer, ``block``, to a table of int64: counters, the head, arguments. Its
type says what a map holds (float32, float64, or uint16 for the bits of bfloat16) and how many lanes
a vector has. Numbers are float32 for maps of float32 and bfloat16, float64 for maps of float64.
"""

import functools
import inspect
import math
import operator
from collections.abc import Callable
from decimal import Decimal
from typing import Any, TypeVar, cast

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

F = TypeVar("F", bound=Callable[..., Any])

BYTES = 64  # of a line of the cache
LINE = 8  # int64 in one

# Places of the table.
COUNTER = 0  # of the threads that came; alone in its cache line, since every thread writes it
# Chunks are of STEP things; EXTENT says how many the planes, channels or rows to be cut are.
CHUNKS, STEP, EXTENT, BATCH, CHANNELS, SIZE, FLAGS = range(8, 15)
REGIONS = 15  # one for each thread
ARGS = 16  # from here on: addresses
COUNTERS = 48  # from here on: how many chunks of each region are taken

# Flags. What the first pass gathers; what the last one reads, and whether spikes fall on the first
# value that is an extremum instead of on a position.
MOMENTS, EXTREMA, POSITIONS, WITH_Z, WITH_SPIKES, BY_VALUE = (1 << k for k in range(6))
# What is in a tail; relu(norm(z)) has the channel's coefficients, and its mask follows from z.
# STREAM: the result is written past the caches.
GATED, RESIDUAL, RECTIFIED, STREAM = (1 << k for k in range(6, 10))
# Of the norm: whether its statistics are the batch's, and what it has.
SHARED, WEIGHT, BIAS, RUNNING = (1 << k for k in range(10, 14))
# Which gradients reach the statistics; what is wanted.
MEAN, VAR, HIGH, LOW, SUMS, COEFFICIENTS = (1 << k for k in range(14, 20))
# The form of SPEM's gate.
TEXT, CODE, FIGURE = (1 << k for k in range(20, 23))

I32, I64 = ir.IntType(32), ir.IntType(64)
_TABLE = types.CPointer(types.int64)


class Vector(types.Type):
    """The type of a vector: ``lanes`` numbers of the type ``element``."""

    def __init__(self, element: Any, lanes: int) -> None:
        self.element, self.lanes = element, lanes
        super().__init__(name=f"Vector({element} x {lanes})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Vector) -> None:
        super().__init__(manager, kind, ir.VectorType(_llvm(kind.element), kind.lanes))


class Lanes(types.CPointer):
    """The type of a pointer to elements that are read and written ``lanes`` at a time."""

    def __init__(self, element: Any, lanes: int) -> None:
        super().__init__(element)
        self.lanes = lanes
        self.name = f"Lanes({element} x {lanes})"

    @property
    def key(self) -> Any:
        """What makes two of them one type."""
        return self.dtype, self.lanes


register_model(Lanes)(models.PointerModel)


def _llvm(element: Any) -> Any:
    if isinstance(element, types.Float):
        return ir.FloatType() if element.bitwidth == 32 else ir.DoubleType()
    return ir.IntType(element.bitwidth)


def _number(pointer: Any, *_: Any) -> Any:
    """The type one computes with for what is behind this pointer."""
    known = pointer.dtype in (types.float64, types.int32)
    return pointer.dtype if known else types.float32


def _vector(pointer: Any, *_: Any) -> Vector:
    return Vector(_number(pointer), pointer.lanes)


def _numbers(block: Any, *_: Any) -> Lanes:
    return Lanes(_number(block), block.lanes)


def same(kind: Any, *_: Any) -> Any:
    """The type of the first argument."""
    return kind


# numba has no annotations: what its decorators return is said here, once.
def inline(result: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes a function of LLVM instructions one that kernels call.

    It gets the builder, numba's types of the arguments and their values; ``result`` is numba's type
    of its value, or says it from those types.
    """

    def decorate(emit: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(emit)
        def define(_context: Any, *given: Any) -> Any:
            kinds = [types.unliteral(kind) for kind in given]

            def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
                value = emit(builder, kinds, *args)
                return context.get_dummy_value() if value is None else value

            kind = result if isinstance(result, types.Type) else result(*kinds)
            return kind(*kinds), generate

        _, *parameters = inspect.signature(emit).parameters.values()
        cast("Any", define).__signature__ = inspect.Signature(parameters)
        return cast("Callable[..., Any]", intrinsic(define))

    return decorate


def helper(function: F) -> F:
    """Compiles a function that kernels call; it is kept with them, not by itself."""
    return cast("F", njit(error_model="numpy", forceinline=True)(function))


def arguments(kinds: str, start: int = 0) -> Callable[..., Any]:
    """A function of the block: its arguments as pointers to (m)aps, (n)umbers, (p)ositions.

    (b)its are the number whose bits, as a float64, stand in the table themselves. ``start`` is the
    place of the first argument.
    """

    @intrinsic
    def unpack(_context: Any, block: Any) -> Any:
        places = Lanes(types.int32, block.lanes)
        known = {"m": block, "n": _numbers(block), "p": places, "b": _number(block)}
        found = types.Tuple([known[kind] for kind in kinds])

        def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            values: list[Any] = []
            for k, kind in enumerate(found):
                place = builder.gep(args[0], [ir.Constant(I64, ARGS + start + k)], source_etype=I64)
                value = builder.load(place, typ=I64)
                if isinstance(kind, types.Float):
                    value = builder.bitcast(value, ir.DoubleType())
                    value = value if kind == types.float64 else builder.fptrunc(value, _llvm(kind))
                else:
                    value = builder.inttoptr(value, context.get_value_type(kind))
                values.append(value)
            return context.make_tuple(builder, found, values)

        return found(block), generate

    return cast("Callable[..., Any]", unpack)


def call(builder: Any, name: str, result: Any, *args: Any) -> Any:
    """Calls one of LLVM's own functions."""
    kind = ir.FunctionType(result, [a.type for a in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


def spread(builder: Any, scalar: Any, lanes: int) -> Any:
    """A vector that has the scalar in every lane."""
    none = ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined)
    one = builder.insert_element(none, scalar, ir.Constant(I32, 0))
    return builder.shuffle_vector(one, none, ir.Constant(ir.VectorType(I32, lanes), [0] * lanes))


def _place(builder: Any, kind: Any, pointer: Any, index: Any) -> Any:
    return builder.gep(pointer, [index], source_etype=_llvm(kind.dtype))


def _widen(builder: Any, raw: Any) -> Any:
    """What memory holds as numbers: bfloat16 is the upper half of a float32."""
    if not isinstance(raw.type.element, ir.IntType) or raw.type.element.width != 16:
        return raw
    lanes = raw.type.count
    wide = ir.VectorType(I32, lanes)
    whole = builder.shl(builder.zext(raw, wide), ir.Constant(wide, [16] * lanes))
    return builder.bitcast(whole, ir.VectorType(ir.FloatType(), lanes))


def _narrow(builder: Any, value: Any, kind: Any) -> Any:
    """Numbers as memory holds them: to bfloat16 by rounding to the nearest, ties to even."""
    if kind.dtype != types.uint16:
        return value
    lanes = value.type.count
    wide = ir.VectorType(I32, lanes)

    def all_of(bits: int) -> Any:
        return ir.Constant(wide, [bits] * lanes)

    bits = builder.bitcast(value, wide)
    odd = builder.and_(builder.lshr(bits, all_of(16)), all_of(1))
    rounded = builder.add(bits, builder.add(odd, all_of(0x7FFF)))
    # Rounding could carry a NaN over into zero: it is made quiet instead.
    quiet = builder.or_(bits, all_of(0x400000))
    bits = builder.select(builder.fcmp_unordered("uno", value, value), quiet, rounded)
    return builder.trunc(builder.lshr(bits, all_of(16)), ir.VectorType(ir.IntType(16), lanes))


def _lanes_at(builder: Any, kind: Any, pointer: Any, index: Any) -> tuple[Any, Any]:
    """The type of the lanes in memory that begin at ``index``, and a pointer to them."""
    raw = ir.VectorType(_llvm(kind.dtype), kind.lanes)
    return raw, builder.bitcast(_place(builder, kind, pointer, index), raw.as_pointer())


def _first_lanes(builder: Any, raw: Any, count: Any) -> tuple[str, Any]:
    """The end of the name of LLVM's masked functions, and the mask of the first lanes."""
    lanes, element = raw.count, raw.element
    letter = f"i{element.width}" if isinstance(element, ir.IntType) else "f32"
    letter = "f64" if isinstance(element, ir.DoubleType) else letter
    numbers = ir.Constant(ir.VectorType(I32, lanes), list(range(lanes)))
    first = builder.icmp_signed("<", numbers, spread(builder, builder.trunc(count, I32), lanes))
    return f"v{lanes}{letter}.p0", first


# Memory


@inline(lambda _: _TABLE)
def table_of(builder: Any, kinds: Any, block: Any) -> Any:
    """The block as what it is in memory."""
    return builder.bitcast(block, I64.as_pointer())


@inline(same)
def map_at(builder: Any, kinds: Any, block: Any, address: Any) -> Any:
    """An address as a pointer to elements of a map."""
    return builder.inttoptr(address, block.type)


@inline(_numbers)
def numbers_at(builder: Any, kinds: Any, block: Any, address: Any) -> Any:
    """An address as a pointer to plane or channel scalars."""
    return builder.inttoptr(address, _llvm(_number(kinds[0])).as_pointer())


@inline(same)
def offset(builder: Any, kinds: Any, pointer: Any, count: Any) -> Any:
    """The pointer, ``count`` elements on."""
    return _place(builder, kinds[0], pointer, count)


@inline(types.int64)
def lanes_of(builder: Any, kinds: Any, block: Any) -> Any:
    """The number of lanes of a vector, as a constant."""
    return ir.Constant(I64, kinds[0].lanes)


@inline(types.int64)
def bytes_of(builder: Any, kinds: Any, block: Any) -> Any:
    """The number of bytes of a map's element, as a constant."""
    return ir.Constant(I64, kinds[0].dtype.bitwidth // 8)


@inline(types.int64)
def take(builder: Any, kinds: Any, table: Any, place: Any) -> Any:
    """Adds one to a counter of the table and returns what it was before, to one thread only."""
    at = _place(builder, kinds[0], table, place)
    return builder.atomic_rmw("add", at, ir.Constant(I64, 1), "monotonic")


@inline(_vector)
def load(builder: Any, kinds: Any, pointer: Any, index: Any) -> Any:
    """The lanes that begin at ``index``."""
    raw, place = _lanes_at(builder, kinds[0], pointer, index)
    return _widen(builder, builder.load(place, align=kinds[0].dtype.bitwidth // 8, typ=raw))


@inline(_vector)
def load_part(builder: Any, kinds: Any, pointer: Any, index: Any, count: Any, fill: Any) -> Any:
    """The first ``count`` lanes from memory (no more is read), those of ``fill`` in the others."""
    raw, place = _lanes_at(builder, kinds[0], pointer, index)
    name, mask = _first_lanes(builder, raw, count)
    rest = ir.Constant(I32, 1), mask, ir.Constant(raw, None)
    got = call(builder, f"llvm.masked.load.{name}", raw, place, *rest)
    return builder.select(mask, _widen(builder, got), fill)


@inline(types.void)
def store(builder: Any, kinds: Any, pointer: Any, index: Any, value: Any) -> None:
    """Stores all lanes from ``index`` on."""
    _, place = _lanes_at(builder, kinds[0], pointer, index)
    align = kinds[0].dtype.bitwidth // 8
    builder.store(_narrow(builder, value, kinds[0]), place, align=align)


@inline(types.void)
def stream(builder: Any, kinds: Any, pointer: Any, index: Any, value: Any) -> None:
    """Stores all lanes past the caches; their address is a multiple of 64."""
    _, place = _lanes_at(builder, kinds[0], pointer, index)
    past = builder.module.add_metadata([ir.Constant(I32, 1)])
    stored = builder.store(_narrow(builder, value, kinds[0]), place, align=64)
    stored.set_metadata("nontemporal", past)


@inline(types.void)
def store_part(builder: Any, kinds: Any, pointer: Any, index: Any, count: Any, value: Any) -> None:
    """Stores the first ``count`` lanes; nothing behind them is touched."""
    raw, place = _lanes_at(builder, kinds[0], pointer, index)
    name, mask = _first_lanes(builder, raw, count)
    given = _narrow(builder, value, kinds[0]), place, ir.Constant(I32, 1), mask
    call(builder, f"llvm.masked.store.{name}", ir.VoidType(), *given)


@inline(_number)
def element(builder: Any, kinds: Any, pointer: Any, index: Any) -> Any:
    """One element of a map as a number."""
    place = _place(builder, kinds[0], pointer, index)
    raw = spread(builder, builder.load(place, typ=_llvm(kinds[0].dtype)), 2)
    return builder.extract_element(_widen(builder, raw), ir.Constant(I32, 0))


@inline(types.void)
def set_element(builder: Any, kinds: Any, pointer: Any, index: Any, value: Any) -> None:
    """Stores a number as one element of a map."""
    raw = _narrow(builder, spread(builder, value, 2), kinds[0])
    raw = builder.extract_element(raw, ir.Constant(I32, 0))
    builder.store(raw, _place(builder, kinds[0], pointer, index))


def _prefetch(to_write: int) -> Callable[..., Any]:
    """f(pointer, index): asks for the lines of the lanes at ``index``, which need not exist."""

    @inline(types.void)
    def ask(builder: Any, kinds: Any, pointer: Any, index: Any) -> None:
        byte = ir.IntType(8)
        place = builder.bitcast(_place(builder, kinds[0], pointer, index), byte.as_pointer())
        how = [ir.Constant(I32, k) for k in (to_write, 3, 1)]  # into all caches; data
        for k in range(0, kinds[0].lanes * kinds[0].dtype.bitwidth // 8, BYTES):
            line = builder.gep(place, [ir.Constant(I64, k)], source_etype=byte)
            call(builder, "llvm.prefetch.p0", ir.VoidType(), line, *how)

    return ask


prefetch, prefetch_to_write = map(_prefetch, (0, 1))


# Numbers


@inline(_number)
def number(builder: Any, kinds: Any, block: Any, value: Any) -> Any:
    """An integer as a number of the type one computes with."""
    return builder.sitofp(value, _llvm(_number(kinds[0])))


@inline(_vector)
def every(builder: Any, kinds: Any, pointer: Any, value: Any) -> Any:
    """A vector with the number, or an integer as one, in every lane."""
    kind, lanes = _llvm(_number(kinds[0])), kinds[0].lanes
    if isinstance(kind, ir.IntType):
        value = builder.trunc(value, kind)
    elif isinstance(kinds[1], types.Integer):
        value = builder.sitofp(value, kind)
    return spread(builder, value, lanes)


@inline(same)
def root(builder: Any, kinds: Any, x: Any) -> Any:
    """The square root of every lane."""
    kind = kinds[0]
    name = f"llvm.sqrt.v{kind.lanes}f{kind.element.bitwidth}"
    return call(builder, name, x.type, x)


@inline(types.int64)
def where_equal_bits(builder: Any, kinds: Any, a: Any, b: Any) -> Any:
    """The lanes in which a = b as the bits of an integer, the first lane's lowest."""
    equal = builder.fcmp_ordered("==", a, b)
    return builder.zext(builder.bitcast(equal, ir.IntType(kinds[0].lanes)), I64)


@inline(types.int64)
def lowest_bit(builder: Any, kinds: Any, bits: Any) -> Any:
    """The number of the lowest bit that is set; 64 if none is."""
    return builder.cttz(bits, ir.Constant(ir.IntType(1), 0))


def _chosen(relation: str) -> Callable[..., Any]:
    """f(a, b, then, otherwise): lane by lane one of two values; a NaN is in no relation."""

    @inline(lambda a, b, then, otherwise: then)
    def choose(builder: Any, kinds: Any, a: Any, b: Any, then: Any, otherwise: Any) -> Any:
        whole = isinstance(kinds[0].element, types.Integer)
        compare = builder.icmp_signed if whole else builder.fcmp_ordered
        return builder.select(compare(relation, a, b), then, otherwise)

    return choose


def _larger(builder: Any, _: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _smaller(builder: Any, _: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered("<", a, b), a, b)


def _folded(combine: Callable[..., Any]) -> Callable[..., Any]:
    """f(vector): the lanes combined in halves, always in the same order."""

    @inline(lambda vector: vector.element)
    def fold(builder: Any, kinds: Any, value: Any) -> Any:
        count = kinds[0].lanes
        while count > 1:
            count //= 2
            none = ir.Constant(value.type, ir.Undefined)
            index = ir.VectorType(I32, count)
            halves = [
                builder.shuffle_vector(
                    value, none, ir.Constant(index, [s + k for k in range(count)])
                )
                for s in (0, count)
            ]
            value = combine(builder, kinds, *halves)
        return builder.extract_element(value, ir.Constant(I32, 0))

    return fold


where_above, where_at_most, where_equal = map(_chosen, (">", "<=", "=="))
larger, smaller = inline(same)(_larger), inline(same)(_smaller)
total = _folded(lambda builder, _, a, b: builder.fadd(a, b))
highest, lowest = _folded(_larger), _folded(_smaller)


def _operator(symbol: Any, instruction: str) -> None:
    """Gives two vectors an operator."""

    @inline(same)
    def compute(builder: Any, kinds: Any, a: Any, b: Any) -> Any:
        return getattr(builder, instruction)(a, b, flags=("contract",))

    def choose(a: Any, b: Any) -> Any:
        def both(a: Any, b: Any) -> Any:
            return compute(a, b)

        return both if isinstance(a, Vector) else None

    overload(symbol)(choose)


_operator(operator.add, "fadd")
_operator(operator.sub, "fsub")
_operator(operator.mul, "fmul")
_operator(operator.truediv, "fdiv")


# The logistic sigmoid, to a few units in the last place of normal numbers

_LN2 = Decimal("0.693147180559945309417232121458176568")
# Of a number's format: bits of ln 2 in its larger part (times any exponent still exact), terms of
# the series (the rest is below half a unit for |s| <= ln(2)/2), exponents without subnormals, and
# where e^t overflows.
_FLOAT = (9, 7, 126, 127, 23, 88.72283905)
_DOUBLE = (32, 13, 1022, 1023, 52, 709.78271289338397)


@inline(same)
def sigmoid(builder: Any, kinds: Any, x: Any) -> Any:
    """1 / (1 + e^t) with t = -x: e^t = 2^q e^s, q = round(t / ln 2), e^s by its series.

    A NaN stays one; where e^t overflows the result is 0, and a little before that, where the result
    is not a normal number, it is 0 or one of the last that are.
    """
    lanes, double = kinds[0].lanes, kinds[0].element.bitwidth == 64
    bits, terms, lowest, highest, mantissa, overflow = _DOUBLE if double else _FLOAT
    whole = ir.VectorType(I64 if double else I32, lanes)

    def every(value: float, kind: Any = x.type) -> Any:
        return ir.Constant(kind, [value] * lanes)

    def product_and_sum(a: Any, b: Any, c: Any) -> Any:
        return builder.fadd(builder.fmul(a, b, flags=("contract",)), c, flags=("contract",))

    t = builder.fneg(x)
    least, most = (every(k * float(_LN2)) for k in (0.5 - lowest, highest + 0.5))
    inside = builder.select(builder.fcmp_ordered("<", t, least), least, t)
    inside = builder.select(builder.fcmp_ordered(">", inside, most), most, inside)
    units = builder.fmul(inside, every(1.0 / float(_LN2)))
    q = call(builder, f"llvm.rint.v{lanes}f{64 if double else 32}", x.type, units)
    larger = round(_LN2 * 2**bits) / 2**bits
    s = product_and_sum(q, every(-larger), inside)
    s = product_and_sum(q, every(-float(_LN2 - Decimal(larger))), s)
    power = every(1.0 / math.factorial(terms))
    for n in range(terms - 1, -1, -1):
        power = product_and_sum(power, s, every(1.0 / math.factorial(n)))
    # Of a NaN there is no integer.
    safe = builder.select(builder.fcmp_ordered("==", q, q), q, every(0.0))
    exponent = builder.add(builder.fptosi(safe, whole), every(highest, whole))
    scale = builder.bitcast(builder.shl(exponent, every(mantissa, whole)), x.type)
    result = builder.fdiv(every(1.0), builder.fadd(every(1.0), builder.fmul(power, scale)))
    return builder.select(builder.fcmp_ordered(">", t, every(overflow)), every(0.0), result)


# What all kernels do


@helper
def read_or(pointer: Any, index: Any, count: Any, fill: Any) -> Any:
    """The lanes from ``index`` on; if less than all are there, those of ``fill`` in the others."""
    if count >= lanes_of(pointer):
        return load(pointer, index)
    return load_part(pointer, index, count, fill)


@helper
def read(pointer: Any, index: Any, count: Any) -> Any:
    """The lanes from ``index`` on; if less than all are there, 0 in the others."""
    return read_or(pointer, index, count, every(pointer, 0))


@helper
def write(pointer: Any, index: Any, count: Any, value: Any) -> None:
    """Stores the lanes from ``index`` on, ``count`` of them at most."""
    if count >= lanes_of(pointer):
        store(pointer, index, value)
    else:
        store_part(pointer, index, count, value)


@helper
def finite(x: Any, zeros: Any) -> Any:
    """x where it is finite, else 0."""
    return where_equal(x - x, zeros, x, zeros)


@helper
def has_nan(x: Any, size: int, stride: int) -> bool:
    """Whether a plane holds a NaN; its positions are ``stride`` elements apart."""
    for k in range(size):
        value = element(x, k * stride)
        if value != value:
            return True
    return False


@helper
def large_variance(x: Any, size: int, stride: int, mean: Any) -> Any:
    """The variance of a plane whose sum of squares overflows; a NaN if it holds one or an infinity.

    A variance that overflows itself is the largest power of two instead, since the norm's factor
    is 0 then, and 0 times infinity is not a number.
    """
    share = number(x, 1) / number(x, size)
    v = number(x, 0)
    for k in range(size):
        off = element(x, k * stride) - mean
        v += off * share * off
    most = number(x, 1)
    while most + most < v:
        most += most
    return most if v - v != 0 and v == v else v


@helper
def region_of(table: Any) -> int:
    """The region in which the calling thread begins."""
    return take(table, COUNTER) % table[REGIONS]


@helper
def next_chunk(table: Any, region: int) -> Any:
    """A chunk that no other thread has: its image, and where in it the chunk begins and ends.

    An image below 0 says that there is none. A thread takes those of its own region while there
    are some. A region is a range of neighbouring chunks, so that threads write apart from one
    another: two that met in one fresh page of memory would each wait for it, and with large pages
    that is dear.
    """
    regions, count, step = table[REGIONS], table[CHUNKS], table[STEP]
    parts = (table[EXTENT] + step - 1) // step
    share = (count + regions - 1) // regions
    for k in range(regions):
        other = (region + k) % regions
        taken = take(table, COUNTERS + LINE * other)
        chunk = other * share + taken
        if taken < share and chunk < count:
            begin = chunk % parts * step
            return chunk // parts, begin, min(begin + step, table[EXTENT])
    return -1, 0, 0


def kernel_of(work: Callable[..., None]) -> Callable[[Any], None]:
    """What a thread runs on the table: work(block, image, begin, end), chunk by chunk."""

    def kernel(block: Any) -> None:
        table = table_of(block)
        region = region_of(table)
        while True:
            image, begin, end = next_chunk(table, region)
            if image < 0:
                return
            work(block, image, begin, end)

    kernel.__qualname__ = f"{work.__module__.rpartition('.')[2]}.{work.__name__}"
    return kernel
