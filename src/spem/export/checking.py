"""How far an ONNX graph is from the network it came from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spem.extras import require


@dataclass(frozen=True)
class Difference:
    """How far the outputs of two programs are apart on one input.

    Attributes:
        shape: Of the input.
        largest: Largest absolute difference of all outputs.
        relative: The same over the largest magnitude of the first program's outputs.
    """

    shape: tuple[int, ...]
    largest: float
    relative: float


class Session:
    """An ONNX graph in onnxruntime, on one thread of the CPU.

    Args:
        content: The bytes of an ONNX file.

    Raises:
        ValueError: onnxruntime cannot load the graph.
    """

    def __init__(self, content: bytes) -> None:
        runtime = require("onnxruntime", extra="export", purpose="running an ONNX graph")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4  # it logs what it raises too
        providers = ["CPUExecutionProvider"]
        try:
            self._session = runtime.InferenceSession(content, options, providers=providers)
        except Exception as error:
            # Its exception types have no base of their own.
            raise ValueError(
                f"onnxruntime cannot load the graph: {_first(error)}. "
                f"Use another opset or precision."
            ) from error
        first = self._session.get_inputs()[0]
        self.input: str = first.name
        self.half: bool = first.type == "tensor(float16)"

    def __call__(self, x: Tensor) -> list[Tensor]:
        """The outputs for one input, in float32.

        Raises:
            ValueError: The graph does not run on it.
        """
        fed = (x.half() if self.half else x.float()).contiguous().numpy()
        try:
            found = self._session.run(None, {self.input: fed})
        except Exception as error:
            raise ValueError(
                f"onnxruntime cannot run the graph on an input {list(x.shape)}: {_first(error)}."
            ) from error
        return [torch.from_numpy(output).float() for output in found]


def _first(error: Exception) -> str:
    """The first line of a message of onnxruntime's."""
    return str(error).strip().partition("\n")[0].rstrip(". ")


def tensors(output: Any) -> list[Tensor]:
    """The tensors of an output in float32, or float64, however it holds them."""
    if isinstance(output, Tensor):
        return [output if output.dtype == torch.float64 else output.float()]
    if isinstance(output, Mapping):
        return [tensor for value in output.values() for tensor in tensors(value)]
    if isinstance(output, (tuple, list)):
        return [tensor for value in output for tensor in tensors(value)]
    return []


def difference(
    shape: Sequence[int], expected: Sequence[Tensor], found: Sequence[Tensor]
) -> Difference:
    """Compares two lists of outputs; another number or shape of them is an infinite difference."""
    inf = float("inf")
    if [e.shape for e in expected] != [f.shape for f in found]:
        return Difference(tuple(shape), inf, inf)
    pairs = [(e, f) for e, f in zip(expected, found, strict=True) if e.numel()]
    if not pairs:
        return Difference(tuple(shape), 0.0, 0.0)
    # Not Python's max, which may leave a NaN out.
    largest = float(torch.stack([(e - f).abs().amax() for e, f in pairs]).amax())
    scale = float(torch.stack([e.abs().amax() for e, _ in pairs]).amax())
    return Difference(tuple(shape), largest, largest / max(scale, 1e-30))
