"""Random starts that are not torch's default, for `ChannelAttention.random_init`."""

import math

import torch
from torch import Tensor


def kaiming_normal_fan_in(weight: Tensor, generator: torch.Generator | None) -> None:
    """N(0, 2 / fan_in): Kaiming normal over fan_in, Caffe's "msra"."""
    fan_in = math.prod(weight.shape[1:])
    with torch.no_grad():
        weight.normal_(0.0, math.sqrt(2.0 / fan_in), generator=generator)


def normal_hundredth(weight: Tensor, generator: torch.Generator | None) -> None:
    """N(0, 0.01^2)."""
    with torch.no_grad():
        weight.normal_(0.0, 0.01, generator=generator)
