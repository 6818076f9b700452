"""A gate as a program over the channels of one image, run by a kernel between two passes.

A map in inference is read twice, for its statistics and for the result. Where a kernel can compute
the gate of an image itself, the second reading finds the image in the cache, and a dozen operators
on [N, C] are one call. For that the gate is called with a `Row` in place of each statistic, which
writes down what is done to it. Nothing is kept from call to call, so a changed module or parameter
is seen. A gate that does what no `Row` can is run by torch, between two passes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from spem.ops.library import is_plain
from spem.ops.stats import STATISTICS, PlaneStats

_G = TypeVar("_G", bound=Callable[..., Any])

MARGIN = 16  # numbers before and behind a row, always zero
FIELDS = 8  # int64 of an instruction: operation, out, a, b, c, k, widths of out and of a
# What out becomes; a, b and c are rows or tensors, k is a number.
ADD, MULTIPLY, FUSE, SCALE, SIGMOID, RELU, LINEAR = range(7)
"""a + k b, a b, a + b c, k a, 1 / (1 + exp(-a)), max(a, 0), b a + k c with a matrix b."""
LARGEST = 1 << 14  # values of a matrix; torch's product for all images is faster above
SLOTS = 4  # rows of the statistics, in their order; what is computed follows


def recordable(gate: _G) -> _G:
    """Marks a gate that may be called with rows: without side effects, each image for itself."""
    cast("Any", gate).recordable = True
    return gate


class UnrecordableError(Exception):
    """A gate does what no program has an instruction for."""


class Program:
    """Instructions and what they read: a place among the rows, or -1 - k for the tensor k."""

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

    def emit(self, op: int, *operands: object, width: int, k: float = 1.0) -> Row:
        """Writes an instruction on rows and tensors [width]; its result is a new row."""
        places = [self._operand(x, (width,)) for x in operands]
        return self._write(op, places, (width, width), k)

    def emit_linear(self, x: Row, weight: Tensor, bias: Tensor | None) -> Row:
        """Writes the product with a matrix [out, in], and the addition of a bias."""
        inputs, width = x.shape[1], weight.shape[0]
        if weight.numel() > LARGEST or width > self.channels:
            raise UnrecordableError
        places = [x.at, self._operand(weight, (width, inputs))]
        if bias is not None:
            places.append(self._operand(bias, (width,)))
        return self._write(LINEAR, places, (width, inputs), float(bias is not None))

    def _write(self, op: int, places: list[int], widths: tuple[int, int], k: float) -> Row:
        out = self.place(self.rows)
        self.rows += 1
        self.code += (op, out, *places, *[0] * (3 - len(places)), len(self.numbers), *widths)
        self.numbers.append(k)
        return Row(self, out, widths[0])

    def _operand(self, x: object, shape: tuple[int, ...]) -> int:
        if isinstance(x, Row) and x.shape[1:] == shape:
            return x.at
        if not isinstance(x, Tensor) or not is_plain(x) or x.layout != torch.strided:
            raise UnrecordableError
        if x.shape != shape or x.dtype != self.dtype or not x.is_cpu:
            raise UnrecordableError
        self.tensors.append(x)
        return -len(self.tensors)


class Row:
    """The scalars of one image, [N, width] to the gate that handles them."""

    def __init__(self, program: Program, at: int, width: int) -> None:
        self.program, self.at = program, at
        self.dtype = program.dtype
        self.shape = torch.Size((program.batch, width))
        self.device = torch.device("cpu")

    def numel(self) -> int:
        """N width."""
        return self.shape.numel()

    def add(self, other: object, *, alpha: float = 1.0) -> Row:
        """self + alpha other."""
        return self._emit(ADD, self, other, k=_number(alpha))

    def mul(self, other: object) -> Row:
        """self other, for a row, a tensor [C] or a number."""
        if isinstance(other, (int, float)):
            return self._emit(SCALE, self, k=other)
        return self._emit(MULTIPLY, self, other)

    def sigmoid(self) -> Row:
        """The logistic sigmoid."""
        return self._emit(SIGMOID, self)

    def relu(self) -> Row:
        """max(self, 0)."""
        return self._emit(RELU, self)

    __add__ = __radd__ = add
    __mul__ = __rmul__ = mul

    def _refused(self, *_: object) -> Any:
        raise UnrecordableError

    # What Python would do by itself, but differently. Rows are never changed.
    __iadd__ = __imul__ = __eq__ = __ne__ = _refused  # pyright: ignore[reportAssignmentType]
    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def _emit(self, op: int, *operands: object, k: float = 1.0) -> Row:
        return self.program.emit(op, *operands, width=self.shape[1], k=k)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """What torch's own functions call when they are given a row."""
        record = _RECORDED.get(function)
        if record is None:
            raise UnrecordableError
        return record(*args, **(kwargs or {}))


