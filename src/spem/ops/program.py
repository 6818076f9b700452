"""A gate as a program over the channels of one image, for a kernel that runs it between two passes.

A map in inference is read twice, for its statistics and for the result. Where a kernel can compute
the gate of an image itself, the second reading finds the image in the cache, and a dozen operators
on [N, C] are one call. For that the gate is called with a `Row` in place of each statistic, which
writes down what is done to it. Nothing is kept from call to call, so a changed module or parameter
is seen. A gate that does what no `Row` can is run by torch, between two passes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from spem.ops.stats import PlaneStats

_G = TypeVar("_G", bound=Callable[..., Any])

MARGIN = 16  # numbers before and behind a row, always zero
FIELDS = 6  # int64 of an instruction: operation, out, a, b, c, k
# What out becomes; a, b and c are rows or tensors [C], k is a number.
ADD, MULTIPLY, FUSE, SCALE, SIGMOID, RELU = range(6)
"""a + k b, a b, a + b c, k a, 1 / (1 + exp(-a)), max(a, 0)."""
SLOTS = 4  # rows of the statistics, in their order; what is computed follows


def recordable(gate: _G) -> _G:
    """Marks a gate that may be called with rows: without side effects, each image for itself."""
    cast("Any", gate).recordable = True
    return gate


class CannotRecord(Exception):
    """A gate does what no program has an instruction for."""


class Program:
    """Instructions and what they read; an operand is a place among the rows, or -1 - a tensor's number."""

    def __init__(self, batch: int, channels: int, dtype: torch.dtype) -> None:
        self.batch, self.channels, self.dtype = batch, channels, dtype
        self.stride = -(-channels // MARGIN) * MARGIN + 2 * MARGIN
        self.rows = SLOTS
        self.code: list[int] = []
        self.tensors: list[Tensor] = []
        self.numbers: list[float] = []
        self.result = 0

    def place(self, row: int) -> int:
        """Where a row begins, in numbers."""
        return row * self.stride + MARGIN

    def emit(self, op: int, *operands: object, k: float = 1.0, out: int | None = None) -> Row:
        """Writes an instruction; its result is a new row if it has no place."""
        if out is None:
            out = self.place(self.rows)
            self.rows += 1
        places = [self._operand(x) for x in operands]
        self.code += (op, out, *places, *[0] * (3 - len(places)), len(self.numbers))
        self.numbers.append(k)
        return Row(self, out, own=True)

    def _operand(self, x: object) -> int:
        if type(x) is Row and x.program is self:
            return x.at
        known = isinstance(x, Tensor) and x.shape == (self.channels,) and x.dtype == self.dtype
        if not known or not x.is_cpu:
            raise CannotRecord
        self.tensors.append(x)
        return -len(self.tensors)


class Row:
    """The scalars of one image, [N, C] to the gate that handles them."""

    def __init__(self, program: Program, at: int, *, own: bool = False) -> None:
        self.program, self.at, self.own = program, at, own
        self.dtype = program.dtype
        self.shape = torch.Size((program.batch, program.channels))
        self.device = torch.device("cpu")

    def numel(self) -> int:
        """N C."""
        return self.shape.numel()

    def add(self, other: object, *, alpha: float = 1.0, out: int | None = None) -> Row:
        """self + alpha other."""
        return self.program.emit(ADD, self, other, k=_number(alpha), out=out)

    def mul(self, other: object) -> Row:
        """self other, for a row, a tensor [C] or a number."""
        if isinstance(other, (int, float)):
            return self.program.emit(SCALE, self, k=other)
        return self.program.emit(MULTIPLY, self, other)

    def sigmoid(self) -> Row:
        """The logistic sigmoid."""
        return self.program.emit(SIGMOID, self)

    def relu(self) -> Row:
        """max(self, 0)."""
        return self.program.emit(RELU, self)

    def add_(self, other: object, *, alpha: float = 1.0) -> Row:
        """As `add`, in place."""
        return self.add(other, alpha=alpha, out=self._own())

    def sigmoid_(self) -> Row:
        """As `sigmoid`, in place."""
        return self.program.emit(SIGMOID, self, out=self._own())

    __add__ = __radd__ = add
    __mul__ = __rmul__ = mul

    def __getitem__(self, key: object) -> Row:
        raise CannotRecord

    def _own(self) -> int:
        if not self.own:
            raise CannotRecord  # somebody else's row
        return self.at

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """What torch's own functions call when they are given a row."""
        record = _RECORDED.get(function)
        if record is None:
            raise CannotRecord
        return record(*args, **(kwargs or {}))


class _Padded:
    """A row with zeros at both ends, of which rows of the old width can be cut."""

    def __init__(self, row: Row, width: int) -> None:
        self.row, self.width = row, width

    def __getitem__(self, key: object) -> Row:
        match key:
            case (slice(start=None, stop=None, step=None), slice(start=a, stop=b, step=None)):
                start = a or 0
                if 0 <= start <= 2 * self.width and b == start + self.row.shape[1]:
                    return Row(self.row.program, self.row.at + start - self.width)
        raise CannotRecord


def _number(x: object) -> float:
    if not isinstance(x, (int, float)):
        raise CannotRecord
    return float(x)


def _addcmul(a: object, b: object, c: object) -> Row:
    program = next(x.program for x in (a, b, c) if isinstance(x, Row))
    return program.emit(FUSE, a, b, c)


def _pad(x: Row, pad: Any, mode: str = "constant", value: float | None = None) -> _Padded:
    ends = tuple(pad)
    if mode != "constant" or value or len(ends) != 2 or ends[0] != ends[1]:
        raise CannotRecord
    if not 0 <= ends[0] <= MARGIN:
        raise CannotRecord
    return _Padded(x, ends[0])


_RECORDED: dict[Any, Callable[..., Any]] = {
    torch.addcmul: _addcmul,
    torch.sigmoid: Row.sigmoid,
    torch.relu: Row.relu,
    F.pad: _pad,
    torch._C._nn.pad: _pad,
}


def record(
    gate: Callable[[PlaneStats], Any], moments: bool, extrema: bool, like: Tensor, wide: torch.dtype
) -> Program | None:
    """The program of a gate for maps like this one; None if it has none."""
    program = Program(like.shape[0], like.shape[1], wide)
    rows = [Row(program, program.place(k)) for k in range(SLOTS)]
    mean, var = rows[:2] if moments else (None, None)
    high, low = rows[2:] if extrema else (None, None)
    size = like.shape[2:].numel()
    try:
        result = gate(PlaneStats(*cast("Any", (mean, var, high, low)), size, like.shape[0]))
    except CannotRecord:
        return None
    if not isinstance(result, Row) or result.program is not program:
        return None
    program.result = result.at
    return program
