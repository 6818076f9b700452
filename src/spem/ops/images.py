"""The tail in inference image by image, gate and all, for gates that can be recorded."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from spem.ops.library import has_hooks, is_direct, kernels_of, runs_eagerly
from spem.ops.norm import Norm, constants
from spem.ops.program import record
from spem.ops.stats import PlaneStats, compute_dtype

_CACHED = 1 << 20  # bytes of an image that is still in the second cache when it is read again


def in_one_pass(
    z: Tensor,
    residual: Tensor,
    norm: Norm | None,
    gate: Callable[[PlaneStats], Tensor],
    read: Collection[str],
    impl: str,
    *,
    inplace: bool,
) -> Tensor | None:
    """The tail with one reading of z from memory; None where that cannot be, or would not pay.

    It can where no gradient is recorded, the norm is constant, and the gate is a program; it pays
    where an image fits into a cache and each thread has several.
    """
    if torch.is_grad_enabled() or not getattr(gate, "recordable", False) or not is_direct(impl):
        return None
    batch = z.shape[0]
    constant = norm is None or norm.mean is not None
    if not constant or batch < 4 * torch.get_num_threads():
        return None
    if z.numel() // batch * z.element_size() > _CACHED:
        return None
    if not read or not runs_eagerly(z) or torch.is_autocast_enabled("cpu") or _is_watched(gate):
        return None
    program = record(gate, read, z, compute_dtype(z.dtype))
    if program is None:
        return None
    mu, a, beta, _ = constants(norm, z, copy=False)
    moments, extrema = bool({"mean", "var"} & set(read)), bool({"max", "min"} & set(read))
    run = kernels_of(impl).image_tail
    return run(z, residual, mu, a, beta, program, moments, extrema, inplace=inplace)


def _is_watched(gate: Callable[..., Any]) -> bool:
    """Whether hooks or compiled code of the parts of a gate's module would be given rows."""
    owner = getattr(gate, "__self__", None)
    parts = owner.modules() if isinstance(owner, nn.Module) else ()
    return any(
        part is not owner and (has_hooks(part) or getattr(part, "_compiled_call_impl", None))
        for part in parts
    )
