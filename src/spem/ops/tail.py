"""The end of a residual branch, relu(gate x + residual), as one operation for every gate."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from spem.ops import autograd, reference
from spem.ops.dispatch import choose, log_choice
from spem.ops.formula import Norm, move_running
from spem.ops.inference import SMALL, gate_values, infer, serves
from spem.ops.library import (
    BATCH_NORMS,
    has_hooks,
    is_dense,
    is_direct,
    is_plain,
    laid_out_as,
    may_show,
    without_hooks,
)
from spem.ops.reference import Gate
from spem.ops.stats import STATISTICS, check, selected
from spem.ops.synchronised import SharedBatchNorm, group_of, running_of

_NORMS = (*BATCH_NORMS, nn.SyncBatchNorm)


def gate_tail(
    x: Tensor,
    residual: Tensor,
    gate: Gate | None = None,
    *,
    statistics: Collection[str] = STATISTICS,
    impl: str | None = None,
) -> Tensor:
    """relu(v x + residual) with the gate v = gate(stats(x)); None is v = 1.

    Formula:
        y = relu(v x + r),  v = f(mean, var, max, min) per plane. Gradients flow through all four
        statistics; those of max and min go to the first extremum in row-major order.

    Shape:
        x, residual, output: [N, C, ...], of one shape; v: [N, C].

    Args:
        x: The map. Numba takes float32, float64, bfloat16; Triton float32, bfloat16, float16.
        residual: Added to the gated map; copied once if its memory layout is not that of x.
        gate: A differentiable function of `PlaneStats`; statistics arrive in at least float32.
        statistics: Those that the gate reads; others are None in what it is given.
        impl: As for `spem.ops.use_impl`.

    Raises:
        ValueError: Shapes or devices differ, or what was asked for cannot run here.

    Differences: second derivatives raise, except in ``"reference"``.
    """
    return _tail("gate_tail", x, residual, None, gate, statistics, impl)


def bn_gate_tail(
    z: Tensor,
    residual: Tensor,
    norm: nn.Module,
    gate: Gate | None = None,
    *,
    statistics: Collection[str] = STATISTICS,
    impl: str | None = None,
) -> Tensor:
    """relu(v x + residual) with x = norm(z) and the gate v = gate(stats(x)); None is v = 1.

    Batch norm, attention, addition and ReLU in four passes over memory forward and seven backward,
    whatever the gate: what norm, addition and ReLU need alone. A norm in training updates its
    running statistics as it does when called.

    Formula:
        x = gamma (z - mu) rstd + beta,  y = relu(f(stats(x)) x + r). The statistics of x follow
        from those of z, so x is never formed; ties of extrema are those of z. gamma = 0 makes every
        position of x tie, and the first one counts.

    Shape:
        z, residual, output: [N, C, ...], of one shape; v: [N, C].

    Args:
        z: The norm's input.
        norm: BatchNorm1d, 2d or 3d in training or evaluation, or SyncBatchNorm (also on the CPU).
            Other norms are composed, and so are norms with hooks where gradients are recorded;
            without gradients hooks are called with the norm's own output, and change no bit.

    All else is as for `gate_tail`. A batch of one value per channel in training raises ValueError.
    """
    return _tail("bn_gate_tail", z, residual, norm, gate, statistics, impl)


def _tail(
    op: str,
    z: Tensor,
    residual: Tensor,
    norm: nn.Module | None,
    gate: Gate | None,
    statistics: Collection[str],
    impl: str | None,
) -> Tensor:
    if not torch.is_grad_enabled():
        y = infer(op, z, residual, norm, gate, statistics, impl)
        if y is not None:
            return y
    if not isinstance(z, Tensor):  # a placeholder of a tracer
        return reference.tail(z, residual, norm, gate, statistics)
    check(op, z, statistics)
    if z.shape != residual.shape:
        raise ValueError(
            f"{op}: the residual's shape {list(residual.shape)} is not the map's {list(z.shape)}."
        )
    if z.device != residual.device:
        raise ValueError(f"{op}: the map is on {z.device}, the residual on {residual.device}.")
    chosen = plain = None
    if norm is not None and not norm.training and may_show(norm, z):
        plain = without_hooks(norm)
    if plain is None or serves(op, z, residual, 0 if gate is not None else SMALL, impl) is None:
        chosen = _choose(op, z, residual, plain or norm, impl)
    # Of an empty batch there is nothing to fuse, and one that others share may be empty here alone.
    if chosen == "reference" or not (z.numel() or (norm is not None and group_of(norm))):
        return reference.tail(z, residual, norm, gate, statistics)
    if norm is not None and plain is not None:
        x, plain = called(norm, z)
        if plain is not None:
            return _tail(op, z, residual, plain, gate, statistics, impl)
        return reference.tail(x, residual, None, gate, statistics)  # a hook put another one there
    assert chosen is not None
    return _fused(z, residual, norm, gate, statistics, chosen)


def called(norm: nn.Module, z: Tensor) -> tuple[Tensor, nn.Module | None]:
    """What a norm with hooks returns, and a norm without hooks that returns the same.

    None if a hook put something else in its place.
    """
    x, plain = norm(z), without_hooks(norm)
    return x, plain if torch.equal(x, plain(z)) else None


def why_composed(norm: nn.Module | None) -> str | None:
    """Why a norm's tail has to be composed of modules; None if it can be fused."""
    if norm is None:
        return None
    forwards = (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward, SharedBatchNorm.forward)
    if type(norm).forward not in forwards or not isinstance(norm, _NORMS):
        return f"fuses batch norms, not {type(norm).__name__}"
    return f"cannot call the hooks of {type(norm).__name__}" if has_hooks(norm) else None


