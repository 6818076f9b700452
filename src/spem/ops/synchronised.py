"""Batch statistics over several processes, for the fused tail of a `SyncBatchNorm`.

Forward the processes exchange the count, mean and variance of every channel, backward the two sums
that the gradient of a norm needs. Works with any backend of torch.distributed, on the CPU too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch import distributed as dist

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def moments(
    mu: Tensor, var: Tensor, values: int, group: ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance of every channel over all processes, and the number of values.

    Formula:
        n = sum n_p,  mu = sum n_p mu_p / n,  var = sum n_p (var_p + (mu_p - mu)^2) / n, summed in
        the order of ranks, so that all processes get the same bits. A process may hold no images.

    Shape:
        mu, var: [C]; the count is 0-dim.
    """
    if values == 0:
        mu, var = torch.zeros_like(mu), torch.zeros_like(var)
    mine = torch.cat([mu, var, mu.new_full((1,), values)])
    flat = mine.new_empty(dist.get_world_size(group) * mine.numel())
    dist.all_gather_into_tensor(flat, mine, group=group)
    everyone = flat.view(-1, mine.numel())
    means, variances = everyone[:, : mu.numel()], everyone[:, mu.numel() : -1]
    counts = everyone[:, -1:]
    n = counts.sum()
    mean = (counts * means).sum(0) / n
    return mean, (counts * (variances + (means - mean).square())).sum(0) / n, n


def sums(s0: Tensor, s1: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """Both sums over all processes, [C] each."""
    both = torch.stack([s0, s1])
    dist.all_reduce(both, group=group)
    return both[0], both[1]
