"""Eager or compiled: measured once where neither is known to be faster, then kept."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from spem.training.config import RunConfig
from spem.training.step import Step, make_step

GAIN = 0.05
"""Share of the eager step that a compiled one has to save; less is within the noise."""
ROUNDS = (3, 10)
"""Fewest and most steps of each kind that are timed."""
SECONDS = 10.0
"""After which no further round begins."""

Measured = Literal["eager", "compile"]


def choose_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: RunConfig,
    images: Tensor,
    labels: Tensor,
    message: Callable[[str], None],
) -> tuple[Measured, Step]:
    """Time the eager and the compiled step in turns and return the faster one.

    Afterwards model and optimiser are put back to where they were, so that what was compiled can be
    used by the run itself. Call it within `execution`.

    Args:
        model: in training mode, on its device.
        optimizer: of the model, before its first step.
        config: of the run.
        images: one batch, normalised, in the run's memory format.
        labels: its labels.
        message: told the decision with its numbers.
    """
    kept = [*model.parameters(), *model.buffers()]
    copies = [tensor.detach().clone() for tensor in kept]
    try:
        chosen, step = _measured(model, optimizer, config, images, labels, message)
    finally:
        with torch.no_grad():
            for tensor, copy in zip(kept, copies, strict=True):
                tensor.copy_(copy)
        optimizer.zero_grad(set_to_none=True)
        optimizer.state.clear()
    if chosen == "eager":
        torch.compiler.reset()  # forgets what was compiled in vain
    return chosen, step


def _measured(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: RunConfig,
    images: Tensor,
    labels: Tensor,
    message: Callable[[str], None],
) -> tuple[Measured, Step]:
    def made(kind: Measured) -> Step:
        return make_step(model, optimizer, config.optim, replace(config.runtime, step=kind))

    eager, compiled = made("eager"), made("compile")
    _timed(eager, images, labels)
    try:
        compiling = _timed(compiled, images, labels)
    except RuntimeError as error:  # no compiler, or one that fails
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        message(f"step: eager, since compiling failed ({' '.join(lines[:2])})")
        return "eager", eager
    times = _in_turns(eager, compiled, images, labels)
    before, after = (1000 * statistics.median(each) for each in times)
    chosen: Measured = "compile" if after < (1 - GAIN) * before else "eager"
    message(
        f"step: {chosen}, measured on batches of {len(images)} images "
        f"(eager {before:.1f} ms, compiled {after:.1f} ms after {compiling:.0f} s of compiling)"
    )
    return chosen, eager if chosen == "eager" else compiled


def _in_turns(
    eager: Step, compiled: Step, images: Tensor, labels: Tensor
) -> tuple[list[float], list[float]]:
    """Seconds of steps taken in turns, so that a busy moment of the machine hits both alike."""
    fewest, most = ROUNDS
    before: list[float] = []
    after: list[float] = []
    started = time.monotonic()
    while len(before) < fewest or (len(before) < most and time.monotonic() - started < SECONDS):
        before.append(_timed(eager, images, labels))
        after.append(_timed(compiled, images, labels))
    return before, after


def _timed(step: Step, images: Tensor, labels: Tensor) -> float:
    """Seconds of one step, read at its end on whatever device it runs."""
    started = time.monotonic()
    float(step(images, labels).loss)
    return time.monotonic() - started
