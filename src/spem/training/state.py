"""Where a run stands: everything of a checkpoint but model and optimiser."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

DIVIDED = ("loss", "correct")
"""Sums of which each process that trains a run holds a part; of the others each holds all."""


@dataclass
class State:
    """Epoch, step, and what was counted on the way."""

    sums: dict[str, Tensor]
    """Sums over the steps of the current epoch: loss, penalty, correct, change of each lambda; and,
    of its last step, the norm of each block's gradient."""
    epoch: int = 0
    step: int = 0
    """Steps done in the current epoch."""
    seconds: float = 0.0
    """Time of those steps."""
    history: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """Lines of `metrics.jsonl`."""


def zero_sums(mixes: int, blocks: int, device: torch.device) -> dict[str, Tensor]:
    """The sums of an epoch before its first step, for a network of so many mixes and blocks."""
    real = torch.float32 if device.type == "mps" else torch.float64
    return {
        "loss": torch.zeros((), dtype=real, device=device),
        "penalty": torch.zeros((), dtype=real, device=device),
        "correct": torch.zeros((), dtype=torch.int64, device=device),
        "change": torch.zeros(mixes, dtype=real, device=device),
        "gradients": torch.zeros(blocks, dtype=real, device=device),
    }
