"""Which implementation runs the tails of a run: settled once, so that its bits do not change."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager

import torch
from torch import nn

from spem.cost import block_tails, tails_text
from spem.ops import Choice, choose, use_impl
from spem.ops.dispatch import requested, unsupported
from spem.training.config import RuntimeConfig


def map_dtypes(runtime: RuntimeConfig) -> tuple[torch.dtype, ...]:
    """The dtypes of the maps that occur in a run: those of training, and evaluation's float32."""
    if runtime.precision == "bf16":
        return (torch.bfloat16, torch.float32)
    return (torch.float32,)


def choose_impl(runtime: RuntimeConfig, device: str) -> Choice:
    """Decide the implementation of all tails of a run, in training and evaluation alike.

    Args:
        runtime: gives precision and step, and the wish.
        device: type of the run's device.

    Raises:
        ValueError: a wish that cannot be met for every dtype that will occur.
    """
    choices = [choose("train", device, d, impl=runtime.impl) for d in map_dtypes(runtime)]
    if requested(runtime.impl, "train") is not None:
        return choices[0]
    # One that takes training's maps but not evaluation's, or the reverse, cannot serve the run.
    differing = [choice for choice in choices if choice.impl == "reference"]
    choice = differing[0] if differing else choices[0]
    if choice.impl == "reference" and device == "cuda" and runtime.step in ("compile", "graph"):
        return Choice("formula", "compiled")
    return choice


def evaluation_impl(impl: str | None) -> str | None:
    """What evaluates a run of this implementation: the formula is for compiled steps only."""
    return "reference" if impl == "formula" else impl


def tails_of(model: nn.Module, runtime: RuntimeConfig) -> str:
    """What runs the tails of a planned run, and why they are composed if they are."""
    device, dtype = torch.device(runtime.device).type, map_dtypes(runtime)[0]
    with use_impl(runtime.impl):
        tails = block_tails(model, device=device, dtype=dtype)
    with use_impl(None):
        unasked = block_tails(model, device=device, dtype=dtype)
    # What planning chose is a wish by now; if it is what is chosen unasked, that has the reason.
    same = [tail.impl for tail in tails] == [tail.impl for tail in unasked]
    return tails_text(unasked if same else tails)


@contextmanager
def stored_impl(
    runtime: RuntimeConfig, device: str, message: Callable[[str], None]
) -> Generator[None]:
    """Run a `with` block under the implementation a run was trained with, if it can run here.

    Else the library's choice for float32 maps is taken, and `message` told so once. A wish by
    `spem.ops.use_impl` or the environment goes before both.
    """
    stored = evaluation_impl(runtime.impl)
    if stored is None or requested(None, "eval") is not None:
        yield
        return
    reason = unsupported(stored, device, torch.float32)
    if reason is None:
        with use_impl(stored):
            yield
        return
    instead = choose("eval", device, torch.float32).impl
    message(f"the run was trained with impl={stored!r}, which {reason}; evaluating with {instead}")
    yield
