"""A loss that became infinite or NaN: how it is told, and `diverged.json` of the run folder."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from spem.training.checkpoint import load_json, save_json
from spem.training.config import RunConfig
from spem.training.inside import norm_report

DIVERGED = "diverged.json"


@dataclass(frozen=True)
class Divergence:
    """When a run diverged, and what was said about it.

    Args:
        epoch: The epoch in which it happened, from 0: the same however often it was interrupted.
        message: The sentence for people; it names folders, and depends on where checkpoints stood.
    """

    epoch: int
    message: str


def write_diverged(config: RunConfig, folder: Path, epoch: int, message: str) -> None:
    """Write down that a run diverged; whoever holds the claim on the folder does so."""
    values = {"id": config.id, "seed": config.seed, "epoch": epoch, "message": message}
    save_json(values, folder / DIVERGED)


def read_diverged(config: RunConfig, folder: Path) -> Divergence | None:
    """When and why this very run diverged; None if it did not.

    Raises:
        ValueError: The file is damaged.
    """
    path = folder / DIVERGED
    if not path.exists():
        return None
    values = load_json(path, remedy="Delete it to try the run again.")
    if (values.get("id"), values.get("seed")) != (config.id, config.seed):
        return None
    return Divergence(int(values.get("epoch", 0)), str(values.get("message")))


def require_finite(
    name: str, value: float, *, model: nn.Module, epoch: int, rate: float, checkpoint: Path
) -> None:
    """Refuse to go on with a number that is infinite or NaN.

    Raises:
        FloatingPointError: the message says where, what the norm layers look like, and where the
            last good checkpoint lies.
    """
    if math.isfinite(value):
        return
    good = f"The last good checkpoint is {checkpoint}"
    if not checkpoint.exists():
        good = "There is no checkpoint yet"
    raise FloatingPointError(
        f"train: the {name} became {value} in epoch {epoch + 1} at rate {rate:.3g}. "
        f"Norm layers, worst first: {norm_report(model)}. {good}. Use a lower optim.lr."
    )
