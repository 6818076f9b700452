"""The end of a residual branch, relu(gate x + residual), as one operation for every gate."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor, nn

from spem.ops import reference
from spem.ops.autograd import Gathered, close, gather
from spem.ops.dispatch import Choice, choose, log_choice
from spem.ops.formula import Norm, move_running
from spem.ops.inference import gate_values, infer, serves
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
from spem.ops.stats import STATISTICS, PlaneStats
from spem.ops.synchronised import SharedBatchNorm, group_of

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
        x: The map: float32, float64 or bfloat16 for Numba; float32, bfloat16 or float16 for
            Triton.
        residual: Added to the gated map; copied once if its memory layout is not that of x.
        gate: A differentiable function of `PlaneStats`; statistics arrive in at least float32.
        statistics: Those that the gate reads; others are None in what it is given.
        impl: ``"reference"``, ``"formula"``, ``"numba"``, ``"triton"``, or None for the automatic
            choice (see `spem.ops.use_impl`).

    Raises:
        ValueError: Shapes or devices differ, or an implementation that was asked for cannot run
            here.

    Differences: second derivatives raise, except in ``"reference"``.
    """
    if not torch.is_grad_enabled():
        y = infer("gate_tail", x, residual, None, gate, statistics, impl)
        if y is not None:
            return y
    _check("gate_tail", x, residual, statistics)
    choice = _choose("gate_tail", x, residual, None, gate, impl)
    if choice.impl == "reference":
        return reference.tail(x, residual, None, gate, statistics)
    return _fused(x, residual, None, gate, statistics, choice.impl)[0]


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
        residual: As for `gate_tail`.
        norm: BatchNorm1d, 2d or 3d in training or evaluation, or SyncBatchNorm (also on the CPU).
            Other norms are composed, and so are norms with hooks where gradients are recorded;
            without gradients hooks are called with the norm's own output, and change no bit.
        gate: As for `gate_tail`.
        statistics: As for `gate_tail`.
        impl: As for `gate_tail`.

    Raises:
        ValueError: Shapes or devices differ, an implementation that was asked for cannot run here,
            or a batch holds one value per channel in training.

    Differences: second derivatives raise, except in ``"reference"``.
    """
    if not torch.is_grad_enabled():
        y = infer("bn_gate_tail", z, residual, norm, gate, statistics, impl)
        if y is not None:
            return y
    _check("bn_gate_tail", z, residual, statistics)
    if may_show(norm, z) and not norm.training:
        plain = without_hooks(norm)
        if serves("bn_gate_tail", z, residual, gate, impl) is None:
            choice = _choose("bn_gate_tail", z, residual, plain, gate, impl)
            if choice.impl == "reference":
                return reference.tail(z, residual, norm, gate, statistics)
        x, plain = called(norm, z)
        if plain is not None:
            return bn_gate_tail(z, residual, plain, gate, statistics=statistics, impl=impl)
        return reference.tail(x, residual, None, gate, statistics)  # a hook put another one there
    choice = _choose("bn_gate_tail", z, residual, norm, gate, impl)
    if choice.impl == "reference":
        return reference.tail(z, residual, norm, gate, statistics)
    view = batch_norm_of(norm, z)
    running = running_of(norm) if view.mean is None else None
    if view.group is None and is_direct(choice.impl) and z.numel():
        view, running = view._replace(running=running), None  # the kernel moves them
    y, gathered = _fused(z, residual, view, gate, statistics, choice.impl)
    if running is not None:
        shared = gathered.values.dim() == 0
        values = gathered.values if shared else z.numel() // z.shape[1]
        if z.numel() or shared:  # an empty batch leaves them
            move_running(running, gathered.mu, gathered.channel_var, values)
    return y


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
    forward = type(norm).forward
    plain = (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward, SharedBatchNorm.forward)
    known = forward in plain
    if not known or not isinstance(norm, _NORMS):
        return f"fuses batch norms, not {type(norm).__name__}"
    if has_hooks(norm):
        return f"cannot call the hooks of {type(norm).__name__}"
    return None


def _check(op: str, z: Tensor, residual: Tensor, statistics: Collection[str]) -> None:
    if not isinstance(z, Tensor):
        return  # a placeholder of a tracer, which the reference takes
    if z.dim() < 3:
        raise ValueError(f"{op}: needs a map [N, C, ...], got {z.dim()} axes.")
    if z.shape != residual.shape:
        raise ValueError(
            f"{op}: the residual's shape {list(residual.shape)} is not the map's {list(z.shape)}."
        )
    if z.device != residual.device:
        raise ValueError(f"{op}: the map is on {z.device}, the residual on {residual.device}.")
    unknown = sorted(set(statistics) - set(STATISTICS))
    if unknown:
        raise ValueError(f"{op}: unknown statistic {unknown[0]!r}. Use {', '.join(STATISTICS)}.")


def _choose(
    op: str,
    z: Tensor,
    residual: Tensor,
    norm: nn.Module | None,
    gate: Gate | None,
    impl: str | None,
) -> Choice:
    if not isinstance(z, Tensor):
        return Choice("reference", "traced")
    composed = why_composed(norm)
    if not is_plain(z):
        composed = "takes plain tensors, not those of a transform or a tracer"
    if residual.dtype != z.dtype:
        composed = f"takes maps of one dtype, got {z.dtype} and a residual of {residual.dtype}"
    choice = choose(
        op,
        z.device,
        z.dtype,
        dense=is_dense(z),
        values=z.numel(),
        composed=composed,
        impl=impl,
    )
    log_choice(op, z, choice)
    return choice


def _fused(
    z: Tensor,
    residual: Tensor,
    norm: Norm | None,
    gate: Gate | None,
    statistics: Collection[str],
    impl: str,
) -> tuple[Tensor, Gathered]:
    if z.numel() == 0:
        impl = "formula"  # there is nothing for a kernel to do
    residual = laid_out_as(residual, z)
    read = () if gate is None else statistics
    moments, extrema = bool({"mean", "var"} & set(read)), bool({"max", "min"} & set(read))
    gathered = gather(z, norm, moments, extrema, impl)
    v = None
    if gate is not None:
        found = (gathered.mean, gathered.var, gathered.high, gathered.low)
        size = math.prod(z.shape[2:])
        mean, var, high, low = (
            s if name in read else None for name, s in zip(STATISTICS, found, strict=True)
        )
        v = gate_values(gate, PlaneStats(mean, var, high, low, size, z.shape[0]), z)
    return close(gathered, v, residual, impl), gathered


def batch_norm_of(norm: nn.Module, z: Tensor) -> Norm:
    """A norm as tensors; refuses what the module itself would refuse."""
    assert isinstance(norm, _NORMS)
    getattr(norm, "_check_input_dim")(z)  # noqa: B009  # protected, and a subclass may have its own
    if z.shape[1] != norm.num_features:
        raise ValueError(
            f"bn_gate_tail: the norm has {norm.num_features} channels, the map {z.shape[1]}."
        )
    weight: Tensor | None = norm.weight
    bias: Tensor | None = norm.bias
    mean, var = norm.running_mean, norm.running_var
    for t in (weight, bias, mean, var):
        if t is not None and t.device != z.device:
            raise ValueError(f"bn_gate_tail: the map is on {z.device}, the norm on {t.device}.")
    if not norm.training and mean is not None and var is not None:
        return Norm(weight, bias, mean, var, norm.eps)
    group = group_of(norm)
    if z.shape[0] and z.numel() == z.shape[1] and group is None:
        raise ValueError(
            f"bn_gate_tail: training needs more than one value per channel, got {list(z.shape)}. "
            "Use a larger batch, or eval()."
        )
    return Norm(weight, bias, None, None, norm.eps, group)


def running_of(norm: nn.Module) -> tuple[Tensor, Tensor, float] | None:
    """The running statistics that a batch moves, and by what factor; counts the batch."""
    assert isinstance(norm, _NORMS)
    mean, var = norm.running_mean, norm.running_var
    if not norm.training or not norm.track_running_stats or mean is None or var is None:
        return None
    factor = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if factor is None:
            factor = 1.0 / float(norm.num_batches_tracked)
    return mean, var, 0.0 if factor is None else factor
