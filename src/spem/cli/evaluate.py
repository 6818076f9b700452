"""`spem eval`: accuracy of a weights file on the test images of its data set, or of another."""

import csv
import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from spem.cli.output import print_json

if TYPE_CHECKING:
    from spem.data import ImageSet
    from spem.models import ResNet


def run(args: list[str]) -> None:
    """Run `spem eval` with these arguments."""
    import tyro
    from tyro.conf import Positional

    def evaluate(
        weights: Positional[Path],
        /,
        *,
        data: str | None = None,
        root: Path | None = None,
        predictions: Path | None = None,
        sha256: str | None = None,
        json: bool = False,
    ) -> None:
        """Evaluate trained weights on the test images, in float32, normalised as in training.

        Args:
            weights: A .safetensors file that a training wrote.
            data: Name or path of the images; without it those the weights were trained on.
            root: Folder that holds the named data sets.
            predictions: Write index, label and prediction of every image into this CSV file.
            sha256: Expected SHA-256 of the test split's files, one after the other as sorted.
            json: Print JSON.
        """
        _evaluate(weights, data, root, predictions, sha256, json=json)

    tyro.cli(evaluate, prog="spem eval", args=args)


def _evaluate(
    weights: Path,
    data: str | None,
    root: Path | None,
    predictions: Path | None,
    sha256: str | None,
    *,
    json: bool,
) -> None:
    from spem.data import load_images
    from spem.training import evaluate, load_weights
    from spem.training.choose_impl import stored_impl

    model, config = load_weights(weights)
    own = data is None or data == config.data.name
    name = config.data.name if data is None else data
    images = load_images(
        name, "test", root=root, size=config.data.size if own else None, sha256=sha256
    )
    if len(images.classes) != model.classes:
        raise ValueError(
            f"eval: {weights} tells {model.classes} classes apart, {name} has "
            f"{len(images.classes)}. Use the data set it was trained on."
        )
    normalisation = config.data.normalisation
    with stored_impl(config.runtime, "cpu", lambda text: print(text, file=sys.stderr)):
        accuracy = evaluate(model, images, normalisation=normalisation)
        if predictions is not None:
            _write_predictions(predictions, model, images, normalisation)
    if json:
        print_json(
            {
                "weights": str(weights),
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
    network = f"ResNet-{config.model.depth}, attention {config.model.attention}"
    share = f"{accuracy.correct}/{accuracy.count}, loss {accuracy.loss:.4f}"
    print(f"{weights}: {network}, seed {config.seed}")
    print(f"{accuracy.top1:.2f} % of {name}'s test images ({share})")
    print(f"SHA-256 of the decoded images: {images.sha256}")
    if predictions is not None:
        print(f"predictions: {predictions}")


def _write_predictions(path: Path, model: "ResNet", images: "ImageSet", normalisation: str) -> None:
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
