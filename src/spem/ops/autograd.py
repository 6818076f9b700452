"""The two autograd functions around the four passes; the gate runs between them, in torch.

`_Stats` gathers the plane statistics and returns them, normalised, beside four *tokens*: the map z
itself and three [B, C] tensors that carry nothing forward. `_Tail` takes the tokens, the gate v and
the residual. What its backward returns as the tokens' "gradients" is d, v, A and Bc, a convention
between the two functions; autograd then runs through the gate, and `_Stats.backward` finds all that
dz needs in its incoming gradients. So no gate is ever inside an operator, and no pass is added for
it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spem.ops import synchronised
from spem.ops.algebra import Incoming, NormalStats, RawStats
from spem.ops.library import passes

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Norm(NamedTuple):
    """A batch norm as tensors.

    Attributes:
        weight: gamma [C], or None for ones.
        bias: beta [C], or None for zeros.
        mean: Constant mean [C], or None to take the batch's.
        var: Constant variance [C], or None to take the batch's.
        eps: Added to the variance.
        group: Processes that share the batch's statistics, or None.
    """

    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    eps: float
    group: ProcessGroup | None = None


class Gathered(NamedTuple):
    """What the first function hands on: tokens, statistics of x, the norm's affine map."""

    z: Tensor
    token_v: Tensor
    token_total: Tensor
    token_moment: Tensor
    mean: Tensor
    var: Tensor
    high: Tensor
    low: Tensor
    mu: Tensor
    a: Tensor
    beta: Tensor
    channel_var: Tensor
    """The batch's biased variance [C], shape [0] where it was not taken; its mean is ``mu``."""
    values: Tensor
    """Number of values behind it over all processes, shape [0] without a process group."""


def gather(z: Tensor, norm: Norm | None, moments: bool, extrema: bool, impl: str) -> Gathered:
    """Plane statistics of x = norm(z), with gradients; ``norm`` None leaves z as it is."""
    weight, bias, mean, var, eps, group = norm or Norm(None, None, None, None, 0.0)
    constant = norm is None or mean is not None
    out = _Stats.apply(
        z, weight, bias, mean, var, eps, group, norm is None, constant, moments, extrema, impl
    )
    return Gathered(*out)


def close(gathered: Gathered, v: Tensor | None, residual: Tensor, impl: str) -> Tensor:
    """y = relu(v x + residual) with x = a (z - mu) + beta; v None is 1."""
    g = gathered
    return _Tail.apply(
        g.z, g.token_v, g.token_total, g.token_moment, v, residual, g.mu, g.a, g.beta, impl
    )


