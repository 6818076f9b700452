"""The two autograd functions around the four passes; the gate runs between them, in torch.

`_Stats` gathers the plane statistics and returns them, normalised, with four *tokens*: the map z
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
from typing import Any

import torch
from torch import Tensor

from spem.ops import formula, synchronised
from spem.ops.formula import Incoming, Norm, NormalStats, RawStats, Scalars, affine, constants
from spem.ops.library import kernels_of, laid_out_as, passes, stages
from spem.ops.stats import compute_dtype


def tail(
    z: Tensor,
    residual: Tensor,
    norm: Norm | None,
    gate: Callable[..., Tensor] | None,
    moments: bool,
    extrema: bool,
    impl: str,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """y = relu(v x + residual) with x = norm(z) and v = gate(mean, var, max, min of x).

    ``norm`` None leaves z as it is, ``gate`` None is v = 1; statistics not gathered have shape [0].

    Returns:
        y, and the batch's mean and biased variance [C] with the number of values behind them over
        all processes; the variance has shape [0] where it was not taken, the number has it without
        a process group.
    """
    found = _Stats.apply(z, moments, extrema, impl, *(norm or ()))
    tokens, stats, (mu, a, beta, channel_var, values) = found[:4], found[4:8], found[8:]
    v = None if gate is None else gate(*stats)
    return _Tail.apply(*tokens, v, residual, mu, a, beta, impl), (mu, channel_var, values)


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
    def forward(
        ctx: Any, z: Tensor, moments: bool, extrema: bool, impl: str, *fields: Any
    ) -> tuple[Tensor, ...]:
        norm = Norm(*fields) if fields else None  # flat, as compilers trace arguments
        group, batch_stats = norm and norm.group, norm is not None and norm.mean is None
        wide, size = compute_dtype(z.dtype), math.prod(z.shape[2:])
        # An output must not come twice, so each is a tensor of its own.
        channel_var, values = (z.new_empty(0, dtype=wide) for _ in range(2))
        if moments or extrema or batch_stats:
            work, options = passes(impl), {}
            if impl == "numba" and work is stages(impl):
                # Where memory goes channel by channel, the last pass finds extrema by their values.
                options = {"positions": z.is_contiguous()}
            raw = RawStats(*work.plane_stats(z, moments or batch_stats, extrema, **options))
        else:
            raw = formula.empty_stats(z, False, False)
        if norm is None or norm.mean is not None:
            mu, a, beta, rstd = constants(norm, z)
            normal = NormalStats(*raw[:4], *raw[2:4], *raw[5:])
            if norm is not None:
                normal = stages(impl).normalised(raw, a, mu, beta)
        elif norm.group is None:
            found = stages(impl).normalise_batch(raw, norm, size, moments)
            mu, channel_var, rstd, a, beta, normal = found
        else:
            mu, channel_var = formula.channel_moments(raw.mean, raw.var)
            numbers = z.numel() // z.shape[1]
            mu, channel_var, values = synchronised.moments(mu, channel_var, numbers, norm.group)
            rstd = torch.rsqrt(channel_var + norm.eps)
            a, beta = affine(norm, rstd)
            normal = stages(impl).normalised(raw, a, mu, beta)
        ctx.save_for_backward(z, a, mu, rstd, values, *raw[:2], *normal[4:])
        ctx.set_materialize_grads(False)
        ctx.impl, ctx.group, ctx.batch_stats = impl, group, batch_stats
        ctx.moments, ctx.extrema = moments, extrema
        a = a.clone() if a is rstd else a
        ctx.mark_non_differentiable(mu, a, beta, channel_var, values)
        tokens = [mu.new_empty(z.shape[:2]) for _ in range(3)]  # nobody reads them
        stats = [s if s.dim() == 2 else mu.new_empty(0) for s in normal[:4]]
        return (z.view_as(z), *tokens, *stats, mu, a, beta, channel_var, values)

    @staticmethod
    @first_derivatives
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        z, a, mu, rstd, count, raw_mean, raw_var, z_i, z_j, i, j = ctx.saved_tensors
        d = torch.zeros_like(z) if grads[0] is None else grads[0]
        zero: Tensor = mu.new_zeros(z.shape[:2])
        v, total, moment = (zero if g is None else g for g in grads[1:4])
        # Compilers materialise zeros for what was not gathered.
        moved = (grads[4:6] if ctx.moments else (None, None)) + (
            grads[6:8] if ctx.extrema else (None, None)
        )
        into = Incoming(*(None if g is None else g.contiguous() for g in moved))
        needs_z, *_ = needs = ctx.needs_input_grad
        needs_weight, needs_bias = needs[4:6] or (False, False)
        of_z, size = (raw_mean, raw_var, z_i, z_j), math.prod(z.shape[2:])
        scalars = Scalars(v, total, moment, into, of_z, a, mu, rstd, size)
        if ctx.group is None:
            weight, bias, c = stages(ctx.impl).gradients(
                *scalars,
                batch_stats=ctx.batch_stats,
                of_norm=needs_weight or needs_bias,
                of_map=needs_z,
            )
        else:
            s0, s1 = formula.channel_sums(scalars)
            weight, bias = rstd * s1, s0
            s0, s1 = synchronised.sums(s0, s1, ctx.group)
            c = formula.coefficients(scalars, (s0 / count, rstd.square() * s1 / count))
        dz = None
        if needs_z:
            spikes = (None, None)
            if c.s_i is not None:
                spikes = (i, j) if i.dim() == 2 else (z_i, z_j)
            work = passes(ctx.impl)
            dz = work.stats_backward(d, z, mu, c.p, c.q, c.t, *spikes, c.s_i, c.s_j)
        # Autograd casts what is not in the dtype of its parameter.
        of_norm = weight if needs_weight else None, bias if needs_bias else None
        return (dz, None, None, None, *of_norm, *[None] * 5)[: len(needs)]


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
        v = mu.new_ones(z.shape[:2]) if v is None else v.contiguous()
        y = passes(impl).affine_tail(z, residual, mu, v, a, beta)
        ctx.save_for_backward(z, y, mu, a, beta, v)
        ctx.impl = impl
        return y

    @staticmethod
    @first_derivatives
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        z, y, mu, a, beta, v = ctx.saved_tensors
        grad = laid_out_as(grad, y)  # a sum's gradient, say, is expanded
        d, total, moment = passes(ctx.impl).affine_tail_backward(grad, y, z, mu)
        dv = None
        if ctx.needs_input_grad[4]:
            dv = stages(ctx.impl).gate_gradient(total, moment, a, beta)
        return d, v, total, moment, dv, d, None, None, None, None


class _SpemGate(torch.autograd.Function):
    """SPEM's gate [N, C] by a kernel of Numba's; torch takes some forty operations for it."""

    @staticmethod
    def forward(
        ctx: Any, form: str, lam: float, slopes: tuple[float, ...], *tensors: Tensor | None
    ) -> Tensor:
        _, high, *_ = tensors  # behind lambda's parameter; high, low, w_e, b_e, w_r, b_r
        assert high is not None
        given = [t.to(high.dtype).contiguous() for t in tensors[1:] if t is not None]
        ctx.save_for_backward(*given)
        ctx.form, ctx.lam, ctx.slopes = form, lam, slopes
        ctx.shapes = [None if t is None else t.shape for t in tensors]
        return kernels_of("numba").spem_gate(form, lam, None, *given)[0]

    @staticmethod
    @first_derivatives
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        numba = kernels_of("numba")
        *found, of_lam = numba.spem_gate(ctx.form, ctx.lam, grad.contiguous(), *ctx.saved_tensors)
        of_parameter = of_lam.sum() * of_lam.new_tensor(ctx.slopes)
        pairs = zip((of_parameter, *found), ctx.shapes, ctx.needs_input_grad[3:], strict=True)
        return (None, None, None, *(t.reshape(s) if needed else None for t, s, needed in pairs))


def spem_gate(
    form: str, lam: tuple[float, tuple[float, ...], Tensor | None], *tensors: Tensor | None
) -> Tensor:
    """The gate of one of SPEM's forms from lambda, maximum, minimum, w_e, b_e, w_r and b_r.

    lambda is a number with its derivatives by a parameter, and the parameter.
    """
    return _SpemGate.apply(form, *lam, *tensors)
