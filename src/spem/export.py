"""`to_onnx`: one ONNX file of a network, checked against it before it is written.

torch.export captures a copy, torch.onnx writes the graph, onnxruntime runs it for comparison.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spem.attention import ChannelAttention
from spem.attention.options import number
from spem.extras import first_line, rephrased, require
from spem.files import require_regular, write_atomic
from spem.insert import IdentityStart
from spem.insert.sites import default_input, tensors, unwrapped
from spem.models import ResNet
from spem.ops import use_impl
from spem.version import __version__

__all__ = ["Difference", "Exported", "Session", "difference", "tensors", "to_onnx"]

Precision = Literal["fp32", "fp16"]

TOLERANCE: dict[str, float] = {"fp32": 1e-3, "fp16": 3e-2}
"""Largest acceptable difference of the outputs, relative to their largest magnitude. In
float32 it is usually about 1e-6; gates that divide by a plane's deviation reach more."""

_STEP = 32
"""Pixels by which the second height differs, and half of those of the second width."""
_REMEDY = "Leave dynamic axes out, or pass tolerance= where the network itself is that sensitive."


@dataclass(frozen=True)
class Difference:
    """The difference between two programs' outputs on one input of this shape.

    ``largest`` is absolute; ``relative`` divides it by the first one's largest magnitude.
    """

    shape: tuple[int, ...]
    largest: float
    relative: float


@dataclass(frozen=True)
class Exported:
    """The file that `to_onnx` wrote; how often each operator occurs in it.

    ``differences`` are those from the PyTorch network in float32, one a checked input.
    """

    path: Path
    bytes: int
    precision: str
    opset: int
    operators: dict[str, int]
    differences: tuple[Difference, ...]


def to_onnx(
    model: nn.Module,
    path: str | Path,
    input_shape: Sequence[int] | None = None,
    *,
    example: Tensor | Sequence[int] | None = None,
    dynamic_batch: bool = True,
    dynamic_size: bool = False,
    opset: int | None = None,
    precision: Precision = "fp32",
    check: bool = True,
    tolerance: float | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Exported:
    """Write a network, or one of its modules, as ONNX, and check the graph with onnxruntime.

    A copy in evaluation mode on the CPU is exported, of standard operators. Attention whose
    identity start has alpha = 0 is left out, which changes no output. The graph is compared with
    the PyTorch network on the example, on a second batch if the batch is dynamic, and on a second
    height and width if they are; only then is the file written.

    Shape:
        input: [N, C, H, W], as the network takes it; outputs are the tensors that it returns.

    Args:
        model: A network, or an attention module alone, that takes one tensor.
        path: The file to write; its folder must exist.
        input_shape: Shape of a random example; None is the network's, or (1, 3, 224, 224).
        example: Your own input, or a shape; instead of ``input_shape``.
        dynamic_batch: Whether N may vary.
        dynamic_size: Whether H and W may vary; not for modules built for one map size.
        opset: ONNX opset; None is torch's default.
        precision: ``"fp16"`` exports weights, maps and input in half precision; gates are computed
            in float32 there too, and the check compares with the network in float32.
        check: Whether to check the graph with onnxruntime.
        tolerance: Largest difference relative to the largest output; None is 1e-3, fp16 3e-2.
        metadata: Entries next to ``spem_version``, ``spem_attention`` and ``spem_precision``.

    Raises:
        ImportError: The extra ``export`` is not installed.
        FileNotFoundError: There is no such folder.
        TypeError: ``model`` is not a module.
        ValueError: An unknown precision or opset; a network or module that cannot be exported so;
            a graph whose outputs differ from the network's. No file is written then.
    """
    for package in ("onnxscript", "onnxruntime", "onnx"):
        onnx: Any = require(package, extra="export", purpose="to_onnx")
    model = unwrapped(model)
    name, target = type(model).__name__, Path(path)
    if not isinstance(model, nn.Module):
        raise TypeError(f"to_onnx: needs a torch.nn.Module, got {name}.")
    if precision not in TOLERANCE:
        raise ValueError(f"to_onnx: precision={precision!r} is unknown. Use 'fp32' or 'fp16'.")
    limit = TOLERANCE[precision] if tolerance is None else tolerance
    number("to_onnx", tolerance=limit)
    require_regular(target, missing_ok=True)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"to_onnx: there is no folder {target.parent}. Make it first.")
    for key, module in model.named_modules() if dynamic_size else ():
        if isinstance(module, ChannelAttention) and (module.needs.size or module.needs.fixed_size):
            place = f"{key} ({module.name})" if key else module.name
            said = f"dynamic_size=True: {place} is built for maps of one size"
            raise ValueError(f"to_onnx: {said}. Leave dynamic_size=True out.")
    x = _example(model, input_shape if example is None else example)
    with rephrased(f"to_onnx: {name} cannot be copied to the CPU"):
        network, given = _without_idle(model).cpu().float(), x
    runs = rephrased(f"to_onnx: {name} does not run on an input {list(x.shape)}")
    with runs, torch.no_grad(), use_impl("reference"):
        network(x)
    if precision == "fp16":
        network, given = network.half(), x.half()
    proto, written = _converted(network, given, opset, batch=dynamic_batch, size=dynamic_size)
    _clean(proto.graph)
    about = {"version": __version__, "attention": _attention(network), "precision": precision}
    for key, value in ({f"spem_{k}": v for k, v in about.items()} | dict(metadata or {})).items():
        proto.metadata_props.add(key=str(key), value=str(value))
    onnx.checker.check_model(proto)
    content: bytes = proto.SerializeToString()
    found: tuple[Difference, ...] = ()
    if check:
        rng, (count, *rest) = torch.Generator().manual_seed(1), x.shape
        shapes = [[3 if count == 1 else 1, *rest]] * dynamic_batch
        larger = (extent + _STEP * axis for axis, extent in enumerate(rest))
        shapes += [[count, *larger]] * dynamic_size
        others = (torch.randn(shape, generator=rng).half().float() for shape in shapes)
        found = _compared(model, content, [given.float(), *others], limit)
    write_atomic(target, content)
    # Operators of another domain have its name.
    used = Counter("::".join(filter(None, (n.domain, n.op_type))) for n in proto.graph.node)
    return Exported(target, len(content), precision, written, dict(sorted(used.items())), found)


