"""The tail where no gradient is recorded and the norm is constant: one kernel, nothing kept.

Conditions are checked once and in the order of their price: of small maps a call is most of the
time. Whatever is out of the ordinary (tracers, hooks, other dtypes, wrong shapes) is left to the
path that records gradients, which says what is wrong with it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import cache
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from spem.ops.dispatch import Choice, log_once, requested, unsupported
from spem.ops.formula import Norm
from spem.ops.library import (
    agree,
    has_hooks,
    is_dense,
    kernels_of,
    laid_out_as,
    runs_eagerly,
    without_hooks,
)
from spem.ops.stats import STATISTICS, PlaneStats, compute_dtype, selected
from spem.ops.synchronised import SharedBatchNorm

_G = TypeVar("_G", bound=Callable[..., Any])

SMALL = 1 << 14
"""Values of a map below which norm, addition and ReLU without a gate are faster by themselves."""

_RANKS: dict[type, tuple[int, ...]] = {
    nn.BatchNorm1d: (3,),
    nn.BatchNorm2d: (4,),
    nn.BatchNorm3d: (5,),
    nn.SyncBatchNorm: (3, 4, 5),
    SharedBatchNorm: (3, 4, 5),
}
_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float64))
_PLAIN = frozenset((Tensor, nn.Parameter))


class CompiledGate(NamedTuple):
    """A gate that the kernel computes itself, between reading an image and writing its result.

    Attributes:
        kind: ``"spem_text"``, ``"spem_code"``, ``"spem_figure"``: w_e, b_e, w_r, b_r [C], and p [2]
            or None with a number lambda. ``"se"``: W1 [h, C], b1 [h], W2 [C, h], b2 [C], None; the
            biases may be None. ``"eca"``: None, None, the filter, None, None.
        tensors: Five of them; a gate whose shapes are others is run by torch.
        number: lambda.
        width: SE's hidden units h, ECA's taps.
        alpha: One number; the factor is then 1 + alpha (v - 1), v being the gate of the tensors.
        observed: Whether v has observers, where it is not what the factor is.
    """

    kind: str
    tensors: tuple[Tensor | None, ...]
    number: float = 0.0
    width: int = 0
    alpha: Tensor | None = None
    observed: bool = False


def compiled_by(find: Callable[[Any], CompiledGate | None]) -> Callable[[_G], _G]:
    """Names the method of a module that says what computes its ``gate_from`` in inference.

    It returns None where nothing does: layers with hooks, of other classes, with other options. A
    subclass with a ``gate_from`` of its own has no such method unless it names one.
    """

    def mark(gate: _G) -> _G:
        vars(gate)["compiled"] = find
        return gate

    return mark


def infer(
    op: str,
    z: Tensor,
    residual: Tensor,
    norm: nn.Module | None,
    gate: Callable[[PlaneStats], Tensor] | None,
    statistics: Collection[str],
    impl: str | None,
) -> Tensor | None:
    """The tail's output; None where it is not for this path."""
    choice = serves(op, z, residual, SMALL if gate is None else 0, impl)
    if choice is None:
        return None
    shape = z.shape
    constants = None
    if norm is not None:
        constants = _constant(norm, shape)
        if constants is None:
            return None
    layout = "contiguous" if z.is_contiguous() else "channels_last"
    log_once(op, "cpu", z.dtype, layout, choice)
    if not agree(residual, z):
        residual = laid_out_as(residual, z)
    kernels = kernels_of("numba")
    if gate is None:
        return kernels.fused_tail(z, residual, constants, None)
    owner = getattr(gate, "__self__", None)
    compiled = _compiled(gate, owner, shape[1])
    if compiled is not None and not compiled.observed and not getattr(owner, "_observers", None):
        return kernels.fused_tail(z, residual, constants, compiled)
    if any(name not in STATISTICS for name in statistics):
        return None
    found = kernels.norm_stats(z, constants, statistics)
    stats = selected(found, statistics, z)
    v = gate_values(gate, stats, z)  # which observers and hooks inside are given
    compiled = compiled or _despite_hooks(gate, stats, v, shape[1])
    if compiled is not None:
        return kernels.fused_tail(z, residual, constants, compiled)
    return kernels.fused_tail(z, residual, constants, None, v.contiguous())


