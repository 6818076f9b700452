"""The two autograd functions around the four passes; the gate runs between them, in torch.

`_Stats` gathers the plane statistics and returns them, normalised, beside four *tokens*: the map z
itself and three [B, C] tensors that carry nothing forward. `_Tail` takes the tokens, the gate v and
the residual. What its backward returns as the tokens' "gradients" is d, v, A and Bc, a convention
between the two functions; autograd then runs through the gate, and `_Stats.backward` finds all that
dz needs in its incoming gradients. So no gate is ever inside an operator, and no pass is added for
it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from spem.ops import formula, synchronised
from spem.ops.formula import Incoming, Norm, NormalStats, RawStats, affine, constants
from spem.ops.library import laid_out_as, passes
from spem.ops.stats import compute_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


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


class _Measured(NamedTuple):
    """What the forward pass knows of a map and its norm; as in `Gathered`, and rstd [C]."""

    raw: RawStats
    normal: NormalStats
    mu: Tensor
    a: Tensor
    beta: Tensor
    rstd: Tensor
    channel_var: Tensor
    values: Tensor


def gather(z: Tensor, norm: Norm | None, moments: bool, extrema: bool, impl: str) -> Gathered:
    """Plane statistics of x = norm(z), with gradients; ``norm`` None leaves z as it is."""
    if not torch.is_grad_enabled():
        return _gather_values(z, norm, moments, extrema, impl)
    given = norm is not None
    flat = norm or Norm(None, None, None, None, 0.0)
    out = _Stats.apply(z, *flat, given, moments, extrema, impl)
    return Gathered(*out)


def close(gathered: Gathered, v: Tensor | None, residual: Tensor, impl: str) -> Tensor:
    """y = relu(v x + residual) with x = a (z - mu) + beta; v None is 1."""
    g = gathered
    if not torch.is_grad_enabled():
        return _gated(g.z, v, residual, g.mu, g.a, g.beta, impl)[0]
    return _Tail.apply(
        g.z, g.token_v, g.token_total, g.token_moment, v, residual, g.mu, g.a, g.beta, impl
    )


def _gather_values(
    z: Tensor, norm: Norm | None, moments: bool, extrema: bool, impl: str
) -> Gathered:
    """`gather` where no gradient is recorded: no tokens."""
    m = _measure(z, norm, moments, extrema, impl)
    none = m.mu.new_empty(0)
    of_x, of_channels = m.normal[:4], (m.mu, m.a, m.beta, m.channel_var, m.values)
    return Gathered(z, none, none, none, *of_x, *of_channels)


def _measure(z: Tensor, norm: Norm | None, moments: bool, extrema: bool, impl: str) -> _Measured:
    """Pass F1, the channel's moments and the statistics of x."""
    work = passes(impl)
    stages = work.stages
    wide = compute_dtype(z.dtype)
    channels = z.shape[1]
    batch_moments = norm is not None and norm.mean is None
    # An output of an autograd function must not come twice: hence so many new tensors.
    if moments or extrema or batch_moments:
        # Where memory goes channel by channel, the last pass finds the extrema by their values.
        positions = {"positions": z.is_contiguous()} if work.plain else {}
        raw = RawStats(*work.plane_stats(z, moments or batch_moments, extrema, **positions))
    else:
        nothing, nowhere = z.new_empty(0, dtype=wide), z.new_empty(0, dtype=torch.int32)
        raw = RawStats(nothing, nothing, nothing, nothing, nothing, nowhere, nowhere)
    channel_var, values = z.new_empty(0, dtype=wide), z.new_empty(0, dtype=wide)
    if norm is None:
        mu, a, beta, rstd = constants(None, z)
        normal = NormalStats(*raw[:4], raw.high, raw.low, raw.at_high, raw.at_low)
        return _Measured(raw, normal, mu, a, beta, rstd, channel_var, values)
    if norm.mean is not None:
        mu, a, beta, rstd = constants(norm, z)
    elif norm.group is None and z.shape[0]:
        size = math.prod(z.shape[2:])
        mu, channel_var, rstd, a, beta, normal = stages.normalise_batch(raw, norm, size, moments)
        return _Measured(raw, normal, mu, a, beta, rstd, channel_var, values)
    else:
        if norm.group is None:
            mu, channel_var = z.new_zeros(channels, dtype=wide), z.new_ones(channels, dtype=wide)
        else:
            mu, channel_var = formula.channel_moments(raw.mean, raw.var)
            mu, channel_var, values = synchronised.moments(
                mu, channel_var, z.numel() // channels, norm.group
            )
        rstd = torch.rsqrt(channel_var + norm.eps)
        a, beta = affine(norm, rstd)
    normal = stages.normalised(raw, a, mu, beta)
    return _Measured(raw, normal, mu, a, beta, rstd, channel_var, values)


