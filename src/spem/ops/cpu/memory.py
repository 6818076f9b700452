"""How CPU kernels reach memory: addresses, elements, whole vectors and parts of one.

A kernel gets one typed pointer, ``block``; see ``spem.ops.cpu.vectors``.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from spem.ops.cpu.table import CHUNKS, COUNTER, COUNTERS, LINE, REGIONS
from spem.ops.cpu.vectors import (
    BYTES,
    I32,
    I64,
    Lanes,
    Vector,
    compiled_inline,
    helper,
    llvm_type,
    number_of,
    spread,
    vector_of,
)


def _address(builder: Any, pointer: Any, kind: Any, index: Any) -> Any:
    return builder.gep(pointer, [index], source_etype=llvm_type(kind.dtype))


def _first_lanes(builder: Any, count: Any, lanes: int) -> Any:
    """The mask that has the first ``count`` lanes set."""
    numbers = ir.Constant(ir.VectorType(I32, lanes), list(range(lanes)))
    return builder.icmp_signed("<", numbers, spread(builder, builder.trunc(count, I32), lanes))


def _widen(builder: Any, raw: Any, kind: Vector) -> Any:
    """What memory holds as numbers: bfloat16 is the upper half of a float32."""
    if not isinstance(raw.type.element, ir.IntType):
        return raw
    whole = builder.zext(raw, ir.VectorType(I32, kind.lanes))
    shift = ir.Constant(ir.VectorType(I32, kind.lanes), [16] * kind.lanes)
    return builder.bitcast(builder.shl(whole, shift), ir.VectorType(ir.FloatType(), kind.lanes))


def narrow(builder: Any, value: Any, kind: Any) -> Any:
    """Numbers as memory holds them: to bfloat16 by rounding to the nearest, ties to even."""
    if kind.dtype != types.uint16:
        return value
    lanes = value.type.count
    wide = ir.VectorType(I32, lanes)

    def every(bits: int) -> Any:
        return ir.Constant(wide, [bits] * lanes)

    bits = builder.bitcast(value, wide)
    odd = builder.and_(builder.lshr(bits, every(16)), every(1))
    rounded = builder.add(bits, builder.add(odd, every(0x7FFF)))
    # Rounding could carry a NaN over into zero: it is made quiet instead.
    quiet = builder.or_(bits, every(0x400000))
    is_nan = builder.fcmp_unordered("uno", value, value)
    bits = builder.lshr(builder.select(is_nan, quiet, rounded), every(16))
    return builder.trunc(bits, ir.VectorType(ir.IntType(16), lanes))


@compiled_inline
def lanes_of(context: Any, block: Any) -> Any:
    """The number of lanes for maps behind this pointer, as a constant."""
    count = vector_of(block).lanes

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return ir.Constant(I64, count)

    return types.int64(block), emit


@compiled_inline
def bytes_of(context: Any, block: Any) -> Any:
    """The number of bytes of a map's element, as a constant."""
    count = block.dtype.bitwidth // 8

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return ir.Constant(I64, count)

    return types.int64(block), emit


@compiled_inline
def map_at(context: Any, block: Any, address: Any) -> Any:
    """An address as a pointer to elements of a map."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[1], args[0].type)

    return block(block, types.int64), emit


@compiled_inline
def numbers_at(context: Any, block: Any, address: Any) -> Any:
    """An address as a pointer to plane or channel scalars."""
    kind = Lanes(number_of(block), block.lanes)

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[1], context.get_value_type(kind))

    return kind(block, types.int64), emit


@compiled_inline
def positions_at(context: Any, address: Any) -> Any:
    """An address as a pointer to positions (int32)."""
    kind = types.CPointer(types.int32)

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(kind))

    return kind(types.int64), emit


@compiled_inline
def table_of(context: Any, block: Any) -> Any:
    """The block as what it is in memory: a table of int64."""
    kind = types.CPointer(types.int64)

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(kind))

    return kind(block), emit


@compiled_inline
def take(context: Any, table: Any, place: Any) -> Any:
    """Adds one to a counter of the table and returns what it was before, to one thread only."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = _address(builder, args[0], table, args[1])
        return builder.atomic_rmw("add", place, ir.Constant(I64, 1), "monotonic")

    return types.int64(table, types.int64), emit


