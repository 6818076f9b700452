"""The reference, the oracle of all others: the tail composed of modules, any device and dtype."""

from collections.abc import Callable, Collection

from torch import Tensor, nn

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
        x = x * v.reshape(*v.shape, *[1] * (x.dim() - 2)).to(x.dtype)
    return (x + residual).relu_()
