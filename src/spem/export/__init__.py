"""Networks for other runtimes: ONNX files that were run beside the network they came from."""

from spem.export.checking import Difference, difference, tensors
from spem.export.folding import FoldedStart, folded
from spem.export.int8 import Quantized, quantize_onnx
from spem.export.network import Exported, to_onnx

__all__ = [
    "Difference",
    "Exported",
    "FoldedStart",
    "Quantized",
    "difference",
    "folded",
    "quantize_onnx",
    "tensors",
    "to_onnx",
]
