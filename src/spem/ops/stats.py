"""Plane statistics: the mean, variance, maximum and minimum of every channel of every image."""

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

STATISTICS = ("mean", "var", "max", "min")


class PlaneStats(NamedTuple):
    """Statistics of the planes of a map [N, C, ...], each [N, C], or None if not asked for.

    They are in at least float32. ``var`` is the biased variance (divided by ``size``); ``size`` is
    the number of positions of a plane (H W), ``batch`` is N, and ``map`` is the map itself, for a
    pool that must look at it. ``direct`` says that a gate may run Numba's kernels itself.
    """

    mean: Tensor | None
    var: Tensor | None
    max: Tensor | None
    min: Tensor | None
    size: int
    batch: int
    map: Tensor | None = None
    direct: bool = False


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype gates are computed in: float32 for half precision, else the map's own."""
    return torch.promote_types(dtype, torch.float32)


def check(op: str, x: Tensor, which: Collection[str]) -> None:
    """Refuses what is not a map, and unknown statistics."""
    if x.dim() < 3:
        raise ValueError(f"{op}: needs a map [N, C, ...], got {x.dim()} axes.")
    unknown = sorted(set(which) - set(STATISTICS))
    if unknown:
        raise ValueError(f"{op}: unknown statistic {unknown[0]!r}. Use {', '.join(STATISTICS)}.")


def selected(found: Sequence[Tensor], which: Collection[str], z: Tensor) -> PlaneStats:
    """Those of the four statistics of a map like z that were asked for."""
    mean, var, high, low = (
        s if name in which else None for name, s in zip(STATISTICS, found, strict=True)
    )
    return PlaneStats(mean, var, high, low, math.prod(z.shape[2:]), z.shape[0])


def plane_stats(x: Tensor, which: Collection[str] = STATISTICS) -> PlaneStats:
    """Computes the statistics of every plane of a map.

    Formula:
        mean = 1/K sum_k x_k,  var = 1/K sum_k (x_k - mean)^2,  max = max_k x_k,  min = min_k x_k,
        where k runs over the K positions of a plane.

    In reverse mode the gradients of ``max`` and ``min`` go to the first extremum in row-major
    order, in any memory layout (forward mode splits ties evenly). A NaN in a plane makes all its
    statistics NaN; an infinity makes its mean infinite (or NaN) and its variance NaN. All four are
    deterministic, forward and backward.

    Shape:
        x: [N, C, ...], one or more spatial axes, N may be 0; each statistic: [N, C].

    Args:
        x: The map, floating point. Half precision is accumulated in float32.
        which: Names out of ``mean``, ``var``, ``max``, ``min``; the others are None.

    Raises:
        ValueError: ``which`` holds an unknown name, or x has no spatial axis or an empty plane.
    """
    check("plane_stats", x, which)
    dtype = compute_dtype(x.dtype)
    # A view in both memory layouts: positions keep their row-major order, whatever the strides.
    planes = x.flatten(2)
    size = planes.shape[2]
    if size == 0:
        raise ValueError(f"plane_stats: the planes of a map of shape {tuple(x.shape)} are empty.")
    mean = var = highest = lowest = None
    if "mean" in which:
        mean = planes.mean(2, dtype=dtype)
    if "var" in which:
        wide = planes.to(dtype)
        # torch's var warns on an empty batch, whose every statistic is an empty [0, C].
        var = wide.var(2, correction=0) if wide.numel() else wide.sum(2)
    # max(dim) sends its gradient to the first index; amax splits it over ties, but is faster and
    # exports as a plain reduction. Values are the same.
    indexed = torch.is_grad_enabled() and x.requires_grad
    # torch.jit.trace runs twice, with gradients and without, and wants the same graph.
    traced = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    indexed = indexed or (traced and not torch.onnx.is_in_onnx_export())
    if "max" in which:
        highest = (planes.max(2).values if indexed else planes.amax(2)).to(dtype)
    if "min" in which:
        lowest = (planes.min(2).values if indexed else planes.amin(2)).to(dtype)
    return PlaneStats(mean, var, highest, lowest, size, x.shape[0])
