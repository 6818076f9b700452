"""Vectors for the CPU kernels: explicit lanes, so that speed hangs on no optimiser.

A loop that keeps a maximum is vectorised automatically only under the promise that no NaN occurs,
and that promise would be broken. Here the lanes are written down instead: ``a * b + c`` on vectors
is one instruction on the machines that have it, and smaller registers split it in two or four.

A kernel gets one typed pointer, ``block``; its type says what a map holds (float32, float64, or
uint16 for the bits of bfloat16) and how many lanes a vector has, and everything else follows from
it. Numbers are float32 for maps of float32 and bfloat16, float64 for maps of float64.
"""

import operator
from collections.abc import Callable
from typing import Any, TypeVar, cast

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

F = TypeVar("F", bound=Callable[..., Any])


# numba has no annotations: what its decorators return is said here, once.
def compiled_inline(define: Callable[..., Any]) -> Callable[..., Any]:
    """numba's ``intrinsic``: the function says what LLVM is to do, and for which types."""
    return cast("Callable[..., Any]", intrinsic(define))


BYTES = 64  # of a line of the cache

I32 = ir.IntType(32)
I64 = ir.IntType(64)


class Vector(types.Type):
    """The type of a vector: ``lanes`` numbers of the type ``element``."""

    def __init__(self, element: Any, lanes: int) -> None:
        self.element = element
        self.lanes = lanes
        super().__init__(name=f"Vector({element} x {lanes})")


def llvm_type(element: Any) -> Any:
    """LLVM's name for a number type of numba."""
    if isinstance(element, types.Float):
        return ir.FloatType() if element.bitwidth == 32 else ir.DoubleType()
    return ir.IntType(element.bitwidth)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Vector) -> None:
        super().__init__(manager, kind, ir.VectorType(llvm_type(kind.element), kind.lanes))


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


def number_of(pointer: Any) -> Any:
    """The type one computes with for maps behind this pointer."""
    return types.float64 if pointer.dtype == types.float64 else types.float32


def vector_of(pointer: Any) -> Vector:
    """The vector of numbers for maps behind this pointer."""
    return Vector(number_of(pointer), pointer.lanes)


def spread(builder: Any, scalar: Any, lanes: int) -> Any:
    """A vector that has the scalar in every lane."""
    full = ir.VectorType(scalar.type, lanes)
    one = builder.insert_element(ir.Constant(full, ir.Undefined), scalar, ir.Constant(I32, 0))
    zeros = ir.Constant(ir.VectorType(I32, lanes), [0] * lanes)
    return builder.shuffle_vector(one, ir.Constant(full, ir.Undefined), zeros)


@compiled_inline
def every(context: Any, block: Any, value: Any) -> Any:
    """A vector with the number in every lane."""
    kind = vector_of(block)

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return spread(builder, args[1], kind.lanes)

    return kind(block, number_of(block)), emit


@compiled_inline
def every_position(context: Any, block: Any, value: Any) -> Any:
    """A vector of int32, as wide as one of numbers, with the integer in every lane."""
    kind = Vector(types.int32, vector_of(block).lanes)

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return spread(builder, builder.trunc(args[1], I32), kind.lanes)

    return kind(block, types.int64), emit


@compiled_inline
def where_equal_bits(context: Any, a: Any, b: Any) -> Any:
    """The lanes in which a = b as the bits of an integer, the first lane's lowest."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        equal = builder.fcmp_ordered("==", args[0], args[1])
        return builder.zext(builder.bitcast(equal, ir.IntType(a.lanes)), I64)

    return types.int64(a, b), emit


@compiled_inline
def lowest_bit(context: Any, bits: Any) -> Any:
    """The number of the lowest bit that is set; 64 if none is."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 0))

    return types.int64(types.int64), emit


