"""A network with attention as an ONNX file that was run beside it, and its int8 version."""

import tempfile
from pathlib import Path

import torch

import spem
from spem.export import quantize_onnx

torch.manual_seed(0)
model = spem.resnet(11, classes=10, attention="se").eval()
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "se.onnx"
    exported = spem.to_onnx(model, path, (1, 3, 32, 32), dynamic_batch=True)
    for found in exported.differences:
        print(f"onnxruntime and PyTorch on {list(found.shape)}: {found.largest:.1e}")
    assert not {"TopK", "ScatterElements", "If"} & set(exported.operators)

    images = [torch.randn(4, 3, 32, 32) for _ in range(2)]  # of the kind the network will meet
    quantize_onnx(path, Path(folder) / "se-int8.onnx", images)
    print(
        f"{path.stat().st_size:,} bytes, {(Path(folder) / 'se-int8.onnx').stat().st_size:,} in int8"
    )
