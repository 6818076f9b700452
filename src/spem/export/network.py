"""`to_onnx`: one ONNX file of a network, checked against it before it is written."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from spem.attention import ChannelAttention
from spem.export.capture import capture, refuse_fixed_sizes
from spem.export.checking import Difference, Session, difference, tensors
from spem.export.files import clean, content_of, operators_of, opset_of, write
from spem.export.folding import FoldedStart, folded
from spem.extras import require
from spem.insert.sites import default_input
from spem.models import ResNet
from spem.ops import use_impl

Precision = Literal["fp32", "fp16"]

TOLERANCE: dict[str, float] = {"fp32": 1e-3, "fp16": 3e-2}
"""Largest difference of the outputs, relative to their largest magnitude, that is no error. In
float32 it is some 1e-6 as a rule; gates that divide by the deviation of a plane go further."""

_STEP = 32
"""Pixels by which the second size differs in height, and twice that in width: hosts take
multiples."""

_OLDEST = 7
"""The oldest version of ONNX's operators that onnxruntime runs."""

_REMEDY = "Leave dynamic axes out, or pass tolerance= where the network itself is that sensitive."


@dataclass(frozen=True)
class Exported:
    """What `to_onnx` has written.

    Attributes:
        path: The file.
        bytes: Its size.
        precision: ``"fp32"`` or ``"fp16"``.
        opset: Version of the ONNX operators.
        operators: How often each operator occurs.
        differences: To the network in PyTorch in float32, per checked input; empty without check.
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
    """Writes a network, or a module of it, as ONNX, and checks the graph with onnxruntime.

    A copy in evaluation mode on the CPU is exported; the network stays as it is. The alpha of an
    identity start and the lambda of a learned mix are folded into constants; where alpha is 0 the
    attention is left out, which changes no output. Tails are composed of ONNX's standard operators.
    The graph runs in onnxruntime beside the network in PyTorch: on the example, on a second batch
    if the batch is dynamic, and on a second height and width if they are. The file appears whole,
    after that.

    Shape:
        input: [N, C, H, W], as the network takes it; outputs are the tensors that it returns.

    Args:
        model: A network, or an attention module alone, that takes one tensor.
        path: The file to write; its folder must exist.
        input_shape: Shape of a random example; None is what the network says it is made for, or
            (1, 3, 224, 224).
        example: An input of your own, or a shape; instead of ``input_shape``.
        dynamic_batch: Whether N may change.
        dynamic_size: Whether H and W may; not with modules that are built for one map size.
        opset: Version of ONNX's operators; None is what torch writes.
        precision: ``"fp16"`` exports weights, maps and input in half precision; gates are computed
            in float32 there too, and the check compares with the network in float32.
        check: Whether onnxruntime runs the graph.
        tolerance: Largest difference relative to the outputs' largest magnitude; None is 1e-3,
            for fp16 3e-2.
        metadata: Entries of the file's metadata, beside ``spem_version``, ``spem_attention`` and
            ``spem_precision``.

    Returns:
        Operators, size and differences of the file.

    Raises:
        ImportError: The extra ``export`` is not installed.
        FileNotFoundError: There is no such folder.
        TypeError: ``model`` is no module.
        ValueError: An unknown precision or opset; a module that is built for one map size, or a
            network that cannot be exported so; a graph whose outputs differ from the network's. No
            file is written then.
    """
    target = _target(model, path, precision, opset)
    if dynamic_size:
        refuse_fixed_sizes(model)
    x = _example(model, input_shape if example is None else example)
    network, given = folded(model).cpu().float(), x
    if precision == "fp16":
        network, given = network.half(), x.half()
    program = capture(network, given, batch=dynamic_batch, size=dynamic_size)
    proto = _converted(program, opset, type(model).__name__)
    clean(proto)
    from spem import __version__

    about = {
        "spem_version": __version__,
        "spem_attention": _attention(network),
        "spem_precision": precision,
    }
    for key, value in {**about, **(metadata or {})}.items():
        proto.metadata_props.add(key=key, value=value)
    content = content_of(proto, type(model).__name__)
    found: tuple[Difference, ...] = ()
    if check:
        limit = TOLERANCE[precision] if tolerance is None else tolerance
        inputs = _inputs(given.float(), batch=dynamic_batch, size=dynamic_size)
        found = _compared(model, content, inputs, limit)
    write(target, content)
    return Exported(target, len(content), precision, opset_of(proto), operators_of(proto), found)


def _target(model: nn.Module, path: str | Path, precision: str, opset: int | None) -> Path:
    """The path to write to, before any work is done."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        require(package, extra="export", purpose="to_onnx")
    if not isinstance(model, nn.Module):
        raise TypeError(f"to_onnx: needs a torch.nn.Module, got {type(model).__name__}.")
    if precision not in get_args(Precision):
        raise ValueError(
            f"to_onnx: precision={precision!r} is unknown. Use 'fp32' or 'fp16'; for int8, "
            f"quantize_onnx takes a float32 file."
        )
    newest: int = require("onnx", extra="export", purpose="to_onnx").defs.onnx_opset_version()
    if opset is not None and (type(opset) is not int or not _OLDEST <= opset <= newest):
        raise ValueError(
            f"to_onnx: opset={opset!r} is no integer from {_OLDEST} to {newest}. Leave it out."
        )
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"to_onnx: there is no folder {target.parent}. Make it first.")
    return target


