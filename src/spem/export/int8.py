"""`quantize_onnx`: an ONNX file with integer weights, and how far it is from its source."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spem.export.checking import Difference, Session, difference
from spem.export.files import operators_of, write
from spem.extras import require

if TYPE_CHECKING:
    import numpy as np

LAYERS = ("Conv", "Gemm", "MatMul")
"""Operators with weights, which hold nearly all of a network's arithmetic."""


@dataclass(frozen=True)
class Quantized:
    """What `quantize_onnx` has written.

    Attributes:
        path: The file.
        bytes: Its size.
        operators: How often each operator occurs.
        quantized: How many nodes of each operator read integers.
        floating: How many nodes of each operator stayed in floating point.
        difference: To the float32 file, on the calibration input where it is largest.
    """

    path: Path
    bytes: int
    operators: dict[str, int]
    quantized: dict[str, int]
    floating: dict[str, int]
    difference: Difference


def quantize_onnx(
    path_in: str | Path,
    path_out: str | Path,
    calibration: Iterable[np.ndarray[Any, Any] | Tensor],
    *,
    operators: Sequence[str] = LAYERS,
) -> Quantized:
    """Quantises a float32 ONNX file to int8, statically, with QuantizeLinear nodes.

    Formula:
        q = round(x / s) + z, s and z from the smallest and largest value of a map over the
        calibration inputs; weights symmetric with one s per output channel, z = 0.

    Only the layers with weights compute in int8, those of a gate included; pools, what else a gate
    computes, norms that are not part of a convolution, and additions stay in float32
    (`Quantized.floating` counts them). How far the outputs move depends on network and data, so it
    is reported, not refused.

    Args:
        path_in: A file of `to_onnx` with ``precision="fp32"``.
        path_out: The file to write.
        calibration: Inputs [N, C, H, W] of the kind that the network will meet, one batch each.
        operators: The ONNX operators to quantise.

    Raises:
        ImportError: The extra ``export`` is not installed.
        FileNotFoundError: There is no such file or folder.
        ValueError: The file is no ONNX graph or not in float32, holds none of the operators, or
            there is no calibration input that it can run on; ``path_out`` is ``path_in``; outputs
            are not finite. No file is written then.
    """
    source, target = Path(path_in), Path(path_out)
    content = _content(source)
    if target.exists() and target.samefile(source):
        raise ValueError(
            f"quantize_onnx: {target} is the float32 file itself. Name another file to write."
        )
    if not target.parent.is_dir():
        raise FileNotFoundError(f"quantize_onnx: there is no folder {target.parent}.")
    inputs = [torch.as_tensor(x).detach().cpu().float() for x in calibration]
    if not inputs:
        raise ValueError(
            "quantize_onnx: calibration is empty. Give inputs of the kind the network will meet."
        )
    before = Session(content)
    if before.half:
        raise ValueError(
            f"quantize_onnx: {source} is in fp16. Export it with precision='fp32' first."
        )
    try:
        expected = [before(x) for x in inputs]
    except ValueError as error:
        raise ValueError(
            f"quantize_onnx: calibration: {error} Give inputs of the shape that {source} takes."
        ) from error
    for x, outputs in zip(inputs, expected, strict=True):
        if not (_finite([x]) and _finite(outputs)):
            raise ValueError(
                f"quantize_onnx: a calibration input {list(x.shape)}, or what {source} makes of "
                f"it, is not finite. Give inputs of the kind the network will meet."
            )
    quantized = _quantized(content, inputs, before.input, operators)
    onnx = require("onnx", extra="export", purpose="quantize_onnx")
    proto = onnx.load_from_string(quantized)
    integer, floating = _split(proto, operators)
    if not integer:
        raise ValueError(
            f"quantize_onnx: {source} holds none of {', '.join(operators)}; nothing would be "
            f"quantised."
        )
    about = {entry.key: entry.value for entry in proto.metadata_props}
    onnx.helper.set_model_props(proto, {**about, "spem_precision": "int8"})
    quantized = proto.SerializeToString()
    after = Session(quantized)
    found = [after(x) for x in inputs]
    if not all(map(_finite, found)):
        raise ValueError(
            f"quantize_onnx: in int8 {source} has outputs that are not finite; nothing was "
            f"written. Give calibration inputs of the kind the network will meet."
        )
    differences = [
        difference(x.shape, e, f) for x, e, f in zip(inputs, expected, found, strict=True)
    ]
    write(target, quantized)
    worst = max(differences, key=lambda found: found.relative)
    return Quantized(target, len(quantized), operators_of(proto), integer, floating, worst)


def _finite(tensors: Sequence[Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def _content(path: Path) -> bytes:
    """The bytes of an ONNX file."""
    onnx = require("onnx", extra="export", purpose="quantize_onnx")
    require("onnxruntime", extra="export", purpose="quantize_onnx")
    if not path.is_file():
        raise FileNotFoundError(f"quantize_onnx: there is no file {path}.")
    content = path.read_bytes()
    try:
        onnx.checker.check_model(onnx.load_from_string(content))
    except Exception as error:
        # protobuf and onnx report damage by exception types of their own.
        raise ValueError(
            f"quantize_onnx: {path} is damaged or no ONNX file. Export it again."
        ) from error
    return content


def _quantized(content: bytes, inputs: list[Tensor], name: str, operators: Sequence[str]) -> bytes:
    """onnxruntime's static quantisation, in a folder of its own: it writes beside what it reads."""
    quantization = require("onnxruntime.quantization", extra="export", purpose="quantize_onnx")
    shapes = require("onnxruntime.quantization.shape_inference", extra="export", purpose="int8")

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self._feeds: Iterator[dict[str, Any]] = ({name: x.numpy()} for x in inputs)

        def get_next(self) -> dict[str, Any] | None:
            return next(self._feeds, None)

    with tempfile.TemporaryDirectory(prefix="spem-int8-") as folder:
        plain, prepared, result = (Path(folder) / f"{n}.onnx" for n in ("in", "prepared", "out"))
        plain.write_bytes(content)
        shapes.quant_pre_process(str(plain), str(prepared), skip_symbolic_shape=True)
        quantization.quantize_static(
            str(prepared),
            str(result),
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=list(operators),
            per_channel=True,
        )
        return result.read_bytes()


def _split(proto: Any, operators: Sequence[str]) -> tuple[dict[str, int], dict[str, int]]:
    """Nodes that read integers, and those that compute in floating point, per operator."""
    made_by = {name: node.op_type for node in proto.graph.node for name in node.output}
    integer: Counter[str] = Counter()
    floating: Counter[str] = Counter()
    for node in proto.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear", "Constant"):
            continue
        reads = [made_by.get(name) for name in node.input[:1]]
        quantized = node.op_type in operators and reads == ["DequantizeLinear"]
        (integer if quantized else floating)[node.op_type] += 1
    return dict(sorted(integer.items())), dict(sorted(floating.items()))
