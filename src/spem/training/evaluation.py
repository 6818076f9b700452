"""Measurements of a network: accuracy and loss, and the gates and gradients of its blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from spem.attention import ChannelAttention
from spem.data import NORMALISATION, ImageSet, normalise
from spem.data.names import known_name
from spem.gates import inspect
from spem.insert.sites import evaluating
from spem.models import blocks
from spem.ops.library import BATCH_NORMS
from spem.training.config import RunConfig, require_one_of
from spem.training.folder import DataIdentity
from spem.training.sets import load_test
from spem.training.step import full_float32

# A key of `spem.data.NORMALISATION`, or mean and standard deviation of pixels scaled to 0 to 1.
Normalisation = str | tuple[Sequence[float], Sequence[float]]
GATE_IMAGES = 256  # of the test set; on these gates are described
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Accuracy:
    """Mean cross entropy (nats), percent of correct answers, their number, number of images."""

    loss: float
    top1: float
    correct: int
    count: int


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: ImageSet,
    *,
    normalisation: Normalisation = "paper",
    batch: int = 500,
    between: Callable[[], None] | None = None,
) -> Accuracy:
    """Evaluate a network on a set of images, in float32 on the network's device.

    Training may have another precision; saved weights reproduce their run's results. The mode of
    every module is restored.

    Args:
        model: takes images [n, 3, H, W] and returns logits [n, classes].
        data: the images, at least one (ValueError); moved to the network's device if necessary.
        normalisation: a key of `spem.data.NORMALISATION`, or mean and deviation, as in training.
        batch: images at a time.
        between: called after every batch; may raise to stop.
    """
    loss = correct = 0
    for logits, labels in _answers(model, data, normalisation, batch):
        if between is not None:
            between()
        loss += functional.cross_entropy(logits, labels, reduction="sum")
        correct += (logits.argmax(1) == labels).sum()
    right = int(correct)
    return Accuracy(float(loss) / len(data), 100.0 * right / len(data), right, len(data))


@torch.no_grad()
def predict(
    model: nn.Module, data: ImageSet, *, normalisation: Normalisation = "paper", batch: int = 500
) -> Tensor:
    """The predicted class of each image, int64 [n] on the CPU."""
    answers = [logits.argmax(1) for logits, _ in _answers(model, data, normalisation, batch)]
    return torch.cat(answers).cpu()


def _answers(
    model: nn.Module, data: ImageSet, normalisation: Normalisation, batch: int
) -> Generator[tuple[Tensor, Tensor]]:
    """Logits and labels of a set, a batch at a time, in evaluation mode."""
    if len(data) == 0:
        raise ValueError("evaluate: the set has no images. Check the split and its folder.")
    data = data.to(next(model.parameters(), data.images).device)
    if isinstance(normalisation, str):
        require_one_of("normalisation", normalisation, NORMALISATION)
        normalisation = NORMALISATION[normalisation]
    mean, std = normalisation
    with evaluating(model):
        for start in range(0, len(data), batch):
            images = normalise(data.images[start : start + batch], mean, std)
            labels = data.labels[start : start + batch]
            with full_float32():
                logits = model(images.contiguous(memory_format=torch.channels_last))
            yield logits, labels


def load_test_images(
    config: RunConfig,
    data: DataIdentity | None,
    *,
    name: str | None = None,
    root: str | Path | None = None,
) -> ImageSet:
    """Load the test images to evaluate trained weights on: their own, or others.

    Checksum and class names identify them: a folder called digits may hold anything.

    Args:
        config, data: of `Weights` or `Run`.
        name, root: name or path of other images, and the folder that holds the named sets; None
            takes the training's.

    Raises:
        FileNotFoundError: there are no such images, or it is not known where they are.
        ValueError: they are not the network's test images and no others were named, or their class
            names are not those of the network's outputs.
    """
    asked = replace(config.data, test_sha256=None)
    if name is not None and name != config.data.name:
        asked = replace(asked, name=name, root=root, test_limit=None)
    else:
        asked = replace(asked, root=root or asked.root)
        if known_name(asked.name) is None and not Path(asked.name).is_dir():
            raise FileNotFoundError(
                f"the network was trained on a folder named {asked.name!r}, which is not here. "
                "Name the images with --data PATH."
            )
    images = load_test(asked)
    if data is not None:
        same = (images.sha256, images.classes) == (data.test_sha256, data.classes)
        if name is None and not same:
            raise ValueError(
                f"the network was trained on images named {data.name!r} that are not those found "
                f"under this name here (SHA-256 {data.test_sha256[:10]} there, "
                f"{images.sha256[:10]} here). Name the images with --data PATH."
            )
        images.require_classes(data.classes)
    return images


@torch.no_grad()
def gradient_norms(model: nn.Module) -> Tensor:
    """The gradient norm of each block's convolutions, attention left out, in the blocks' order."""
    found: list[Tensor] = []
    for _, block in blocks(model):
        attention = [m for m in block.modules() if isinstance(m, ChannelAttention)]
        theirs = {m for module in attention for m in module.modules()}
        convs = [m for m in block.modules() if isinstance(m, nn.Conv2d) and m not in theirs]
        gradients = [conv.weight.grad for conv in convs if conv.weight.grad is not None]
        found.append(nn.utils.get_total_norm(gradients))
    return torch.stack(found).to(next(model.parameters()).device)


def describe_gates(
    model: nn.Module, data: ImageSet, *, normalisation: str = "paper"
) -> list[dict[str, Any]]:
    """Describe the gates of every attention module on the first test images.

    From the first block to the last: name, `mean` and `sd` over all gate values, their quantiles
    `q05` to `q95`, `sd_channels` (over channels, of the mean over images) and `sd_images` (over
    images, averaged over channels): at 0 a gate ignores its input. What only adds has no gate.
    """
    few = replace(data, images=data.images[:GATE_IMAGES], labels=data.labels[:GATE_IMAGES])
    if not any(isinstance(module, ChannelAttention) for module in model.modules()):
        return []  # the plain network
    with inspect(model) as inside:
        predict(model, few, normalisation=normalisation, batch=GATE_IMAGES)
    described: list[dict[str, Any]] = []
    for seen in inside.records:
        if seen.module.needs.adds:
            continue
        values = seen.gate.cpu().double()
        values = values.flatten(2).mean(2) if values.dim() > 2 else values  # [N, C]
        quantiles = torch.quantile(values.flatten(), values.new_tensor(QUANTILES)).tolist()
        described.append(
            {
                "block": seen.name,
                "channels": seen.module.channels,
                "mean": float(values.mean()),
                "sd": float(values.std(correction=0)),
                **{f"q{100 * q:02.0f}": v for q, v in zip(QUANTILES, quantiles, strict=True)},
                "sd_channels": float(values.mean(0).std(correction=0)),
                "sd_images": float(values.std(0, correction=0).mean()),
            }
        )
    return described


def norm_report(model: nn.Module) -> str:
    """The norm layers with NaN or with the largest running variance, for an error message."""
    largest = {
        name: float(module.running_var.max())
        for name, module in model.named_modules()
        if isinstance(module, (*BATCH_NORMS, nn.SyncBatchNorm)) and module.running_var is not None
    }
    worst = sorted(largest, key=lambda name: (math.isfinite(largest[name]), -largest[name]))[:4]
    return ", ".join(f"{name} (largest variance {largest[name]:.3g})" for name in worst)
