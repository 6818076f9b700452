"""The logistic sigmoid of a vector, to a few units in the last place of normal numbers."""

import math
from decimal import Decimal
from typing import Any

from llvmlite import ir

from spem.ops.cpu.language import I32, I64, call, inline, same

_LN2 = Decimal("0.693147180559945309417232121458176568")
# Of the number's format: bits of ln 2 in its larger part (times any exponent still exact), terms of
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
