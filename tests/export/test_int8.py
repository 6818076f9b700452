"""Static int8: which nodes become integers, how far the outputs move, what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from export.graphs import expected, loaded, maps, module, network, operators, ran

from spem.export import int8, quantize_onnx, to_onnx


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
    about = {entry.key: entry.value for entry in loaded(target).metadata_props}
    assert (about["spem_precision"], about["spem_attention"]) == ("int8", "spem")


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


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A graph of float32, as a file holds it; exporting one takes a second."""
    path = tmp_path_factory.mktemp("exported") / "in.onnx"
    to_onnx(network(module("se", 16)), path, (1, 3, 8, 8))
    return path.read_bytes()


@pytest.fixture
def source(exported: bytes, tmp_path: Path) -> Path:
    """That graph in a file of the test's own."""
    path = tmp_path / "in.onnx"
    path.write_bytes(exported)
    return path


def test_the_float32_file_is_not_written_over(source: Path, tmp_path: Path) -> None:
    content = source.read_bytes()
    for same in (source, tmp_path / "." / "in.onnx", tmp_path / ".." / tmp_path.name / "in.onnx"):
        with pytest.raises(ValueError, match="is the float32 file itself"):
            quantize_onnx(source, same, [maps(1, 3, 8, 8)])
    assert source.read_bytes() == content


@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_outputs_that_are_no_numbers(
    position: int, value: float, source: Path, tmp_path: Path
) -> None:
    """On any of the inputs: a NaN is larger than nothing, and would not be the maximum."""
    target = tmp_path / "out.onnx"
    inputs = [maps(1, 3, 8, 8, key=key) for key in range(2)]
    inputs[position][0, 0, 0, 0] = value
    with pytest.raises(ValueError, match=r"is not finite\. Give inputs"):
        quantize_onnx(source, target, inputs)
    assert not target.exists()


def test_an_int8_graph_that_gives_no_numbers(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its outputs are looked at too, on every input."""
    target = tmp_path / "out.onnx"

    class Broken(int8.Session):
        def __call__(self, x: torch.Tensor) -> list[torch.Tensor]:
            outputs = super().__call__(x)
            return [y * float("nan") for y in outputs] if self.quantised and len(x) > 1 else outputs

        def __init__(self, content: bytes) -> None:
            super().__init__(content)
            self.quantised = b"QuantizeLinear" in content

    monkeypatch.setattr(int8, "Session", Broken)
    with pytest.raises(ValueError, match=r"in int8 .* outputs that are not finite"):
        quantize_onnx(source, target, [maps(1, 3, 8, 8), maps(2, 3, 8, 8)])
    assert not target.exists()
