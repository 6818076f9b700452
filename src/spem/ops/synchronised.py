"""Batch statistics over several processes, for batch norms and for the fused tail of one.

Forward the processes exchange the count, mean and variance of every channel, backward the two sums
that the gradient of a norm needs. Works with any backend of torch.distributed, on the CPU too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed as dist, nn

from spem.ops.formula import Norm, affine, move_running, spatial
from spem.ops.stats import compute_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def group_of(norm: nn.Module) -> ProcessGroup | None:
    """The processes whose batches a norm in training shares, None for this one alone."""
    if not isinstance(norm, nn.SyncBatchNorm) or not norm.training:
        return None
    if getattr(norm, "alone", False) or not dist.is_available() or not dist.is_initialized():
        return None
    group = norm.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def running_of(norm: Any) -> tuple[Tensor, Tensor, float] | None:
    """The running statistics that a batch moves, and by what factor; counts the batch."""
    mean, var = norm.running_mean, norm.running_var
    if not norm.training or not norm.track_running_stats or mean is None or var is None:
        return None
    factor = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if factor is None:
            factor = 1.0 / float(norm.num_batches_tracked)
    return mean, var, 0.0 if factor is None else factor


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


class SharedBatchNorm(nn.SyncBatchNorm):
    """Batch norm over the batches of all processes, on any device and without waiting for it.

    torch's `SyncBatchNorm` refuses CPU tensors, and reads counts back from a GPU. Statistics are
    taken in at least float32; a tail with this norm can be fused.

    Formula:
        y = gamma (z - mu) / sqrt(var + eps) + beta, with the moments of all processes' batches
        together; running statistics as one process with all of them has.

    Shape:
        z and output: [N, C, ...]; N may differ between the processes, and be 0 in some.
    """

    alone = False
    """Whether this process normalises its batch by itself for the moment."""

    @classmethod
    def of(cls, norm: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) -> SharedBatchNorm:
        """A norm to put in the place of another one: its options, and its very tensors."""
        shared = cls(
            norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats
        )
        shared.weight, shared.bias = norm.weight, norm.bias
        shared.running_mean, shared.running_var = norm.running_mean, norm.running_var
        shared.num_batches_tracked = norm.num_batches_tracked
        return shared.train(norm.training)

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, ...] -> the same shape, dtype and memory format."""
        group = group_of(self)
        if group is None:
            # The forward of all plain batch norms, whatever their rank.
            return nn.BatchNorm2d.forward(self, input)  # pyright: ignore[reportArgumentType]
        self._check_input_dim(input)
        y, mu, var, n = _Normalise.apply(input, self.weight, self.bias, self.eps, group)
        running = running_of(self)
        if running is not None:
            move_running(running, mu, var, n)
        return y


class _Normalise(torch.autograd.Function):
    """The norm with its gradient, each with one exchange; also returns mu, var and the count."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        group: ProcessGroup,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = z.to(compute_dtype(z.dtype))
        channels = z.shape[1]
        if z.numel() == 0:
            var, mu = x.new_zeros(channels), x.new_zeros(channels)
        else:
            var, mu = torch.var_mean(x, _others(z), correction=0)
        mu, var, n = moments(mu, var, z.numel() // channels, group)
        rstd = torch.rsqrt(var + eps)
        a, beta = affine(Norm(weight, bias, None, None, eps), rstd)
        y = (x - spatial(mu, z)) * spatial(a, z) + spatial(beta, z)
        ctx.save_for_backward(z, mu, rstd, a, n)
        ctx.group = group
        ctx.mark_non_differentiable(mu, var, n)
        return y.to(z.dtype), mu, var, n

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        z, mu, rstd, a, n = ctx.saved_tensors
        x, g = z.to(mu.dtype) - spatial(mu, z), grad.to(mu.dtype)
        s0, s1 = g.sum(_others(z)), (g * x).sum(_others(z))
        weight = rstd * s1 if ctx.needs_input_grad[1] else None
        bias = s0 if ctx.needs_input_grad[2] else None
        dz = None
        if ctx.needs_input_grad[0]:
            s0, s1 = sums(s0, s1, ctx.group)
            dz = g - spatial(s0 / n, z) - x * spatial(rstd.square() * s1 / n, z)
            dz = (dz * spatial(a, z)).to(z.dtype)
        return dz, weight, bias, None, None


def _others(z: Tensor) -> list[int]:
    """All axes but that of the channels."""
    return [0, *range(2, z.dim())]
