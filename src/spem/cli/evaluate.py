"""`spem eval`: accuracy of a network on the test images of its data set, or of another."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from spem.cli.network import Named, Network, SkipBroken, load_network
from spem.cli.options import Json
from spem.cli.output import new_file, print_json, say
from spem.extras import rephrased

if TYPE_CHECKING:
    from spem.data import ImageSet

_PREDICTIONS = "write what it answers for every image"


def run(
    network: Named,
    *,
    data: Annotated[str | None, "SET", "images; else those it was trained on"] = None,
    root: Annotated[Path | None, "DIR", "folder that holds the named data sets"] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], "where"] = "auto",
    predictions: Annotated[Path | None, "CSV", _PREDICTIONS, new_file] = None,
    skip_broken: SkipBroken = False,
    json: Json = False,
    **named: Annotated[Any, load_network],
) -> None:
    """Accuracy of a network on test images, in float32, normalised as in training."""
    from spem.files import write_atomic

    if data is not None:  # before torch is loaded
        from spem.data import check_images

        size = named["size"] or 16  # or the network's own
        check_images(data, root=root, size=size, skip_broken=skip_broken)
    from spem.ops import use_impl
    from spem.training import RuntimeConfig, evaluate
    from spem.training.evaluation import predict
    from spem.training.loop import resolved
    from spem.training.step import stored_impl

    place = resolved(RuntimeConfig(device=device), 1).device
    found = load_network(network, **named)
    images = _images(found, network, data, root=root, skip_broken=skip_broken)
    model, how, config = found.model.to(place), (found.mean, found.std), found.config
    impl = stored_impl(found.impl, place, lambda text: print(text, file=sys.stderr))
    with use_impl(impl):
        accuracy = evaluate(model, images, normalisation=how)
        if not math.isfinite(accuracy.loss):
            said = f"the outputs of {network} are not finite numbers, so it has no accuracy"
            raise FloatingPointError(f"{said}. Train it again, with a lower rate.")
        if predictions is not None:
            import pandas as pd

            answers = predict(model, images, normalisation=how)
            table = pd.DataFrame({"label": images.labels.cpu(), "prediction": answers})
            names = table.map(images.classes.__getitem__).add_suffix("_name")
            content = table.join(names).to_csv(index_label="index", lineterminator="\n")
            write_atomic(predictions, content.encode())
    if json:
        told: dict[str, Any] = {"network": network, "attention": named["attention"]}
        told |= {"depth": None, "seed": None, "id": None}
        if config is not None:
            told |= {"attention": config.model.attention, "depth": config.model.depth}
            told |= {"seed": config.seed, "id": config.id}
        told |= {"data": images.name, "data_sha256": images.sha256, "accuracy": accuracy.top1}
        print_json(told | {name: getattr(accuracy, name) for name in ("correct", "count", "loss")})
        return
    seed = "" if config is None else f", seed {config.seed}"
    say(f"{found.titled(network)}{seed}")
    share = f"{accuracy.correct}/{accuracy.count}, loss {accuracy.loss:.4f}"
    print(f"{accuracy.top1:.2f} % of {images.name}'s test images ({share})")
    print(f"SHA-256 of the decoded images: {images.sha256[:16]}")
    if predictions is not None:
        print(f"predictions: {predictions}")


def _images(found: Network, network: str, data: str | None, **how: Any) -> ImageSet:
    """The test images, which must have the classes that the network answers with."""
    import torch

    from spem.data import load_images

    config = found.config
    if config is not None:
        images = found.test_images(data, **how)
    elif data is None:
        raise ValueError(f"{network} does not say which images it was trained on. Give --data.")
    else:
        images = load_images(data, "test", size=found.size, **how)
    found.require_classes(images)
    with torch.no_grad(), rephrased(f"{network} does not run on {images.name} in float32"):
        output = found.model(images.images[:1] / 255.0)
    shape = list(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
    if shape != [1, n := len(images.classes)]:
        remedy = "Use the data set it was trained on."
        if config is None:
            remedy = f"Give --classes {n}, with weights trained on these."
        said = f"the network answers {shape} for one image, {images.name} has {n} classes"
        raise ValueError(f"{said}. {remedy}")
    return images