@compiled_inline
def offset(context: Any, pointer: Any, count: Any) -> Any:
    """The pointer, ``count`` elements on."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _address(builder, args[0], pointer, args[1])

    return pointer(pointer, types.int64), emit


@compiled_inline
def number(context: Any, block: Any, value: Any) -> Any:
    """An integer as a number of the type one computes with."""
    kind = number_of(block)

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.sitofp(args[1], llvm_type(kind))

    return kind(block, types.int64), emit


@compiled_inline
def number_of_bits(context: Any, block: Any, bits: Any) -> Any:
    """The number whose bits, as a float64, are this integer."""
    kind = number_of(block)

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wide = builder.bitcast(args[1], ir.DoubleType())
        return wide if kind == types.float64 else builder.fptrunc(wide, ir.FloatType())

    return kind(block, types.int64), emit


@compiled_inline
def element(context: Any, pointer: Any, index: Any) -> Any:
    """One element of a map as a number."""
    kind = number_of(pointer)

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        raw = builder.load(
            _address(builder, args[0], pointer, args[1]), typ=llvm_type(pointer.dtype)
        )
        if pointer.dtype != types.uint16:
            return raw
        whole = builder.shl(builder.zext(raw, I32), ir.Constant(I32, 16))
        return builder.bitcast(whole, ir.FloatType())

    return kind(pointer, types.int64), emit


@compiled_inline
def set_element(context: Any, pointer: Any, index: Any, value: Any) -> Any:
    """Stores a number as one element of a map."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        raw = narrow(builder, spread(builder, args[2], 2), pointer)
        raw = builder.extract_element(raw, ir.Constant(I32, 0))
        builder.store(raw, _address(builder, args[0], pointer, args[1]))
        return context.get_dummy_value()

    return types.void(pointer, types.int64, number_of(pointer)), emit


@compiled_inline
def load(context: Any, pointer: Any, index: Any) -> Any:
    """The lanes that begin at ``index``."""
    kind = vector_of(pointer)

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        raw = ir.VectorType(llvm_type(pointer.dtype), kind.lanes)
        place = builder.bitcast(_address(builder, args[0], pointer, args[1]), raw.as_pointer())
        size = 2 if pointer.dtype == types.uint16 else pointer.dtype.bitwidth // 8
        return _widen(builder, builder.load(place, align=size, typ=raw), kind)

    return kind(pointer, types.int64), emit


def _prefetch(to_write: bool) -> Any:
    """An intrinsic's definition: asks for the lines that the lanes at ``index`` lie in."""

    def define(context: Any, pointer: Any, index: Any) -> Any:
        count = max(1, pointer.lanes * pointer.dtype.bitwidth // 8 // BYTES)

        def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            byte = ir.IntType(8)
            place = _address(builder, args[0], pointer, args[1])
            place = builder.bitcast(place, byte.as_pointer())
            function = cgutils.get_or_insert_function(
                builder.module,
                ir.FunctionType(ir.VoidType(), [place.type, I32, I32, I32]),
                "llvm.prefetch.p0",
            )
            how = [ir.Constant(I32, k) for k in (int(to_write), 3, 1)]  # into all caches; data
            for k in range(count):
                line = builder.gep(place, [ir.Constant(I64, k * BYTES)], source_etype=byte)
                builder.call(function, [line, *how])
            return context.get_dummy_value()

        return types.void(pointer, types.int64), emit

    return define


# prefetch(pointer, index), of what will be read, or written; the address need not exist.
prefetch = compiled_inline(_prefetch(to_write=False))
prefetch_to_write = compiled_inline(_prefetch(to_write=True))


def _masked_load(builder: Any, place: Any, count: Any, lanes: int, element: Any) -> Any:
    """The first lanes from memory, zeros in the others; and the mask of the first lanes."""
    raw = ir.VectorType(element, lanes)
    mask = _first_lanes(builder, count, lanes)
    place = builder.bitcast(place, raw.as_pointer())
    function = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(raw, [place.type, I32, mask.type, raw]),
        f"llvm.masked.load.v{lanes}{_letter(element)}.p0",
    )
    alignment = ir.Constant(I32, 1)
    return builder.call(function, [place, alignment, mask, ir.Constant(raw, None)]), mask


