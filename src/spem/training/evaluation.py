"""Accuracy and loss of a network on a set of images."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from spem.data import NORMALISATION, ImageSet, normalise


@dataclass(frozen=True)
class Accuracy:
    """Mean cross entropy and share of correct answers.

    Args:
        loss: mean cross entropy, in nats.
        top1: percent of images whose class has the largest logit.
        correct: their number.
        count: number of images.
    """

    loss: float
    top1: float
    correct: int
    count: int


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: ImageSet,
    *,
    normalisation: str = "paper",
    batch: int = 500,
    between: Callable[[], None] | None = None,
) -> Accuracy:
    """Evaluate a network on all images of a set, in float32 on the network's own device.

    It is float32 whatever the network was trained in, so that saved weights give the row of their
    run again; another machine or version of torch may round an image at a tie the other way. The
    mode of the network is restored.

    Args:
        model: takes images [n, 3, H, W] and returns logits [n, classes].
        data: the images; they are moved to the network's device if they lie elsewhere.
        normalisation: a key of `spem.data.NORMALISATION`, the one trained with.
        batch: images at a time.
        between: called after every batch; may raise to stop here.

    Raises:
        ValueError: the set is empty.
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
    model: nn.Module, data: ImageSet, *, normalisation: str = "paper", batch: int = 500
) -> Tensor:
    """The class a network answers for each image: what `evaluate` counts, on the CPU.

    Shape:
        output: int64 [n].
    """
    answers = [logits.argmax(1) for logits, _ in _answers(model, data, normalisation, batch)]
    return torch.cat(answers).cpu()


def _answers(
    model: nn.Module, data: ImageSet, normalisation: str, batch: int
) -> Generator[tuple[Tensor, Tensor]]:
    """Logits and labels of a set, a batch at a time, in evaluation mode."""
    if len(data) == 0:
        raise ValueError("evaluate: the set has no images. Check the split and its folder.")
    data = data.to(next(model.parameters()).device)
    mean, std = NORMALISATION[normalisation]
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(data), batch):
            images = normalise(data.images[start : start + batch], mean, std)
            labels = data.labels[start : start + batch]
            yield model(images.contiguous(memory_format=torch.channels_last)), labels
    finally:
        model.train(was_training)