def _example(model: nn.Module, example: Tensor | Sequence[int] | None) -> Tensor:
    """A float32 input on the CPU; random ones are the same every time."""
    if isinstance(example, Tensor):
        if example.dim() < 3 or not example.is_floating_point():
            raise ValueError(
                f"to_onnx: example must be floating-point maps [N, C, H, W], got {example.dtype} "
                f"{list(example.shape)}."
            )
        return example.detach().cpu().float()
    shape = default_input(model) if example is None else tuple(example)
    if len(shape) < 3 or not all(type(extent) is int and extent > 0 for extent in shape):
        raise ValueError(
            f"to_onnx: {list(shape)} is no shape of an input. Use positive integers (N, C, H, W)."
        )
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _inputs(x: Tensor, *, batch: bool, size: bool) -> list[Tensor]:
    """The example, and inputs of another batch and of another size if these may change."""
    rng = torch.Generator().manual_seed(1)
    count, *rest = x.shape
    shapes: list[list[int]] = []
    if batch:
        shapes.append([3 if count == 1 else 1, *rest])
    if size:
        steps = [0] + [_STEP * number for number in range(1, len(rest))]
        shapes.append([count, *(e + step for e, step in zip(rest, steps, strict=True))])
    others = [torch.randn(shape, generator=rng) for shape in shapes]
    return [x, *(other.to(torch.float16).float() for other in others)]


def _converted(program: torch.export.ExportedProgram, opset: int | None, name: str) -> Any:
    """The ONNX graph of a captured network."""
    torch_onnx: Any = torch.onnx  # its annotations differ between the versions of torch
    outputs = len(program.graph_signature.user_outputs)
    names = ["output"] if outputs == 1 else [f"output_{number}" for number in range(outputs)]
    options: dict[str, Any] = {"input_names": ["input"], "output_names": names, "optimize": True}
    if opset is not None:
        options["opset_version"] = opset
    try:
        proto = torch_onnx.export(program, dynamo=True, verbose=False, **options).model_proto
    except torch_onnx.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        raise ValueError(f"to_onnx: {name} has no ONNX graph: {reason}") from error
    if opset is not None and opset_of(proto) != opset:
        raise ValueError(
            f"to_onnx: the graph of {name} cannot be written with opset={opset}, only with "
            f"{opset_of(proto)}. Leave opset out."
        )
    return proto


def _attention(network: nn.Module) -> str:
    """The spec of one of our networks, else the names of the attention modules in the graph.

    Args:
        network: The folded one: what an alpha of 0 leaves out is not in the graph.
    """
    spec = getattr(network, "spec", None) if isinstance(network, ResNet) else None
    if spec is not None:
        return str(spec)
    names: set[str] = set()
    out: set[nn.Module] = set()
    for module in network.modules():  # a start comes before what is in it
        if isinstance(module, FoldedStart) and module.constant == 0.0:
            out.update(module.modules())
        elif isinstance(module, ChannelAttention) and module.name and module not in out:
            names.add(module.name)
    return ", ".join(sorted(names)) or "none"


def _compared(
    model: nn.Module, content: bytes, inputs: list[Tensor], limit: float
) -> tuple[Difference, ...]:
    """The graph beside the network; refuses a graph that differs.

    The network is not the folded one: what is compared has nothing in common but the weights.
    """
    network, session = copy.deepcopy(model).eval().cpu().float(), Session(content)
    differences: list[Difference] = []
    for x in inputs:
        try:
            with torch.no_grad(), use_impl("reference"):
                expected = tensors(network(x))
        except Exception as error:
            # Whatever the network raises on a size that it does not take.
            reason = str(error).strip().partition("\n")[0].rstrip(".")
            raise ValueError(
                f"to_onnx: nothing was written: {type(model).__name__} does not run on an input "
                f"{list(x.shape)}: {reason}. Leave dynamic_size out, or pass dynamic_batch=False."
            ) from error
        try:
            found = difference(x.shape, expected, session(x))
        except ValueError as error:
            raise ValueError(f"{_refused(model, x)}: {error} {_REMEDY}") from error
        if not found.relative <= limit:  # a NaN too
            raise ValueError(
                f"{_refused(model, x)} differs from PyTorch by {found.relative:.2g} of the largest "
                f"output, more than {limit:.2g}. {_REMEDY}"
            )
        differences.append(found)
    return tuple(differences)


def _refused(model: nn.Module, x: Tensor) -> str:
    return f"to_onnx: nothing was written: the graph of {type(model).__name__} on {list(x.shape)}"
