"""The one tolerance table of the suite; every comparison of numbers takes its bounds from here."""

from __future__ import annotations

import torch

# keyword arguments of torch.testing.assert_close and numpy.testing.assert_allclose, by the dtype
# the numbers were computed in (or, for half precision, rounded to)
TOLERANCE: dict[torch.dtype, dict[str, float]] = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-12},
    torch.float32: {"rtol": 2e-5, "atol": 2e-6},
    torch.float16: {"rtol": 2e-3, "atol": 2e-4},
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 1.6e-3},
}

# numbers that a publication prints: absolute
PRINTED = 1e-6

# float64 results of another program after many operations in another order
RECORDED = {"rtol": 1e-9, "atol": 1e-12}

# torch.autograd.gradcheck in float64
GRADCHECK = {"eps": 1e-6, "atol": 1e-6, "rtol": 1e-5}

# a fused tail against float64 autograd of the composed one: the largest difference of a tensor
# over its largest magnitude
TAIL = {torch.float64: 1e-9, torch.float32: 1e-4}

# some float32 training steps of two processes against those of one, which adds in another order
TOGETHER = {"rtol": 1e-4, "atol": 1e-5}
