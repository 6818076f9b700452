"""`spem export`: trained weights, or an architecture with attention, as a checked ONNX file."""

from __future__ import annotations

import dataclasses
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from spem.cli.network import Named, Network, SkipBroken, load_network
from spem.cli.options import RARE, Json
from spem.cli.output import new_file, print_json, shown

if TYPE_CHECKING:
    from spem.insert.fold import FoldReport

_FOLDED_OVER = 512
_FOLD = "make gates constants: their mean over these images"
_ROOT = "folder that holds the named sets, for --fold"


def run(
    network: Named,
    *,
    out: Annotated[Path | None, "FILE", "the ONNX file to write", new_file] = None,
    fold: Annotated[str | None, "SET", _FOLD] = None,
    dynamic_size: Annotated[bool, "let height and width of the input change"] = False,
    fixed_batch: Annotated[bool, "keep the batch at one"] = False,
    precision: Annotated[Literal["fp32", "fp16"], "fp16 with gates in float32"] = "fp32",
    opset: Annotated[int | None, "N", "version of ONNX's operators", RARE] = None,
    root: Annotated[Path | None, "DIR", _ROOT, RARE] = None,
    skip_broken: SkipBroken = False,
    json: Json = False,
    **named: Annotated[Any, load_network],
) -> None:
    """Write a network as ONNX, checked by running it in onnxruntime and PyTorch."""
    if out is None:
        raise ValueError("nowhere to write. Give --out FILE, such as --out network.onnx.")
    images: dict[str, Any] = {"root": root, "skip_broken": skip_broken}
    if fold is not None:  # before torch is loaded
        from spem.data import check_images

        check_images(fold, size=named["size"] or 16, **images)  # or the network's own size
    from spem.export import to_onnx
    from spem.insert import IdentityStart

    found = load_network(network, **named)
    weights = named["weights"]
    starts = [part for part in found.model.modules() if isinstance(part, IdentityStart)]
    closed = bool(starts) and not any(part.alpha.any() for part in starts)
    if closed:
        what = f"has no weights in {weights}" if found.lacking else "starts as the identity"
        raise ValueError(
            f"the attention {what}, so the file would hold no attention. Give --weights with "
            "trained attention, or --start module for a random one."
        )
    if found.lacking:
        print(f"note: attention has no weights in {weights}, it is random", file=sys.stderr)
    if found.random:
        print(f"note: {network} has random weights", file=sys.stderr)
    report = None if fold is None else _folded(found, fold, **images)
    about = {"spem_mean": str(found.mean), "spem_std": str(found.std)}
    if found.config is not None:
        model = found.config.model
        about["spem_model"] = f"resnet(depth={model.depth}, block={model.block})"
        about["spem_data"] = found.config.data.name
    for package in ("onnxscript", "torch.onnx"):  # they log what to_onnx says in a sentence
        logging.getLogger(package).setLevel(logging.ERROR)
    how: dict[str, Any] = {"dynamic_batch": not fixed_batch, "dynamic_size": dynamic_size}
    how |= {"precision": precision, "opset": opset, "metadata": about}
    exported = to_onnx(found.model, out, found.shape(), **how)
    if json:
        folded = None if report is None else dataclasses.asdict(report)
        print_json({**dataclasses.asdict(exported), "path": str(exported.path), "folded": folded})
        return
    if report is not None:
        print(f"folded over training images of {fold}, no attention is left:\n{report}\n")
    size_and_kind = f"{exported.bytes:,} bytes, {exported.precision}, opset {exported.opset}"
    print(f"{exported.path}: {size_and_kind}")
    print("operators:", ", ".join(f"{name} {n}" for name, n in exported.operators.items()))
    for each in exported.differences:
        share = f"{each.largest:.3g}, {each.relative:.2g} of the largest output"
        print(f"onnxruntime and PyTorch on {shown(each.shape)}: largest difference {share}")


def _folded(found: Network, name: str, **how: Any) -> FoldReport:
    """Makes the gates of a network constants, by a few hundred training images."""
    import torch

    from spem.data import load_images, normalise
    from spem.insert import fold
    from spem.seeding import keyed_generator

    images = load_images(name, "train", size=found.size, **how)
    found.require_classes(images)
    order = torch.randperm(len(images), generator=keyed_generator(0, "fold"))[:_FOLDED_OVER]
    few = images.take(order)
    batches = normalise(few.images, found.mean, found.std).split(32)
    outputs = found.model(batches[0][:1])
    labelled = isinstance(outputs, torch.Tensor) and outputs.shape[1:] == (len(images.classes),)
    return fold(found.model, batches, few.labels if labelled else None)
