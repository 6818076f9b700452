"""`spem eval`: accuracy of a network on the test images of its data set, or of another."""

from __future__ import annotations

import csv
import io
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from spem.cli.network import add_network, add_start, load_network
from spem.cli.options import Options, one_of
from spem.cli.output import print_json

if TYPE_CHECKING:
    from spem.data import ImageSet
    from spem.models import ResNet


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
    o.add("--sha256", "SUM", "expected SHA-256 of the test split's files", rare=True)
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
    sha256: str | None,
    json: bool,
) -> None:
    """Evaluate, and print the accuracy."""
    from spem.data import load_images
    from spem.training import evaluate
    from spem.training.choose_impl import stored_impl

    found = load_network(
        network, attention=attention, start=start, classes=classes, weights=weights, size=size
    )
    config, model = found.config, found.model
    own = config is not None and (data is None or data == config.data.name)
    name = config.data.name if data is None and config is not None else data
    if name is None:
        raise ValueError(f"{network} does not say which images it was trained on. Give --data.")
    images = load_images(
        name, "test", root=root, size=config.data.size if own else None, sha256=sha256
    )
    if len(images.classes) != model.classes:
        raise ValueError(
            f"{network} tells {model.classes} classes apart, {name} has "
            f"{len(images.classes)}. Use the data set it was trained on."
        )
    normalisation = config.data.normalisation
    with stored_impl(config.runtime, "cpu", lambda text: print(text, file=sys.stderr)):
        accuracy = evaluate(model, images, normalisation=normalisation)
        if not math.isfinite(accuracy.loss):
            raise FloatingPointError(
                f"the outputs of {network} are not finite numbers, so it has no accuracy. "
                f"Train it again, with a lower rate."
            )
        if predictions is not None:
            _write_predictions(predictions, model, images, normalisation)
    if json:
        print_json(
            {
                "weights": network,
                "attention": config.model.attention,
                "depth": config.model.depth,
                "seed": config.seed,
                "id": config.id,
                "data": name,
                "data_sha256": images.sha256,
                "accuracy": accuracy.top1,
                "correct": accuracy.correct,
                "count": accuracy.count,
                "loss": accuracy.loss,
            }
        )
        return
    share = f"{accuracy.correct}/{accuracy.count}, loss {accuracy.loss:.4f}"
    print(f"{network}: {found.text}, seed {config.seed}")
    print(f"{accuracy.top1:.2f} % of {name}'s test images ({share})")
    print(f"SHA-256 of the decoded images: {images.sha256}")
    if predictions is not None:
        print(f"predictions: {predictions}")


def _write_predictions(path: Path, model: ResNet, images: ImageSet, normalisation: str) -> None:
    """One row per image, in the order of the set; predicted as `spem.training.evaluate` does."""
    import torch

    from spem.data import NORMALISATION, normalise
    from spem.training.checkpoint import write_atomic

    mean, std = NORMALISATION[normalisation]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["index", "label", "prediction", "label_name", "prediction_name"])
    model.eval()
    for start in range(0, len(images), 500):
        batch = normalise(images.images[start : start + 500], mean, std)
        with torch.no_grad():
            answers = model(batch.contiguous(memory_format=torch.channels_last)).argmax(1)
        labels = images.labels[start : start + 500]
        for i, (label, answer) in enumerate(
            zip(labels.tolist(), answers.tolist(), strict=True), start
        ):
            writer.writerow([i, label, answer, images.classes[label], images.classes[answer]])
    write_atomic(path, text.getvalue().encode())
