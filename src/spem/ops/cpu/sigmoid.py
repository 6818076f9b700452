"""The logistic sigmoid of a vector, to a few units in the last place of normal numbers."""

import math
from decimal import Decimal
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from spem.ops.cpu.vectors import I32, I64, compiled_inline

_LN2 = Decimal("0.693147180559945309417232121458176568")
# Of the number's format: bits of ln 2 in its larger part (times any exponent still exact), terms of
# the series (the rest is below half a unit for |s| <= ln(2)/2), exponents without subnormals, and
# where e^t overflows.
_FLOAT = (9, 7, 126, 127, 23, 88.72283905)
_DOUBLE = (32, 13, 1022, 1023, 52, 709.78271289338397)


@compiled_inline
def sigmoid(context: Any, vector: Any) -> Any:
    """1 / (1 + e^t) with t = -x: e^t = 2^q e^s, q = round(t / ln 2), e^s by its series.

    A NaN stays one; where e^t overflows the result is 0, and a little before that, where the result
    is not a normal number, it is 0 or one of the last that are.
    """

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        double = vector.element.bitwidth == 64
        bits, terms, lowest, highest, mantissa, overflow = _DOUBLE if double else _FLOAT
        kind = args[0].type
        whole = ir.VectorType(I64 if double else I32, vector.lanes)

        def every(value: float) -> Any:
            return ir.Constant(kind, [value] * vector.lanes)

        def integers(value: int) -> Any:
            return ir.Constant(whole, [value] * vector.lanes)

        def times(a: Any, b: Any) -> Any:
            return builder.fmul(a, b, flags=("contract",))

        def plus(a: Any, b: Any) -> Any:
            return builder.fadd(a, b, flags=("contract",))

        t = builder.fneg(args[0])
        least, most = (k * float(_LN2) for k in (0.5 - lowest, highest + 0.5))
        inside = builder.select(builder.fcmp_ordered("<", t, every(least)), every(least), t)
        inside = builder.select(builder.fcmp_ordered(">", inside, every(most)), every(most), inside)
        name = f"llvm.rint.v{vector.lanes}f{vector.element.bitwidth}"
        nearest = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(kind, [kind]), name
        )
        q = builder.call(nearest, [times(inside, every(1.0 / float(_LN2)))])
        larger = round(_LN2 * 2**bits) / 2**bits
        s = plus(inside, times(q, every(-larger)))
        s = plus(s, times(q, every(-float(_LN2 - Decimal(larger)))))
        power = every(1.0 / math.factorial(terms))
        for n in range(terms - 1, -1, -1):
            power = plus(times(power, s), every(1.0 / math.factorial(n)))
        # Of a NaN there is no integer.
        safe = builder.select(builder.fcmp_ordered("==", q, q), q, every(0.0))
        exponent = builder.add(builder.fptosi(safe, whole), integers(highest))
        scale = builder.bitcast(builder.shl(exponent, integers(mantissa)), kind)
        result = builder.fdiv(every(1.0), builder.fadd(every(1.0), builder.fmul(power, scale)))
        return builder.select(builder.fcmp_ordered(">", t, every(overflow)), every(0.0), result)

    return vector(vector), emit
