"""The reference, the oracle of all others: the tail composed of modules, any device and dtype."""

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from spem.ops.formula import spatial
from spem.ops.library import BATCH_NORMS, has_hooks
from spem.ops.stats import PlaneStats, plane_stats

Gate = Callable[[PlaneStats], Tensor]


def tail(
    z: Tensor,
    residual: Tensor,
    norm: nn.Module | None,
    gate: Gate | None,
    statistics: Collection[str],
) -> Tensor:
    """relu(gate(stats(x)) x + residual) with x = norm(z), each operation one of torch's own."""
    x = z if norm is None else norm(z)
    if gate is not None:
        v = gate(plane_stats(x, statistics))
        x = x * spatial(v, x).to(x.dtype)
    # What the gate scaled is a new map; what a norm returned may be held by its hooks.
    fresh = gate is not None or (
        type(norm) in BATCH_NORMS and norm is not None and not has_hooks(norm)
    )
    # In place: a sum of its own is another map, and the system's pages for it.
    if fresh and isinstance(x, Tensor) and x.dtype == torch.promote_types(x.dtype, residual.dtype):
        return x.add_(residual).relu_()
    return (x + residual).relu_()