def _choose(op: str, z: Tensor, residual: Tensor, norm: nn.Module | None, impl: str | None) -> str:
    composed = why_composed(norm)
    if not is_plain(z):
        composed = "takes plain tensors, not those of a transform or a tracer"
    if residual.dtype != z.dtype:
        composed = f"takes maps of one dtype, got {z.dtype} and a residual of {residual.dtype}"
    dense, values = is_dense(z), z.numel()
    choice = choose(op, z.device, z.dtype, dense=dense, values=values, composed=composed, impl=impl)
    log_choice(op, z, choice)
    return choice.impl


def _fused(
    z: Tensor,
    residual: Tensor,
    norm: nn.Module | None,
    gate: Gate | None,
    statistics: Collection[str],
    impl: str,
) -> Tensor:
    view = running = None
    if norm is not None:
        view = batch_norm_of(norm, z)
        running = running_of(norm) if view.mean is None else None
        if view.group is None and is_direct(impl):
            view, running = view._replace(running=running), None  # the kernel moves them

    def gate_of(*found: Tensor) -> Tensor:
        assert gate is not None
        stats = selected(found, statistics, z)._replace(direct=is_direct(impl))
        return gate_values(gate, stats, z)

    read = () if gate is None else statistics
    moments, extrema = bool({"mean", "var"} & set(read)), bool({"max", "min"} & set(read))
    y, (mu, var, values) = autograd.tail(
        *(z, laid_out_as(residual, z), view, None if gate is None else gate_of, moments, extrema),
        impl if z.numel() else "formula",  # there is nothing for a kernel to do
    )
    if running is not None:
        move_running(running, mu, var, z.numel() // z.shape[1] if values.dim() else values)
    return y


def batch_norm_of(norm: nn.Module, z: Tensor) -> Norm:
    """A norm as tensors; refuses what the module itself would refuse."""
    assert isinstance(norm, _NORMS)
    kind = type(norm).__name__
    getattr(norm, "_check_input_dim")(z)  # noqa: B009  # protected, and a subclass may have its own
    if z.shape[1] != norm.num_features:
        raise ValueError(
            f"{kind}: the norm has {norm.num_features} channels, the map {z.shape[1]}."
        )
    weight: Tensor | None = norm.weight
    bias: Tensor | None = norm.bias
    mean, var = norm.running_mean, norm.running_var
    for t in (weight, bias, mean, var):
        if t is not None and t.device != z.device:
            raise ValueError(f"{kind}: the map is on {z.device}, the norm on {t.device}.")
    if not norm.training and mean is not None and var is not None:
        return Norm(weight, bias, mean, var, norm.eps)
    group = group_of(norm)
    if z.shape[0] and z.numel() == z.shape[1] and group is None:
        raise ValueError(
            f"{kind}: training needs more than one value per channel, got {list(z.shape)}. "
            "Use a larger batch, or eval()."
        )
    return Norm(weight, bias, None, None, norm.eps, group)
