"""Operations on feature maps that know tensors and no modules."""

# Loaded here since it must find torch's threads before anybody forks.
from spem.ops import threads as _threads  # noqa: F401  # pyright: ignore[reportUnusedImport]
from spem.ops.dispatch import Choice, choose, use_impl
from spem.ops.norm_relu import norm_relu
from spem.ops.stats import PlaneStats, plane_stats
from spem.ops.tail import bn_gate_tail, gate_tail, why_composed

__all__ = [
    "Choice",
    "PlaneStats",
    "bn_gate_tail",
    "choose",
    "gate_tail",
    "norm_relu",
    "plane_stats",
    "use_impl",
    "why_composed",
]
