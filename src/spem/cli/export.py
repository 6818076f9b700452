"""`spem export`: trained weights, or an architecture with attention, as a checked ONNX file."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from spem.cli.network import add_network, add_start, load_network
from spem.cli.options import Options, UsageError, integer, one_of
from spem.cli.output import print_json

if TYPE_CHECKING:
    from spem.cli.network import Network
    from spem.export import Exported
    from spem.insert.fold import FoldReport

_FOLDED_OVER = 512


def options() -> Options:
    """What the command takes."""
    o = Options("export", "Write a network as ONNX, after onnxruntime has run it beside PyTorch.")
    add_network(o)
    add_start(o)
    o.add("--out", "FILE", "the ONNX file to write", kind=Path)
    o.add("--fold", "SET", "make gates constants: their mean over training images of this set")
    o.flag("--dynamic-size", "let height and width of the input change")
    o.flag("--fixed-batch", "keep the batch at one")
    kind = one_of("fp32", "fp16")
    o.add("--precision", "fp32|fp16", "fp16 with gates in float32", kind=kind, default="fp32")
    o.add("--opset", "N", "version of ONNX's operators", kind=integer(1), rare=True)
    return o.json()


def run(
    *,
    network: str,
    attention: str | None,
    start: str | None,
    weights: Path | None,
    classes: int | None,
    size: int | None,
    out: Path | None,
    fold: str | None,
    dynamic_size: bool,
    fixed_batch: bool,
    precision: Literal["fp32", "fp16"],
    opset: int | None,
    json: bool,
) -> None:
    """Write the file, and say what is in it and how far it is from the network."""
    if out is None:
        raise UsageError("nowhere to write. Give --out FILE, such as --out network.onnx.")
    if fold is not None:  # before torch is loaded
        from spem.data import check_images

        check_images(fold, size=size)
    from spem.export import to_onnx

    found = load_network(
        network, attention=attention, start=start, classes=classes, weights=weights, size=size
    )
    if attention not in (None, "none") and (weights is None or found.lacking):
        what = "has no weights" if weights is None else f"has no weights in {weights}"
        if start != "module":
            raise ValueError(
                f"--attention {attention} {what} and starts as the identity, so the file would "
                f"hold no attention. Give --weights with trained attention, or --start module for "
                f"a random one."
            )
        if weights is not None:
            print(f"note: attention {what}, it is random", file=sys.stderr)
    if found.random:
        print(f"note: {network} has random weights", file=sys.stderr)
    report = None if fold is None else _folded(found, fold)
    about: dict[str, str] = {}
    if found.config is not None:
        model, data = found.config.model, found.config.data
        about = {
            "spem_model": f"resnet(depth={model.depth}, block={model.block})",
            "spem_data": data.name,
        }
    exported = to_onnx(
        found.model,
        out,
        found.shape(),
        dynamic_batch=not fixed_batch,
        dynamic_size=dynamic_size,
        precision=precision,
        opset=opset,
        metadata={**about, "spem_mean": str(found.mean), "spem_std": str(found.std)},
    )
    if json:
        folded = None if report is None else dataclasses.asdict(report)
        print_json({**dataclasses.asdict(exported), "path": str(exported.path), "folded": folded})
        return
    if report is not None:
        print(f"folded over training images of {fold}, no attention is left:\n{report}\n")
    _print(exported)


def _folded(found: Network, name: str) -> FoldReport:
    """Makes the gates of a network constants, by a few hundred training images."""
    import torch

    from spem.data import load_images, normalise
    from spem.insert import fold
    from spem.seeding import keyed_generator

    images = load_images(name, "train", size=found.size)
    found.require_classes(images)
    order = torch.randperm(len(images), generator=keyed_generator(0, "fold"))[:_FOLDED_OVER]
    few = images.take(order)
    shown = normalise(few.images, found.mean, found.std).split(32)
    outputs = found.model(shown[0][:1])
    labelled = isinstance(outputs, torch.Tensor) and outputs.shape[1:] == (len(images.classes),)
    return fold(found.model, shown, few.labels if labelled else None)


def _print(exported: Exported) -> None:
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
