"""Operations on feature maps that know tensors and no modules."""

from spem.ops.stats import PlaneStats, plane_stats

__all__ = ["PlaneStats", "plane_stats"]
