"""Memory layouts of maps: which are dense, when two agree, and the copy that makes them agree."""

import torch
from torch import Tensor


def is_dense(z: Tensor) -> bool:
    """Whether the map is contiguous or channels_last."""
    if z.is_contiguous():
        return True
    if z.dim() == 4:
        return z.is_contiguous(memory_format=torch.channels_last)
    return z.dim() == 5 and z.is_contiguous(memory_format=torch.channels_last_3d)


def agree(a: Tensor, b: Tensor) -> bool:
    """Whether two maps of one shape lie in memory in the same order.

    The stride of an axis of length 1 means nothing, and torch sets it in several ways.
    """
    pairs = zip(a.shape, a.stride(), b.stride(), strict=True)
    return all(size == 1 or mine == other for size, mine, other in pairs)


def laid_out_as(x: Tensor, like: Tensor) -> Tensor:
    """x in the layout of a dense map of its shape; a copy if it has another one."""
    return x if agree(x, like) else torch.empty_like(like).copy_(x)