def serves(op: str, z: Tensor, residual: Tensor, least: int, impl: str | None) -> Choice | None:
    """Numba, unasked or asked for; None where this path takes no such maps.

    Maps of fewer values than ``least`` have to be asked for.
    """
    if type(z) is not Tensor or type(residual) is not Tensor or not (z.is_cpu and residual.is_cpu):
        return None
    if z.dtype not in _DTYPES or residual.dtype != z.dtype or not runs_eagerly(z):
        return None
    shape = z.shape
    if len(shape) < 3 or shape != residual.shape or 0 in shape or not is_dense(z):
        return None
    asked = requested(impl, op)
    if asked not in (None, "numba") or not _usable():
        return None
    if asked is None and z.numel() < least:
        return None
    return _UNASKED if asked is None else _ASKED


def gate_values(gate: Callable[[PlaneStats], Tensor], stats: PlaneStats, z: Tensor) -> Tensor:
    """What a gate makes of statistics, checked and as [N, C] in the compute dtype."""
    v = gate(stats)
    if v.device != z.device:
        raise ValueError(f"tail: the map is on {z.device}, the gate's value on {v.device}.")
    v = v.to(compute_dtype(z.dtype))
    return v if v.shape == z.shape[:2] else v.expand(z.shape[:2])


_UNASKED, _ASKED = Choice("numba", ""), Choice("numba", "asked for")


@cache
def _usable() -> bool:
    return unsupported("numba", "cpu", torch.float32) is None


def _constant(norm: nn.Module, shape: torch.Size) -> Norm | None:
    """A norm as tensors, if it is a plain one whose statistics are constant."""
    ranks = _RANKS.get(type(norm))
    if ranks is None or norm.training or len(shape) not in ranks or has_hooks(norm):
        return None
    # From where they lie: a module looks for each name in three places.
    parameters, buffers = vars(norm)["_parameters"], vars(norm)["_buffers"]
    weight, bias = parameters.get("weight"), parameters.get("bias")
    mean, var = buffers.get("running_mean"), buffers.get("running_var")
    if mean is None or var is None or (weight is None and norm.affine):
        return None
    for t in (weight, bias, mean, var):
        if t is not None and (type(t) not in _PLAIN or not t.is_cpu or t.numel() != shape[1]):
            return None
    return Norm(weight, bias, mean, var, cast("nn.BatchNorm2d", norm).eps)


def _despite_hooks(
    gate: Callable[..., Any], stats: PlaneStats, v: Tensor, channels: int
) -> CompiledGate | None:
    """What computes the gate if the hooks of the layers inside, which were called, only looked."""
    owner = getattr(gate, "__self__", None)
    if not isinstance(owner, nn.Module) or not any(
        has_hooks(m) for m in owner.modules() if m is not owner
    ):
        return None
    plain = without_hooks(owner, inside=True)
    compiled = _compiled(gate, plain, channels)
    if compiled is None or not torch.equal(v, getattr(plain, gate.__name__)(stats)):
        return None
    return compiled


def _compiled(gate: Callable[..., Any], owner: object, channels: int) -> CompiledGate | None:
    find = getattr(gate, "compiled", None)
    if find is None or owner is None:
        return None
    compiled = find(owner)
    if compiled is None:
        return None
    width = compiled.width
    if compiled.kind == "se":
        sizes = (width * channels, width, width * channels, channels, 0)
    elif compiled.kind == "eca":
        sizes = (0, 0, width, 0, 0)
    else:
        sizes = (channels, channels, channels, channels, 2)
    for t, size in zip((*compiled.tensors, compiled.alpha), (*sizes, 1), strict=True):
        if t is not None and (type(t) not in _PLAIN or not t.is_cpu or t.numel() != size):
            return None
    return compiled