class _Stats(torch.autograd.Function):
    """Pass F1 and its scalars; backward is passes' sums, coefficients and B2."""

    @staticmethod
    def forward(  # a flat list of arguments is what compilers trace
        ctx: Any,
        z: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        eps: float,
        group: ProcessGroup | None,
        bare: bool,
        constant: bool,
        moments: bool,
        extrema: bool,
        impl: str,
    ) -> tuple[Tensor, ...]:
        work = passes(impl)
        stages = work.stages
        wide = torch.promote_types(z.dtype, torch.float32)
        channels = z.shape[1]
        if moments or extrema or not constant:
            raw = RawStats(*work.plane_stats(z, moments or not constant, extrema))
        else:
            nothing = z.new_empty(0, dtype=wide)
            nowhere = z.new_empty(0, dtype=torch.int32)
            raw = RawStats(nothing, nothing, nothing, nothing, nothing, nowhere, nowhere)
        # An output must not be an input, nor come twice: hence so many new tensors.
        channel_var, count = z.new_empty(0, dtype=wide), z.new_empty(0, dtype=wide)
        if bare:
            mu, deviation = z.new_zeros(channels, dtype=wide), None
            rstd = z.new_ones(channels, dtype=wide)
        elif constant:
            assert mean is not None
            assert var is not None
            mu, deviation = mean.to(wide), var.to(wide)
            rstd = torch.rsqrt(deviation + eps)
        else:
            if z.shape[0] == 0 and group is None:
                mu, channel_var = (
                    z.new_zeros(channels, dtype=wide),
                    z.new_ones(channels, dtype=wide),
                )
            else:
                mu, channel_var = stages.channel_moments(raw.mean, raw.var)
            if group is not None:
                mu, channel_var, count = synchronised.moments(
                    mu, channel_var, z.numel() // channels, group
                )
            rstd = torch.rsqrt(channel_var + eps)
        a = rstd if weight is None else weight.detach().to(wide) * rstd
        beta = mu.new_zeros(channels) if bias is None else bias.detach().to(wide).clone()
        normal: NormalStats = stages.normalised(raw, a, mu, beta)
        ctx.save_for_backward(z, a, mu, rstd, count, *raw[:2], *normal[4:])
        ctx.set_materialize_grads(False)
        ctx.impl, ctx.group, ctx.constant = impl, group, constant
        ctx.moments, ctx.extrema = moments, extrema
        ctx.dtypes = (
            None if weight is None else weight.dtype,
            None if bias is None else bias.dtype,
        )
        ctx.mark_non_differentiable(mu, a, beta, channel_var, count)
        tokens = [mu.new_zeros(z.shape[:2]) for _ in range(3)]
        stats = [s if s.dim() == 2 else mu.new_empty(0) for s in normal[:4]]
        return (z.view_as(z), *tokens, *stats, mu.clone(), a.clone(), beta, channel_var, count)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        d: Tensor | None,
        v: Tensor | None,
        total: Tensor | None,
        moment: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        high: Tensor | None,
        low: Tensor | None,
        *_: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        z, a, mu, rstd, count, raw_mean, raw_var, z_i, z_j, i, j = ctx.saved_tensors
        work = passes(ctx.impl)
        stages = work.stages
        if d is None:
            d = torch.zeros_like(z)
        zero = mu.new_zeros(z.shape[:2])
        v, total, moment = (zero if g is None else g for g in (v, total, moment))
        if not ctx.moments:
            mean = var = None  # compilers materialise zeros here
        if not ctx.extrema:
            high = low = None
        into = Incoming(*(None if g is None else g.contiguous() for g in (mean, var, high, low)))
        needs_z, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        shared = weight = bias = None
        if not ctx.constant or needs_weight or needs_bias:
            # Only what channel_sums reads of the statistics was saved.
            raw = RawStats(raw_mean, raw_var, zero, zero, zero, i, j)
            normal = NormalStats(zero, zero, zero, zero, z_i, z_j, i, j)
            s0, s1 = stages.channel_sums(v, total, moment, into, raw, normal, a, mu)
            if needs_weight:
                weight = (rstd * s1).to(ctx.dtypes[0])
            if needs_bias:
                bias = s0.to(ctx.dtypes[1])
            if not ctx.constant:
                if ctx.group is not None:
                    s0, s1 = synchronised.sums(s0, s1, ctx.group)
                n = count if ctx.group is not None else max(z.numel() // z.shape[1], 1)
                shared = (s0 / n, rstd.square() * s1 / n)
        dz = None
        if needs_z:
            size = z[0, 0].numel() if z.shape[0] else 1
            c = stages.coefficients(v, into, raw_mean, a, mu, size, shared)
            spikes = (i, j) if c.s_i is not None else (None, None)
            dz = work.stats_backward(d, z, mu, c.p, c.q, c.t, *spikes, c.s_i, c.s_j)
        return (dz, weight, bias, *[None] * 9)


class _Tail(torch.autograd.Function):
    """Pass F2; backward is pass B1."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        token_v: Tensor,
        token_total: Tensor,
        token_moment: Tensor,
        v: Tensor | None,
        residual: Tensor,
        mu: Tensor,
        a: Tensor,
        beta: Tensor,
        impl: str,
    ) -> Tensor:
        work = passes(impl)
        factor = mu.new_ones(z.shape[:2]) if v is None else v.contiguous()
        al, be = work.stages.gated_affine(factor, a, beta)
        y = work.affine_tail(z, residual, mu, al, be)
        ctx.save_for_backward(z, y, mu, a, beta, factor)
        ctx.impl = impl
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        z, y, mu, a, beta, v = ctx.saved_tensors
        work = passes(ctx.impl)
        if grad.stride() != y.stride():  # an expanded or permuted gradient, say of a sum
            grad = torch.empty_like(y).copy_(grad)
        d, total, moment = work.affine_tail_backward(grad, y, z, mu)
        dv = None
        if ctx.needs_input_grad[4]:
            dv = work.stages.gate_gradient(total, moment, a, beta)
        return d, v, total, moment, dv, d, None, None, None, None