class _Padded:
    """A row with zeros at both ends, of which rows of the old width can be cut."""

    def __init__(self, row: Row, width: int) -> None:
        self.row, self.width = row, width

    def __getitem__(self, key: object) -> Row:
        rows, columns = key if isinstance(key, tuple) and len(key) == 2 else (None, None)
        if rows != slice(None) or not isinstance(columns, slice) or columns.step is not None:
            raise UnrecordableError
        start = columns.start or 0
        if not 0 <= start <= 2 * self.width or columns.stop != start + self.row.shape[1]:
            raise UnrecordableError
        return Row(self.row.program, self.row.at + start - self.width, self.row.shape[1])


def _number(x: object) -> float:
    if not isinstance(x, (int, float)):
        raise UnrecordableError
    return float(x)


def _addcmul(a: object, b: object, c: object) -> Row:
    row = next(x for x in (a, b, c) if isinstance(x, Row))
    return row.program.emit(FUSE, a, b, c, width=row.shape[1])


def _linear(x: object, weight: Tensor, bias: Tensor | None = None) -> Row:
    if not isinstance(x, Row):
        raise UnrecordableError
    return x.program.emit_linear(x, weight, bias)


def _pad(x: Row, pad: Any, mode: str = "constant", value: float | None = None) -> _Padded:
    ends = tuple(pad)
    if (x.at - MARGIN) % x.program.stride:
        raise UnrecordableError  # a row that is cut from a padded one has no zeros at its ends
    if mode != "constant" or value or len(ends) != 2 or ends[0] != ends[1]:
        raise UnrecordableError
    if not 0 <= ends[0] <= MARGIN:
        raise UnrecordableError
    return _Padded(x, ends[0])


_RECORDED: dict[Any, Callable[..., Any]] = {
    torch.add: Row.add,
    torch.mul: Row.mul,
    torch.addcmul: _addcmul,
    torch.sigmoid: Row.sigmoid,
    torch.relu: Row.relu,
    F.linear: _linear,
    F.pad: _pad,
    getattr(getattr(torch, "_C"), "_nn").pad: _pad,  # noqa: B009  # what F.pad is in C++
}


def record(
    gate: Callable[[PlaneStats], Any], read: Collection[str], like: Tensor, wide: torch.dtype
) -> Program | None:
    """The program of a gate that reads these statistics of a map; None if it has none."""
    program = Program(like.shape[0], like.shape[1], wide)
    rows = [
        Row(program, program.place(k), program.channels) if name in read else None
        for k, name in enumerate(STATISTICS)
    ]
    size = like.shape[2:].numel()
    try:
        result: Any = gate(cast("Any", PlaneStats)(*rows, size, like.shape[0]))
    except Exception:  # noqa: BLE001  # if it is a fault of the gate, torch will meet it too
        return None
    if not isinstance(result, Row) or result.shape[1] != program.channels:
        return None
    program.result = result.at
    return program
