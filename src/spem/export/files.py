"""ONNX files: what stands in one, and writing it whole or not at all."""

import contextlib
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

from spem.extras import require


def opset_of(proto: Any) -> int:
    """The version of ONNX's own operators in a graph."""
    return next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))


def operators_of(proto: Any) -> dict[str, int]:
    """How often each operator occurs in a graph; one of another domain with the domain's name."""
    names = Counter(
        f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        for node in proto.graph.node
    )
    return dict(sorted(names.items()))


def clean(proto: Any) -> None:
    """Takes out what the exporter notes on every node, and gives the input's axes their names.

    The notes hold the paths of source files on the machine that exported; a file that is passed on
    has no use for them.
    """
    graph = proto.graph
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info):
        part.ClearField("metadata_props")
    axes = graph.input[0].type.tensor_type.shape.dim
    spatial = ("height", "width") if len(axes) == 4 else tuple(f"axis{i}" for i in range(2, 5))
    wanted = dict(enumerate(("batch", "channels", *spatial)))
    names = {axis.dim_param: wanted[i] for i, axis in enumerate(axes) if axis.dim_param}
    for value in (*graph.input, *graph.output, *graph.value_info):
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param:
                # Axes further on are written as expressions of the input's.
                axis.dim_param = re.sub(
                    r"[A-Za-z_]\w*", lambda found: names.get(found[0], found[0]), axis.dim_param
                )


def content_of(proto: Any, name: str) -> bytes:
    """The bytes of a graph that is a valid one.

    Raises:
        ValueError: It is larger than a file of the format may be.
    """
    onnx = require("onnx", extra="export", purpose="writing an ONNX file")
    if proto.ByteSize() >= onnx.checker.MAXIMUM_PROTOBUF:
        raise ValueError(
            f"to_onnx: {name} needs {proto.ByteSize():,} bytes, more than one ONNX file holds. "
            f"Use precision='fp16'."
        )
    onnx.checker.check_model(proto)
    return proto.SerializeToString()


def write(path: Path, content: bytes) -> None:
    """Writes a file such that a reader finds the old content or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        if isinstance(error, OSError):
            error.filename = str(path)  # not the temporary name, which nobody asked for
        raise
