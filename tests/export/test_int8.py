"""Static int8: which nodes become integers, how far the outputs move, what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from export.graphs import expected, maps, module, network, operators, ran

from spem.export import quantize_onnx, to_onnx


def test_quantised(tmp_path: Path) -> None:
    model = network(module("spem", 16))
    source, target = tmp_path / "float.onnx", tmp_path / "int8.onnx"
    to_onnx(model, source, (1, 3, 12, 12))
    inputs = [maps(4, 3, 12, 12, key=key) for key in range(4)]
    result = quantize_onnx(source, target, [inputs[0].numpy(), *inputs[1:]])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["float.onnx", "int8.onnx"]
    assert result.quantized == {"Conv": 1, "Gemm": 1}
    assert result.floating["Sigmoid"] == 2  # the gate
    assert {"Conv", "Gemm"}.isdisjoint(result.floating)
    found = operators(target)
    assert {"QuantizeLinear", "DequantizeLinear"} <= set(found)
    errors = [relative(ran(target, x), ran(source, x)) for x in inputs]
    assert result.difference.relative == pytest.approx(max(errors), rel=1e-3)
    assert 1e-4 < max(errors) < 0.1
    fresh = maps(4, 3, 12, 12, key="fresh")
    assert relative(ran(target, fresh), expected(model, fresh)) < 0.1
    assert result.bytes == target.stat().st_size


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def test_refused(tmp_path: Path) -> None:
    source, target = tmp_path / "in.onnx", tmp_path / "out.onnx"
    x = [maps(1, 3, 8, 8)]
    with pytest.raises(FileNotFoundError, match=r"there is no file .*in.onnx"):
        quantize_onnx(source, target, x)
    source.write_bytes(b"no graph at all")
    with pytest.raises(ValueError, match=r"is damaged or no ONNX file\. Export it again"):
        quantize_onnx(source, target, x)
    to_onnx(torch.nn.ReLU(), source, (1, 3, 8, 8))
    with pytest.raises(ValueError, match="calibration is empty"):
        quantize_onnx(source, target, [])
    with pytest.raises(ValueError, match="holds none of Conv, Gemm, MatMul"):
        quantize_onnx(source, target, x)
    with pytest.raises(
        ValueError, match=r"calibration: .*\[1, 4, 8, 8\].* Give inputs of the shape"
    ):
        quantize_onnx(source, target, [maps(1, 4, 8, 8)])
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        quantize_onnx(source, tmp_path / "nowhere" / "out.onnx", x)
    to_onnx(torch.nn.ReLU(), source, (1, 3, 8, 8), precision="fp16")
    with pytest.raises(ValueError, match="is in fp16"):
        quantize_onnx(source, target, x)
    assert not target.exists()