def _example(model: nn.Module, example: Tensor | Sequence[int] | None) -> Tensor:
    """A float32 input on the CPU; random ones are the same every time."""
    if isinstance(example, Tensor):
        if example.dim() < 3 or not example.is_floating_point():
            got = f"{example.dtype} {list(example.shape)}"
            raise ValueError(f"to_onnx: example={got} is not floating-point maps [N, C, H, W].")
        return example.detach().cpu().float()
    shape = default_input(model) if example is None else tuple(example)
    if len(shape) < 3 or not all(type(extent) is int and extent > 0 for extent in shape):
        remedy = "Use positive integers (N, C, H, W)."
        raise ValueError(f"to_onnx: {list(shape)} is not the shape of an input. {remedy}")
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _without_idle(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode without the attention that an alpha of 0 multiplies."""
    twin = copy.deepcopy(model).eval()
    for parent in list(twin.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, IdentityStart) and not child.alpha.detach():
                setattr(parent, name, nn.Identity())
    return twin


def _converted(
    model: nn.Module, example: Tensor, opset: int | None, *, batch: bool, size: bool
) -> tuple[Any, int]:
    """The ONNX graph of a network, tails of torch's operations; the version of its operators."""
    name = type(model).__name__
    if batch and example.shape[0] == 1:
        example = torch.cat([example, example])  # an axis of length one is taken for a constant
    axes = [0] * batch + list(range(2, example.dim())) * size
    dynamic = (dict.fromkeys(axes, torch.export.Dim.DYNAMIC),) if axes else None
    why, remedy = f"with an input {list(example.shape)}", ""
    if size:
        why, remedy = "with a dynamic height and width", "Leave dynamic_size=True out."
    elif batch:
        why, remedy = "with a dynamic batch", "Pass dynamic_batch=False."
    # Without gradients the extrema are plain reductions; with them they would carry indices.
    with (
        rephrased(f"to_onnx: {name} cannot be exported {why}", remedy),
        use_impl("reference"),
        torch.no_grad(),
    ):
        program = torch.export.export(model, (example,), dynamic_shapes=dynamic, strict=False)
    count = len(program.graph_signature.user_outputs)
    names = ["output"] if count == 1 else [f"output_{number}" for number in range(count)]
    options = {"input_names": ["input"], "output_names": names, "opset_version": opset}
    torch_onnx: Any = torch.onnx  # its annotations differ between the versions of torch
    try:
        proto = torch_onnx.export(program, dynamo=True, verbose=False, **options).model_proto
    except torch_onnx.OnnxExporterError as error:  # which says no more than the step that failed
        reason = first_line(error.__cause__ or error)
        raise ValueError(f"to_onnx: {name} has no ONNX graph: {reason}") from error
    written = next(entry.version for entry in proto.opset_import if not entry.domain)
    if opset not in (None, written):
        said = f"the graph of {name} cannot be written with opset={opset}, only with {written}"
        raise ValueError(f"to_onnx: {said}. Leave opset= out.")
    return proto, written


def _clean(graph: Any) -> None:
    """Remove the exporter's notes, which contain local paths, and name the axes."""
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info):
        part.ClearField("metadata_props")
    axes = graph.input[0].type.tensor_type.shape.dim
    spatial = ("height", "width") if len(axes) == 4 else tuple(f"axis{i}" for i in range(2, 5))
    wanted = zip(axes, ("batch", "channels", *spatial), strict=False)
    names = {axis.dim_param: name for axis, name in wanted if axis.dim_param}
    for value in (*graph.input, *graph.output, *graph.value_info):
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param:  # further on an expression of the input's
                axis.dim_param = re.sub(
                    r"[A-Za-z_]\w*", lambda found: names.get(found[0], found[0]), axis.dim_param
                )


