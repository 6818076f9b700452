"""The gate before every time: a provider that computes something else than it should is not timed.

Results are compared with the reference in float64, gradients included. An error is the largest
deviation relative to the largest value; the bounds below are all there are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

MAPS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
"""Outputs and gradients of maps, by the dtype they are computed in."""
PARAMETERS = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 2e-2}
"""Gradients of parameters: sums over the batch, of terms of both signs, taken in float32."""
COMPOSED_IN_HALF = 0.3
"""The same where a tail is composed in half precision, and what is summed was rounded before."""
BATCH_NORMALISED = 10.0
"""How much larger errors may be in training where a gate is normalised over the batch: planes of
1,024 random values differ in their deviation by 2 %, so its error counts fifty times."""
NETWORKS = {torch.float64: 1e-9, torch.float32: 2e-3, torch.bfloat16: 0.03}
"""Loss, logits and gradients of whole networks, in the Euclidean norm: a value that rounding moves
over the edge of a ReLU changes single elements by all they are."""
IN_ONE = 0.4
"""All gradients of a network in bfloat16 as one vector, in the same norm."""

ZERO = 1e-3
"""Norm of a network's gradient, relative to its largest, below which it counts as zero."""


class BenchError(RuntimeError):
    """A provider computes something else than it should, or could not run."""


def reason(error: Exception) -> str:
    """The first line of what an exception says, for a cell of a table."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def error_of(found: Tensor, expected: Tensor, *, norm: bool = False, least: float = 1e-30) -> float:
    """The relative error; infinite for another shape, and where anything is not a number.

    Args:
        found: What was computed.
        expected: The truth.
        norm: In the Euclidean norm instead of the largest deviation.
        least: What the error is at least divided by, with `norm`.
    """
    a, b = found.detach().double(), expected.detach().double()
    if a.numel() != b.numel():
        return float("inf")
    difference = a.reshape(b.shape) - b
    if norm:
        error = difference.norm() / b.norm().clamp_min(least)
    else:
        # torch's max of an empty tensor raises; there are none here.
        error = difference.abs().max() / b.abs().max().clamp_min(1e-30)
    value = float(error)
    return float("inf") if math.isnan(value) else value


def require_close(
    name: str,
    found: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    bounds: Mapping[str, float],
    *,
    norm: bool = False,
) -> None:
    """Compares named tensors.

    Args:
        name: The provider, for the message.
        found: What it computed.
        expected: The reference.
        bounds: The largest error of each.
        norm: Errors in the Euclidean norm instead of the largest deviation; of a gradient that is
            (nearly) zero, such as a bias before a batch norm's, relative to `ZERO` of the largest.

    Raises:
        BenchError: One is missing or deviates; no time may be reported then.
    """
    if set(found) != set(expected):
        differing = ", ".join(sorted(set(found) ^ set(expected)))
        raise BenchError(f"bench: {name} and the reference do not both have {differing}: no times.")
    least = ZERO * max(float(value.detach().double().norm()) for value in expected.values())
    for key, value in expected.items():
        error = error_of(found[key], value, norm=norm, least=max(least, 1e-30))
        if not error <= bounds[key]:
            raise BenchError(
                f"bench: {name} differs from the reference in {key} "
                f"(relative error {error:.1e}, allowed {bounds[key]:.0e}): no times."
            )
