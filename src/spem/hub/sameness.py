"""Whether two networks of the same tensors compute the same: what has no parameters counts too."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from spem.attention import ChannelAttention
from spem.insert import IdentityStart
from spem.insert.attached import remembered
from spem.insert.sites import default_input
from spem.models import ResNet
from spem.ops import use_impl

_ROUNDING = 1e-9
"""Differences in float64 up to this share of the largest output are rounding."""
_SMALL, _OPEN = 0.1, 0.5


def same_outputs(model: nn.Module, again: nn.Module, *, asker: str) -> list[Tensor]:
    """Runs copies of both on one random input, in evaluation mode and float64.

    Scales that are about zero (an untouched identity start, a block's last norm, a layer scale)
    would hide what they multiply, so they are opened in both copies alike.

    Args:
        model: A network.
        again: The network that its description gave, with the weights of the first.
        asker: Who asks, the subject of messages.

    Returns:
        The tensors of the output.

    Raises:
        ValueError: The outputs differ, or the network cannot be run on its input.
    """
    one, two = _prepared(model), _prepared(again)
    found, shape = _first_that_runs(one, _inputs(model), asker)
    try:
        wanted = _outputs(two, shape)
    except Exception as error:
        raise ValueError(_otherwise(asker)) from error
    if len(found) != len(wanted) or not all(map(_close, found, wanted)):
        raise ValueError(_otherwise(asker))
    return found


def _first_that_runs(
    model: nn.Module, shapes: list[tuple[int, ...]], asker: str
) -> tuple[list[Tensor], tuple[int, ...]]:
    *others, last = shapes
    for shape in others:
        with contextlib.suppress(Exception):
            return _outputs(model, shape), shape
    try:
        return _outputs(model, last), last
    except Exception as error:  # a network says in its own way that an input does not fit
        said = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"{asker}: the network cannot be run on a random input {list(last)}, as it must be "
            f"to compare it with the one built anew: {said}"
        ) from error


def _otherwise(asker: str) -> str:
    return (
        f"{asker}: the network, built anew with the same weights, computes other outputs: pass "
        f"options= as it was built, or it was changed by something else than attach."
    )


def _prepared(model: nn.Module) -> nn.Module:
    copied = copy.deepcopy(model).to("cpu", torch.float64).eval()
    with torch.no_grad():
        for module in copied.modules():
            if isinstance(module, IdentityStart):
                module.alpha.fill_(_OPEN)
            if isinstance(module, ChannelAttention):
                continue
            for name, own in module.named_parameters(recurse=False):
                if (
                    name != "bias"
                    and own.dim() == 1
                    and own.numel()
                    and bool(own.abs().max() < _SMALL)
                ):
                    own.fill_(_OPEN)
    return copied


def _inputs(model: nn.Module) -> list[tuple[int, ...]]:
    """Shapes of inputs to try: what attention was traced with, then what the network says."""
    traced = [call.input_shape for part, call in remembered(model) if not part]
    shapes = [(1, *shape[1:]) for shape in traced if shape is not None]
    if isinstance(model, ResNet):
        return [*shapes, (1, 3, 32, 32)]
    batch, channels, *extents = default_input(model)
    said = getattr(model, "in_chans", None)  # timm's; its config keeps the usual number
    return [*shapes, (batch, said if isinstance(said, int) else channels, *extents)]


def _outputs(model: nn.Module, shape: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    with torch.no_grad(), torch.random.fork_rng(devices=[]), use_impl("reference"):
        torch.manual_seed(0)
        return list(_tensors(model(x)))


def _tensors(output: object) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in cast("Mapping[Any, object]", output).values():
            yield from _tensors(value)
    elif isinstance(output, Sequence) and not isinstance(output, str):
        for value in cast("Sequence[object]", output):
            yield from _tensors(value)


def _close(one: Tensor, two: Tensor) -> bool:
    if one.shape != two.shape:
        return False
    finite = one[one.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    return torch.allclose(one, two, rtol=0.0, atol=_ROUNDING * largest, equal_nan=True)
