"""An ONNX file in int8, by onnxruntime's own quantiser, and how far its outputs move.

The layers with weights compute in integers, those of a gate included; pools and the rest of a gate
stay in float32. How far the outputs move depends on network and data: use images of yours, some
for calibration and others to compare.
"""

import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

import spem
from spem.export import Session, difference

logging.disable(logging.WARNING)  # the quantiser asks for the preparation that is done here
torch.manual_seed(0)
model = spem.resnet(11, classes=10, attention="spem").eval()
images = [torch.randn(4, 3, 32, 32) for _ in range(3)]  # of the kind the network will meet


class Calibration(CalibrationDataReader):
    """Hands the quantiser one batch after the other."""

    def __init__(self) -> None:
        self.left = [{"input": batch.numpy()} for batch in images[:-1]]

    def get_next(self) -> dict[str, Any] | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.left.pop() if self.left else None


with tempfile.TemporaryDirectory() as folder:
    full, prepared, small = (Path(folder) / name for name in ("f.onnx", "p.onnx", "int8.onnx"))
    spem.to_onnx(model, full, (1, 3, 32, 32))
    quant_pre_process(full, prepared, skip_symbolic_shape=True)  # norms go into convolutions
    quantize_static(
        prepared,
        small,
        Calibration(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["Conv", "Gemm", "MatMul"],
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    before, after = (Session(path.read_bytes())(images[-1]) for path in (full, small))
    moved = difference(images[-1].shape, before, after)
    print(f"{full.stat().st_size:,} bytes, {small.stat().st_size:,} in int8")
    print(f"outputs move by {100 * moved.relative:.1f} % of the largest")
    assert moved.relative < 0.2
