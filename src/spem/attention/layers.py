"""Norms over channels in the precision of the statistics, beside those of `precision`."""

from torch import Tensor, nn
from torch.nn import functional as F

from spem.attention.precision import cast


def layer_norm(norm: nn.LayerNorm, z: Tensor) -> Tensor:
    """``norm(z)`` in the dtype of z, [N, features]."""
    shape = list(norm.normalized_shape)
    return F.layer_norm(z, shape, cast(norm.weight, z), cast(norm.bias, z), norm.eps)


def group_norm(norm: nn.GroupNorm, z: Tensor) -> Tensor:
    """``norm(z)`` in the dtype of z, [N, C, L]."""
    return F.group_norm(z, norm.num_groups, cast(norm.weight, z), cast(norm.bias, z), norm.eps)
