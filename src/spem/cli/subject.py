"""Trained weights as the commands that look at them or pass them on read them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Subject:
    """Trained weights, and what is known of the images they take.

    Attributes:
        model: The network, in evaluation mode on the CPU.
        text: The network in words.
        data: Name of the set it was trained on, or None.
        size: Height and width of the images, or None.
        mean: Of the normalisation.
        std: Of the normalisation.
        classes: The names of the classes, or None.
    """

    model: "nn.Module"
    text: str
    data: str | None
    size: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...] | None


def read_subject(path: Path, asker: str) -> Subject:
    """Weights from a .safetensors file of a training, the folder of a run, or a shared folder.

    Args:
        path: One of these.
        asker: The command, the subject of messages.

    Raises:
        FileNotFoundError: Nothing of this name, or no weights in the folder.
        ValueError: The weights are damaged, or a shared network does not say how images are
            normalised.
    """
    from spem.data import NORMALISATION
    from spem.data.names import class_names, native_size
    from spem.training import load_weights, read_config

    if path.is_dir() and _is_shared(path):
        return _of_shared(path, asker)
    weights = path / "model.safetensors" if path.is_dir() else path
    if not weights.is_file():
        what = (
            f"{path} holds no {weights.name}: name the folder of a finished run, or one that spem "
            f"share wrote."
            if path.is_dir()
            else f"No such file: {path}."
        )
        raise FileNotFoundError(f"{asker}: {what}")
    model, config = load_weights(weights)
    # Weights keep the last part of a path alone; the run knows which set it was trained on.
    planned = read_config(path) if path.is_dir() else None
    name = config.data.name if planned is None else planned.data.name
    mean, std = NORMALISATION[config.data.normalisation]
    return Subject(
        model=model,
        text=f"ResNet-{config.model.depth}, attention {config.model.attention}",
        data=name,
        size=config.data.size or native_size(name),
        mean=mean,
        std=std,
        classes=class_names(name, model.classes),
    )


def _is_shared(folder: Path) -> bool:
    """Whether `spem share` wrote it: a run has a config.json too, of other fields."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and config.get("library_name") == "spem"


def _of_shared(folder: Path, asker: str) -> Subject:
    from spem.hub import read_shared

    shared = read_shared(folder)
    if shared.images is None:
        raise ValueError(
            f"{asker}: {folder} does not say how its images were normalised. "
            f"Write it again: spem.save_pretrained(..., images=...)."
        )
    images, text = shared.images, type(shared.model).__name__
    return Subject(shared.model, text, None, images.size, images.mean, images.std, shared.classes)