def _letter(element: Any) -> str:
    """How LLVM calls the type in the names of its functions."""
    if isinstance(element, ir.IntType):
        return f"i{element.width}"
    return "f32" if isinstance(element, ir.FloatType) else "f64"


@compiled_inline
def load_part(context: Any, pointer: Any, index: Any, count: Any, fill: Any) -> Any:
    """The first ``count`` lanes from memory (no more is read), ``fill`` in the others."""
    kind = vector_of(pointer)

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = _address(builder, args[0], pointer, args[1])
        element = llvm_type(pointer.dtype)
        got, mask = _masked_load(builder, place, args[2], kind.lanes, element)
        rest = spread(builder, args[3], kind.lanes)
        return builder.select(mask, _widen(builder, got, kind), rest)

    return kind(pointer, types.int64, types.int64, number_of(pointer)), emit


@compiled_inline
def load_positions(context: Any, block: Any, pointer: Any, index: Any, count: Any) -> Any:
    """The first ``count`` positions from memory, as many lanes as a vector of numbers has."""
    kind = Vector(types.int32, vector_of(block).lanes)

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = _address(builder, args[1], pointer, args[2])
        return _masked_load(builder, place, args[3], kind.lanes, I32)[0]

    return kind(block, pointer, types.int64, types.int64), emit


@compiled_inline
def store(context: Any, pointer: Any, index: Any, value: Any) -> Any:
    """Stores all lanes from ``index`` on."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        raw = narrow(builder, args[2], pointer)
        place = _address(builder, args[0], pointer, args[1])
        place = builder.bitcast(place, raw.type.as_pointer())
        builder.store(raw, place, align=pointer.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(pointer, types.int64, value), emit


@compiled_inline
def store_part(context: Any, pointer: Any, index: Any, count: Any, value: Any) -> Any:
    """Stores the first ``count`` lanes; nothing behind them is touched."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        raw = narrow(builder, args[3], pointer)
        mask = _first_lanes(builder, args[2], value.lanes)
        place = _address(builder, args[0], pointer, args[1])
        place = builder.bitcast(place, raw.type.as_pointer())
        element = raw.type.element
        function = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(ir.VoidType(), [raw.type, place.type, I32, mask.type]),
            f"llvm.masked.store.v{value.lanes}{_letter(element)}.p0",
        )
        builder.call(function, [raw, place, ir.Constant(I32, 1), mask])
        return context.get_dummy_value()

    return types.void(pointer, types.int64, types.int64, value), emit


@helper
def read(pointer: Any, index: Any, count: Any, fill: Any) -> Any:
    """The lanes from ``index`` on; if less than all are there, ``fill`` in the others."""
    if count >= lanes_of(pointer):
        return load(pointer, index)
    return load_part(pointer, index, count, fill)


@helper
def write(pointer: Any, index: Any, count: Any, value: Any) -> None:
    """Stores the lanes from ``index`` on, ``count`` of them at most."""
    if count >= lanes_of(pointer):
        store(pointer, index, value)
    else:
        store_part(pointer, index, count, value)


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
def next_chunk(table: Any, region: int) -> int:
    """A chunk that no other thread has, from the thread's own region while there is one; else -1.

    A region is a range of neighbouring chunks, so that threads write apart from one another: two
    that met in one fresh page of memory would each wait for it, and with large pages that is dear.
    """
    regions, chunks = table[REGIONS], table[CHUNKS]
    share = (chunks + regions - 1) // regions
    for k in range(regions):
        other = (region + k) % regions
        number = take(table, COUNTERS + LINE * other)
        if number < share and other * share + number < chunks:
            return other * share + number
    return -1
