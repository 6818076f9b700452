"""A network with attention as an ONNX file that onnxruntime has run."""

import tempfile
from pathlib import Path

import torch

import spem

torch.manual_seed(0)
model = spem.resnet(11, classes=10, attention="se").eval()
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "se.onnx"
    exported = spem.to_onnx(model, path, (1, 3, 32, 32), dynamic_batch=True)
    for found in exported.differences:
        print(f"onnxruntime and PyTorch on {list(found.shape)}: {found.largest:.1e}")
    assert not {"TopK", "ScatterElements", "If"} & set(exported.operators)
    print(f"{path.stat().st_size:,} bytes")
