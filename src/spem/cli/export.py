"""`spem export`: trained weights, or an architecture with attention, as a checked ONNX file."""

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from spem.cli.output import print_json
from spem.extras import require

if TYPE_CHECKING:
    from torch import nn

    from spem.export import Exported

_REMEDY = "Name the architecture, --attention, --start and --classes that it was trained with."


def run(args: list[str]) -> None:
    """Run `spem export` with these arguments."""
    import tyro
    from tyro.conf import Positional

    def export(
        model: Positional[str],
        /,
        *,
        out: Path,
        attention: str | None = None,
        start: Literal["identity", "module"] = "identity",
        classes: int | None = None,
        weights: Path | None = None,
        size: int | None = None,
        dynamic_size: bool = False,
        fixed_batch: bool = False,
        precision: Literal["fp32", "fp16"] = "fp32",
        opset: int | None = None,
        json: bool = False,
    ) -> None:
        """Write a network as ONNX, after onnxruntime has run it beside PyTorch.

        Args:
            model: A .safetensors file or folder of a training, or an architecture of timm or
                torchvision, such as resnet50 or torchvision:resnet50.
            out: The ONNX file to write.
            attention: Attention to put into an architecture, such as spem.
            start: How gates start that no weights are loaded into, at one or as the module does.
            classes: Outputs of an architecture, as many as its weights were trained with; without
                it, the library's own number.
            weights: A .safetensors file with weights of the architecture; without it they are
                random.
            size: Side of the input in pixels; without it, what the network is made for.
            dynamic_size: Let height and width of the input change.
            fixed_batch: Keep the batch at one.
            precision: fp32, or fp16 with gates in float32.
            opset: Version of ONNX's operators; without it, what torch writes.
            json: Print JSON.
        """
        from spem.export import to_onnx

        given = None if size is None else (1, 3, size, size)
        source = _source(model, attention, start, classes, weights, given)
        exported = to_onnx(
            source.network,
            out,
            source.shape if given is None else given,
            dynamic_batch=not fixed_batch,
            dynamic_size=dynamic_size,
            precision=precision,
            opset=opset,
            metadata=source.about,
        )
        for note in source.notes:
            print(f"note: {note}", file=sys.stderr)
        if json:
            print_json({**dataclasses.asdict(exported), "path": str(exported.path)})
        else:
            _print(exported)

    tyro.cli(export, prog="spem export", args=args)


@dataclasses.dataclass(frozen=True)
class _Source:
    """A network to export, the shape of its input if it is known, and what is to be said."""

    network: "nn.Module"
    shape: tuple[int, ...] | None
    about: dict[str, str]
    notes: tuple[str, ...] = ()


def _source(
    model: str,
    attention: str | None,
    start: Literal["identity", "module"],
    classes: int | None,
    weights: Path | None,
    given: tuple[int, ...] | None,
) -> _Source:
    """What the command names: trained weights of spem, or an architecture."""
    path = Path(model)
    if path.is_dir():
        path /= "model.safetensors"
        if not path.is_file():
            raise FileNotFoundError(f"export: there is no model.safetensors in {model}.")
    if path.suffix == ".safetensors":
        if attention is not None or classes is not None or weights is not None:
            raise ValueError(
                "export: --attention, --classes and --weights belong to an architecture; trained "
                "weights of spem bring their own."
            )
        return _trained(path, given)
    from spem.insert.architectures import build

    if classes is not None and classes < 1:
        raise ValueError(f"export: --classes {classes} is no number of outputs. Use 1 or more.")
    options = {} if classes is None else {"num_classes": classes}
    network = build(model, options, asker="export")
    plain = set(network.state_dict())
    if attention is not None:
        from spem.insert import attach

        attach(network, attention, start=start, input_shape=given)
    added = set(network.state_dict()) - plain
    lacking = added
    notes: list[str] = []
    if weights is None:
        notes.append("random weights")
    else:
        lacking = _load(network, weights, plain)
        if lacking and lacking != added:
            raise ValueError(
                f"export: {weights} holds a part of the attention and lacks {min(lacking)}. "
                f"{_REMEDY}"
            )
    if added and lacking == added:
        where = "" if weights is None else f"no attention weights in {weights}: "
        if start == "identity":
            notes.append(f"{where}attention starts as the identity and is left out")
        elif where:
            notes.append(f"{where}attention has random weights")
    return _Source(network, None, {}, tuple(notes))


def _trained(path: Path, given: tuple[int, ...] | None) -> _Source:
    """Weights of a training, with what its images were normalised by."""
    from spem.data import NORMALISATION
    from spem.data.names import native_size
    from spem.training import load_weights

    if not path.is_file():
        raise FileNotFoundError(f"export: there is no file {path}.")
    network, config = load_weights(path)
    mean, std = NORMALISATION[config.data.normalisation]
    about = {
        "spem_model": f"resnet(depth={config.model.depth}, block={config.model.block})",
        "spem_data": config.data.name,
        "spem_mean": str(mean),
        "spem_std": str(std),
    }
    side = config.data.size or native_size(config.data.name)
    if side is None and given is None:
        raise ValueError(
            f"export: {path} does not say how large the images of {config.data.name} were. "
            f"Give --size."
        )
    return _Source(network, None if side is None else (1, 3, side, side), about)


def _load(network: "nn.Module", path: Path, plain: set[str]) -> set[str]:
    """Loads weights; all keys of the plain network must be there, those of attention may.

    Returns:
        The keys of attention that are not there.
    """
    safetensors = require("safetensors.torch", extra="hub", purpose="spem export --weights")
    if not path.is_file():
        raise FileNotFoundError(f"export: there is no file {path}.")
    try:
        state: dict[str, Any] = safetensors.load(path.read_bytes())
    except Exception as error:
        # safetensors has its own exception types for broken files.
        raise ValueError(f"export: {path} is damaged or no safetensors file.") from error
    try:
        missing, unexpected = network.load_state_dict(state, strict=False)
    except RuntimeError as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(f"export: {path} does not fit: {reason}. {_REMEDY}") from error
    lacking = sorted(plain.intersection(missing))
    if lacking or unexpected:
        what = f"lacks {lacking[0]}" if lacking else f"holds {unexpected[0]} too"
        raise ValueError(
            f"export: {path} {what}: it belongs to another architecture or attention. {_REMEDY}"
        )
    return set(missing)


def _print(exported: "Exported") -> None:
    counts = ", ".join(f"{name} {count}" for name, count in exported.operators.items())
    print(
        f"{exported.path}: {exported.bytes:,} bytes, {exported.precision}, opset {exported.opset}"
    )
    print(f"operators: {counts}")
    for found in exported.differences:
        shape = " x ".join(map(str, found.shape))
        print(
            f"onnxruntime and PyTorch on {shape}: largest difference {found.largest:.3g}, "
            f"{found.relative:.2g} of the largest output"
        )