def _folded(combine: Callable[[Any, Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """An intrinsic's definition: the lanes combined in halves, always in the same order."""

    def define(context: Any, vector: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            value, count = args[0], vector.lanes
            while count > 1:
                count //= 2
                rest = ir.Constant(value.type, ir.Undefined)
                low, high = (
                    builder.shuffle_vector(
                        value,
                        rest,
                        ir.Constant(ir.VectorType(I32, count), [s + k for k in range(count)]),
                    )
                    for s in (0, count)
                )
                value = combine(builder, low, high)
            return builder.extract_element(value, ir.Constant(I32, 0))

        return vector.element(vector), emit

    return define


def _larger(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _smaller(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered("<", a, b), a, b)


def _pairwise(combine: Callable[[Any, Any, Any], Any]) -> Callable[[Any, Any, Any], Any]:
    def define(context: Any, a: Any, b: Any) -> Any:
        if not isinstance(a, Vector) or a != b:
            return None

        def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return combine(builder, args[0], args[1])

        return a(a, b), emit

    return define


def _chosen(relation: str) -> Callable[[Any, Any, Any, Any, Any], Any]:
    """An intrinsic's definition: lane by lane one of two values; a NaN is in no relation."""

    def define(context: Any, a: Any, b: Any, then: Any, otherwise: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            whole = isinstance(a.element, types.Integer)
            compare = builder.icmp_signed if whole else builder.fcmp_ordered
            return builder.select(compare(relation, args[0], args[1]), args[2], args[3])

        return then(a, b, then, then), emit

    return define


# where_above(a, b, then, otherwise): ``then`` in the lanes where a > b, else ``otherwise``.
where_above = compiled_inline(_chosen(">"))
where_at_most = compiled_inline(_chosen("<="))
where_equal = compiled_inline(_chosen("=="))
total = compiled_inline(_folded(lambda builder, a, b: builder.fadd(a, b)))
highest = compiled_inline(_folded(_larger))
lowest = compiled_inline(_folded(_smaller))
larger = compiled_inline(_pairwise(_larger))
smaller = compiled_inline(_pairwise(_smaller))
_plus = compiled_inline(_pairwise(lambda builder, a, b: builder.fadd(a, b, flags=("contract",))))
_minus = compiled_inline(_pairwise(lambda builder, a, b: builder.fsub(a, b, flags=("contract",))))
_times = compiled_inline(_pairwise(lambda builder, a, b: builder.fmul(a, b, flags=("contract",))))


@compiled_inline
def inverse_root(context: Any, vector: Any) -> Any:
    """1 / sqrt(x), lane by lane, each operation rounded."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = args[0].type
        name = f"llvm.sqrt.v{vector.lanes}f{vector.element.bitwidth}"
        root = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind]), name)
        ones = ir.Constant(kind, [1.0] * vector.lanes)
        return builder.fdiv(ones, builder.call(root, [args[0]]))

    return vector(vector), emit


@compiled_inline
def fused(context: Any, a: Any, b: Any, c: Any) -> Any:
    """a b + c of numbers, rounded as that of vectors is."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        product = builder.fmul(args[0], args[1], flags=("contract",))
        return builder.fadd(product, args[2], flags=("contract",))

    return a(a, b, c), emit


def _overload(symbol: Any, implementation: Callable[[Any, Any], Any]) -> None:
    """Gives two vectors an operator."""

    def choose(a: Any, b: Any) -> Any:
        return implementation if isinstance(a, Vector) else None

    overload(symbol)(choose)


def _add(a: Any, b: Any) -> Any:
    return _plus(a, b)


def _subtract(a: Any, b: Any) -> Any:
    return _minus(a, b)


def _multiply(a: Any, b: Any) -> Any:
    return _times(a, b)


_overload(operator.add, _add)
_overload(operator.sub, _subtract)
_overload(operator.mul, _multiply)


def helper(function: F) -> F:
    """Compiles a function that kernels call; it is kept with them, not by itself."""
    return cast("F", njit(error_model="numpy")(function))