def _gated(
    z: Tensor,
    v: Tensor | None,
    residual: Tensor,
    mu: Tensor,
    a: Tensor,
    beta: Tensor,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Pass F2: the tail's output, and the gate as a dense tensor."""
    v = mu.new_ones(z.shape[:2]) if v is None else v.contiguous()
    return passes(impl).affine_tail(z, residual, mu, v, a, beta), v


class _Refused(torch.autograd.Function):
    """The identity, whose gradient is an error."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise RuntimeError(
            "bn_gate_tail, norm_relu: the fused operations have no second derivatives; they cannot "
            "be differentiated twice. Use spem.ops.use_impl('reference')."
        )


def first_derivatives(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Makes whoever differentiates the results of a backward pass fail, not get half of them."""

    @functools.wraps(backward)
    def wrapped(ctx: Any, *grads: Tensor | None) -> Any:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            results = backward(ctx, *grads)
        return tuple(
            None if r is None else _Refused.apply(r.detach().requires_grad_()) for r in results
        )

    return wrapped


class _Stats(torch.autograd.Function):
    """Pass F1 and its scalars; backward is the sums, the coefficients and pass B2."""

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
        running: tuple[Tensor, Tensor, float] | None,
        given: bool,
        moments: bool,
        extrema: bool,
        impl: str,
    ) -> tuple[Tensor, ...]:
        norm = Norm(weight, bias, mean, var, eps, group, running) if given else None
        m = _measure(z, norm, moments, extrema, impl)
        ctx.save_for_backward(z, m.a, m.mu, m.rstd, m.values, *m.raw[:2], *m.normal[4:])
        ctx.set_materialize_grads(False)
        ctx.impl, ctx.group, ctx.constant = impl, group, not given or mean is not None
        ctx.moments, ctx.extrema = moments, extrema
        ctx.dtypes = (
            None if weight is None else weight.dtype,
            None if bias is None else bias.dtype,
        )
        a = m.a.clone() if m.a is m.rstd else m.a
        ctx.mark_non_differentiable(m.mu, a, m.beta, m.channel_var, m.values)
        tokens = [m.mu.new_empty(z.shape[:2]) for _ in range(3)]  # nobody reads them
        stats = [s if s.dim() == 2 else m.mu.new_empty(0) for s in m.normal[:4]]
        return (z.view_as(z), *tokens, *stats, m.mu, a, m.beta, m.channel_var, m.values)

    @staticmethod
    @first_derivatives
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
        if d is None:
            d = torch.zeros_like(z)
        zero: Tensor = mu.new_zeros(z.shape[:2])
        v = zero if v is None else v
        total = zero if total is None else total
        moment = zero if moment is None else moment
        if not ctx.moments:
            mean = var = None  # compilers materialise zeros here
        if not ctx.extrema:
            high = low = None
        into = Incoming(*(None if g is None else g.contiguous() for g in (mean, var, high, low)))
        needs_z, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        size = math.prod(z.shape[2:])
        of_z = (raw_mean, raw_var, z_i, z_j)
        if ctx.group is None:
            weight, bias, c = work.stages.gradients(
                *(v, total, moment, into, of_z, a, mu, rstd, size),
                batch_stats=not ctx.constant,
                of_norm=needs_weight or needs_bias,
                of_map=needs_z,
            )
        else:
            s0, s1 = formula.channel_sums(v, total, moment, into, of_z, a, mu)
            weight, bias = rstd * s1, s0
            s0, s1 = synchronised.sums(s0, s1, ctx.group)
            shared = (s0 / count, rstd.square() * s1 / count)
            c = formula.coefficients(v, into, raw_mean, a, mu, size, shared)
        dz = None
        if needs_z:
            spikes = (None, None)
            if c.s_i is not None:
                spikes = (i, j) if i.dim() == 2 else (z_i, z_j)
            dz = work.stats_backward(d, z, mu, c.p, c.q, c.t, *spikes, c.s_i, c.s_j)
        weight = weight.to(ctx.dtypes[0]) if needs_weight else None
        bias = bias.to(ctx.dtypes[1]) if needs_bias else None
        return (dz, weight, bias, *[None] * (len(ctx.needs_input_grad) - 3))


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
        y, factor = _gated(z, v, residual, mu, a, beta, impl)
        ctx.save_for_backward(z, y, mu, a, beta, factor)
        ctx.impl = impl
        return y

    @staticmethod
    @first_derivatives
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        z, y, mu, a, beta, v = ctx.saved_tensors
        work = passes(ctx.impl)
        grad = laid_out_as(grad, y)  # a sum's gradient, say, is expanded
        d, total, moment = work.affine_tail_backward(grad, y, z, mu)
        dv = None
        if ctx.needs_input_grad[4]:
            dv = work.stages.gate_gradient(total, moment, a, beta)
        return d, v, total, moment, dv, d, None, None, None, None
