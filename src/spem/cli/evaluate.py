"""`spem eval`: accuracy of a network on the test images of its data set, or of another."""

from __future__ import annotations

import contextlib
import csv
import io
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from spem.cli.network import Network, add_network, add_start, load_network
from spem.cli.options import Options, UsageError, one_of
from spem.cli.output import print_json, say

if TYPE_CHECKING:
    from spem.data import ImageSet


def options() -> Options:
    """What the command takes."""
    o = Options(
        "eval", "Accuracy of a network on test images, in float32, normalised as in training."
    )
    add_network(o)
    add_start(o)
    o.add("--data", "SET", "images; without it those the weights were trained on")
    o.add("--root", "DIR", "folder that holds the named data sets", kind=Path)
    o.add("--device", "auto|cpu|cuda", "where", kind=one_of("auto", "cpu", "cuda"), default="auto")
    o.add("--predictions", "CSV", "write label and prediction of every image here", kind=Path)
    return o.json()


def run(
    *,
    network: str,
    attention: str | None,
    start: str | None,
    weights: Path | None,
    classes: int | None,
    size: int | None,
    data: str | None,
    root: Path | None,
    device: str,
    predictions: Path | None,
    json: bool,
) -> None:
    """Evaluate, and print the accuracy."""
    if data is not None:  # before torch is loaded
        from spem.data import check_images

        check_images(data, root=root, size=size)
    if predictions is not None and not predictions.parent.is_dir():
        raise UsageError(f"--predictions: there is no folder {predictions.parent}.")
    import torch

    from spem.files import require_regular, write_atomic
    from spem.training import evaluate
    from spem.training.evaluation import predict
    from spem.training.step import stored_impl

    if predictions is not None:
        require_regular(predictions, missing_ok=True)
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: this machine has none that torch can use. Use cpu.")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    found = load_network(
        network, attention=attention, start=start, classes=classes, weights=weights, size=size
    )
    images = _images(found, network, data, root)
    model = found.model.to(device)
    _require_outputs(found, images, device)
    as_trained = contextlib.nullcontext()
    if found.config is not None and found.impl is not None:
        runtime = replace(found.config.runtime, impl=found.impl)
        as_trained = stored_impl(runtime, device, lambda text: print(text, file=sys.stderr))
    how = found.mean, found.std
    with as_trained:
        accuracy = evaluate(model, images, normalisation=how)
        if not math.isfinite(accuracy.loss):
            raise FloatingPointError(
                f"the outputs of {network} are not finite numbers, so it has no accuracy. "
                f"Train it again, with a lower rate."
            )
        if predictions is not None:
            answers = predict(model, images, normalisation=how)
            write_atomic(predictions, _csv(images, answers.tolist()))
    config = found.config
    if json:
        print_json(
            {
                "network": network,
                "attention": attention if config is None else config.model.attention,
                "depth": None if config is None else config.model.depth,
                "seed": None if config is None else config.seed,
                "id": None if config is None else config.id,
                "data": images.name,
                "data_sha256": images.sha256,
                "accuracy": accuracy.top1,
                "correct": accuracy.correct,
                "count": accuracy.count,
                "loss": accuracy.loss,
            }
        )
        return
    seed = "" if config is None else f", seed {config.seed}"
    say(f"{network}: {found.text}{seed}{', random weights' * found.random}")
    share = f"{accuracy.correct}/{accuracy.count}, loss {accuracy.loss:.4f}"
    print(f"{accuracy.top1:.2f} % of {images.name}'s test images ({share})")
    print(f"SHA-256 of the decoded images: {images.sha256[:16]}")
    if predictions is not None:
        print(f"predictions: {predictions}")


def _images(found: Network, network: str, data: str | None, root: Path | None) -> ImageSet:
    """The test images, checked against what the network was trained on."""
    from spem.data import load_images
    from spem.training import load_test_images

    if found.config is not None:
        config = found.config
        if data is not None and found.size != config.data.size and config.data.size is None:
            config = replace(config, data=replace(config.data, size=found.size))
        images = load_test_images(config, found.data, name=data, root=root)
        found.require_classes(images)
        return images
    if data is None:
        raise UsageError(f"{network} does not say which images it was trained on. Give --data.")
    images = load_images(data, "test", root=root, size=found.size)
    found.require_classes(images)
    return images


def _require_outputs(found: Network, images: ImageSet, device: str) -> None:
    """Raises ValueError unless the network answers with one number for every class."""
    import torch

    with torch.no_grad():
        output = found.model.eval()(images.images[:1].to(device) / 255.0)
    shape = list(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
    if shape != [1, len(images.classes)]:
        remedy = "Use the data set it was trained on."
        if found.config is None:
            remedy = f"Give --classes {len(images.classes)}, with weights trained on these."
        raise ValueError(
            f"the network answers {shape} for one image, {images.name} has {len(images.classes)} "
            f"classes. {remedy}"
        )


def _csv(images: ImageSet, answers: list[int]) -> bytes:
    """One row per image, in the order of the set."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["index", "label", "prediction", "label_name", "prediction_name"])
    names = images.classes
    for i, (label, answer) in enumerate(zip(images.labels.tolist(), answers, strict=True)):
        writer.writerow([i, label, answer, names[label], names[answer]])
    return text.getvalue().encode()
