"""Random maps, and modules whose parameters and running statistics are all random.

At initialisation most gates are constants, so that an equality or a gradient test could not fail.
"""

from __future__ import annotations

import zlib
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def generator(*key: object) -> torch.Generator:
    """A generator of its own for every key."""
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))


def randomise(module: M, *key: object) -> M:
    """Draw every parameter and running statistic; the scale keeps gates away from 0 and 1."""
    rng = generator("module", *key)
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = max(parameter[0].numel(), 1) if parameter.dim() >= 2 else 1
            draw = torch.randn(parameter.shape, generator=rng, dtype=torch.float64)
            parameter.copy_(0.8 * draw / fan_in**0.5)
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.5 * torch.randn(buffer.shape, generator=rng, dtype=torch.float64))
            elif name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=rng, dtype=torch.float64))
    return module


def feature_map(*shape: int, key: object = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """A normal map [N, C, ...] with a shift and a size of its own for every channel."""
    rng = generator("map", shape, key)
    x = torch.randn(shape, generator=rng, dtype=torch.float64)
    per_channel = (1, shape[1]) + (1,) * (len(shape) - 2)
    size = 0.5 + torch.rand(per_channel, generator=rng, dtype=torch.float64)
    shift = 0.5 * torch.randn(per_channel, generator=rng, dtype=torch.float64)
    return (x * size + shift).to(dtype)


def distinct_map(*shape: int, key: object = 0) -> Tensor:
    """A float64 map whose values are all different, at least 4e-3 apart."""
    rng = generator("distinct", shape, key)
    count = int(np.prod(shape))
    order = torch.randperm(count, generator=rng)
    jitter = torch.rand(count, generator=rng, dtype=torch.float64)
    return ((order + 0.5 * jitter) * (4.0 / count) - 2.0).reshape(shape)


def arrays(module: nn.Module) -> dict[str, np.ndarray]:
    """The state dict as float64 arrays, for the oracles."""
    return {k: v.detach().double().numpy().copy() for k, v in module.state_dict().items()}
