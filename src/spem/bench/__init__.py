"""Measurements: what attention costs, and what fusing the block's tail brings, on this machine.

Four tables, each with the hardware, versions and commit in every row: `ops` (the tail alone),
`step` (a training step), `network` (inference) and `memory` (peak memory, a process each). All
providers of a table take turns within one run, and none is timed before its results were compared
with the reference in float64. Two ratios are kept apart:

    attention cost   fused with attention / the same passes without (v = 1)
    fusion gain      fused / the plain network or tail in PyTorch
"""

from spem.bench.checks import BenchError
from spem.bench.settings import Settings

__all__ = ["BenchError", "Settings"]
