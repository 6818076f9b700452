"""Batch norm and ReLU as one operation: the tail's passes without a gate and without a residual."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from spem.ops.autograd import first_derivatives
from spem.ops.dispatch import SMALL
from spem.ops.formula import Norm, constants
from spem.ops.inference import serves
from spem.ops.library import BATCH_NORMS, has_hooks, kernels_of, laid_out_as, may_show
from spem.ops.synchronised import running_of
from spem.ops.tail import batch_norm_of, called

_LEAST = {torch.float32: 1 << 21, torch.bfloat16: 1 << 18}
"""Values of a map below which PyTorch's two operations are faster where no gradient is recorded."""


def norm_relu(z: Tensor, norm: nn.Module) -> Tensor:
    """relu(norm(z)), never in z's memory.

    On a CPU with numba, a batch norm and its ReLU take 8 passes over memory in training, where
    PyTorch's two modules take 13, and keep nothing for the gradient but z. All else is composed: a
    norm that has hooks or is not exactly one of PyTorch's batch norms, other devices, compiled and
    exported code.

    Formula:
        y = max(0, gamma (z - mu) rstd + beta). A norm in training moves its running statistics as
        it does when called.

    Shape:
        z, output: [N, C, ...].

    Differences: second derivatives raise where the passes run.
    """
    if may_show(norm, z) and not norm.training:
        y, plain = called(norm, z)
        return torch.relu(y) if plain is None else norm_relu(z, plain)
    if not _fusible(z, norm):
        y = norm(z)
        # A plain norm's output is its own and nobody has seen it. A hook may have; others may be z.
        own = type(norm) in BATCH_NORMS and not has_hooks(norm)
        return torch.relu_(y) if own else torch.relu(y)
    view = batch_norm_of(norm, z)
    if view.mean is None:
        view = view._replace(running=running_of(norm))
    if torch.is_grad_enabled():
        return _NormReLU.apply(z, *view)
    mu, a, beta, _ = _affine_map(z, view, copy=False)
    return kernels_of("numba").norm_relu(z, mu, a, beta)


def _fusible(z: Tensor, norm: nn.Module) -> bool:
    """Whether the passes take this map and this norm."""
    if type(norm) not in BATCH_NORMS or has_hooks(norm) or not isinstance(z, Tensor):
        return False
    recorded = norm.training or torch.is_grad_enabled()
    least = SMALL if recorded else _LEAST.get(z.dtype, SMALL)
    return serves("norm_relu", z, z, least, None) is not None


def _affine_map(
    z: Tensor, norm: Norm, *, copy: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """mu, a, beta and rstd, [C] each; copies where they are kept."""
    if norm.mean is not None:
        return constants(norm, z, copy=copy)
    kernels = kernels_of("numba")
    raw = kernels.plane_stats(z, True, False)
    found = kernels.normalise_batch(raw, norm, math.prod(z.shape[2:]), False)
    return found.mu, found.a, found.beta, found.rstd


class _NormReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, *fields: Any) -> Tensor:
        norm = Norm(*fields)
        mu, a, beta, rstd = _affine_map(z, norm)
        ctx.save_for_backward(z, mu, a, beta, rstd)
        ctx.batch_stats = norm.mean is None
        return kernels_of("numba").norm_relu(z, mu, a, beta)

    @staticmethod
    @first_derivatives
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        z, mu, a, beta, rstd = ctx.saved_tensors
        needs_z, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dz, weight, bias = kernels_of("numba").norm_relu_backward(
            *(laid_out_as(grad, z), z, mu, a, beta, rstd),
            batch_stats=ctx.batch_stats,
            of_norm=needs_weight or needs_bias,
            of_map=needs_z,
        )
        of_norm = weight if needs_weight else None, bias if needs_bias else None
        return (dz, *of_norm, *[None] * 5)