def _attention(network: nn.Module) -> str:
    """The spec of one of our networks, else the names of the attention modules in the graph."""
    if isinstance(network, ResNet) and network.spec is not None:
        return str(network.spec)
    names = {part.name for part in network.modules() if isinstance(part, ChannelAttention)}
    return ", ".join(sorted(names - {""})) or "none"


def _compared(
    model: nn.Module, content: bytes, inputs: list[Tensor], limit: float
) -> tuple[Difference, ...]:
    """Compare the graph with the network as it was given, attention that is left out included."""
    network, session = copy.deepcopy(model).eval().cpu().float(), Session(content)
    refused, name = "to_onnx: nothing was written:", type(model).__name__
    remedy = "Leave dynamic_size=True out, or pass dynamic_batch=False."
    differences: list[Difference] = []
    for x in inputs:
        graph = f"{refused} the graph of {name} on {list(x.shape)}"
        runs = rephrased(f"{refused} {name} does not run on an input {list(x.shape)}", remedy)
        with runs, torch.no_grad(), use_impl("reference"):
            expected = tensors(network(x))
        if not all(tensor.isfinite().all() for tensor in expected):
            said = f"outputs of {name} on {list(x.shape)} are not finite, and cannot be compared"
            raise ValueError(f"{refused} {said}. Check its weights, or pass check=False.")
        with rephrased(graph, _REMEDY):
            found = difference(x.shape, expected, session(x))
        if not found.relative <= limit:  # a NaN too
            far = f"{found.relative:.2g} of the largest output, more than {limit:.2g}"
            raise ValueError(f"{graph} differs from PyTorch by {far}. {_REMEDY}")
        differences.append(found)
    return tuple(differences)


class Session:
    """An ONNX graph (the bytes of a file) in onnxruntime, on one thread; ValueError if damaged."""

    def __init__(self, content: bytes) -> None:
        runtime = require("onnxruntime", extra="export", purpose="running an ONNX graph")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4  # it logs what it raises too
        providers = ["CPUExecutionProvider"]
        with rephrased("onnxruntime cannot load the graph", "Use another opset or precision."):
            self._session = runtime.InferenceSession(content, options, providers=providers)
        first = self._session.get_inputs()[0]
        self.input: str = first.name
        self.half: bool = first.type == "tensor(float16)"

    def __call__(self, x: Tensor) -> list[Tensor]:
        """The outputs for one input, in float32; ValueError if the graph does not run on it."""
        fed = (x.half() if self.half else x.float()).contiguous().numpy()
        with rephrased(f"onnxruntime cannot run the graph on an input {list(x.shape)}"):
            found = self._session.run(None, {self.input: fed})
        return [torch.from_numpy(output).float() for output in found]


def difference(
    shape: Sequence[int], expected: Sequence[Tensor], found: Sequence[Tensor]
) -> Difference:
    """Compare two lists of outputs; if number or shapes differ, the difference is infinite."""
    if [e.shape for e in expected] != [f.shape for f in found]:
        return Difference(tuple(shape), float("inf"), float("inf"))
    zero = torch.zeros(1, dtype=torch.float64)
    one, two = (torch.cat([zero, *map(torch.ravel, each)]) for each in (expected, found))
    largest = float((one - two).abs().max())  # a NaN too, which Python's max may leave out
    return Difference(tuple(shape), largest, largest / max(float(one.abs().max()), 1e-30))
