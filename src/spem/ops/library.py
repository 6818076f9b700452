"""The passes as custom operators of torch, and what torch is asked about tensors and modules.

As operators compilers and CUDA graphs take the passes whole. Every kernel implementation has the
same four, named after it (``spem::numba_plane_stats`` and so on). They are functional, have no
gradient of their own (that is `spem.ops.autograd`), and load their kernels when first called.
"""

from collections import OrderedDict
from collections.abc import Callable
from copy import copy
from functools import cache
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from spem.ops import formula

_M = TypeVar("_M", bound=nn.Module)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_TORCH_C = getattr(torch, "_C", None)  # what is behind it may change or go
_FUNCTORCH = getattr(_TORCH_C, "_functorch", None)
_STACKS = [getattr(_TORCH_C, f"_len_torch_{kind}_stack", int) for kind in ("dispatch", "function")]
_MODULES = {"numba": "spem.ops.cpu", "triton": "spem.ops.cuda"}
_WATCHERS = (
    *("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"),
    "_observers",
)


def passes(impl: str) -> Any:
    """What holds the four passes of ``"formula"``, ``"numba"`` or ``"triton"``, by their names.

    Numba's are plain calls where nobody compiles or watches.
    """
    if impl == "formula":
        return formula
    return kernels_of(impl) if is_direct(impl) and not _modes() else _OPERATORS[impl]


def stages(impl: str) -> ModuleType:
    """What holds an implementation's scalar stages; a compiler gets those of torch to fuse."""
    return kernels_of(impl) if is_direct(impl) else formula


def is_direct(impl: str) -> bool:
    """Whether kernels may be called as they are: nobody traces, and they are plain functions."""
    return impl == "numba" and not torch.compiler.is_compiling()


def _modes() -> int:
    """The number of dispatch and function modes in force."""
    return sum(stack() for stack in _STACKS)


@cache
def kernels_of(impl: str) -> ModuleType:
    """The module with an implementation's kernels, imported on first use."""
    return import_module(_MODULES[impl])


def is_plain(z: Tensor) -> bool:
    """Whether a map has memory that kernels can work on, and autograd alone follows it.

    Not so: fake tensors and other subclasses, and any tensor within a `torch.func` transform or
    while forward-mode derivatives are taken. A compiler sees plain tensors.
    """
    if torch.compiler.is_compiling():
        return True
    transform = getattr(_FUNCTORCH, "peek_interpreter_stack", None)
    if type(z) not in (Tensor, nn.Parameter) or (transform is not None and transform() is not None):
        return False
    return getattr(forward_ad, "_current_level", -1) < 0


def is_dense(z: Tensor) -> bool:
    """Whether the map is contiguous or channels_last."""
    # By a view: within a vmap torch does not say what is contiguous in another format.
    return z.is_contiguous() or (z.dim() in (4, 5) and z.movedim(1, -1).is_contiguous())


def agree(a: Tensor, b: Tensor) -> bool:
    """Whether two maps of one shape lie in memory in the same order.

    The stride of an axis of length 1 means nothing, and torch sets it in several ways.
    """
    if a.stride() == b.stride():
        return True
    pairs = zip(a.shape, a.stride(), b.stride(), strict=True)
    return all(size == 1 or mine == other for size, mine, other in pairs)


def check_maps(first: Tensor, *others: Tensor) -> None:
    """Refuses maps of one pass that differ: kernels take addresses as they are."""
    for t in others:
        same = t.shape == first.shape and t.dtype == first.dtype and t.device == first.device
        if not same or not agree(t, first):
            a, b = (
                f"{list(t.shape)} with strides {t.stride()} of {t.dtype} on {t.device}"
                for t in (first, t)
            )
            raise ValueError(
                f"maps must agree: {a} is not {b}. "
                "Bring them to one shape, dtype, device and memory layout."
            )


def laid_out_as(x: Tensor, like: Tensor) -> Tensor:
    """x in the layout of a dense map of its shape; a copy if it has another one."""
    return x if agree(x, like) else torch.empty_like(like).copy_(x)


_exporting = getattr(torch.compiler, "is_exporting", None) or (
    # before torch 2.7, where only an export that is not strict is detected
    lambda: torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()
)


def is_exporting() -> bool:
    """Whether the calls are recorded for a graph that leaves PyTorch or this process."""
    return _exporting() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]


def runs_eagerly(t: Tensor) -> bool:
    """Whether what is done with a tensor happens now, and nobody compiles or records it."""
    return not (torch.compiler.is_compiling() or not is_plain(t) or is_exporting() or _modes())


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module runs more than its class's forward."""
    own = module.__dict__
    hooks = own["_forward_hooks"] or own["_forward_pre_hooks"]
    hooks = hooks or own["_backward_hooks"] or own["_backward_pre_hooks"]
    return bool(hooks) or "forward" in own or any_global_hook()


def may_show(module: nn.Module, z: Tensor) -> bool:
    """Whether a module's hooks can be called as well as a fused tail: only they want its output.

    Where gradients are recorded they may want to reach the graph, and the tail is composed.
    """
    if torch.is_grad_enabled() or not has_hooks(module) or any_global_hook():
        return False
    return "forward" not in module.__dict__ and runs_eagerly(z)


def without_hooks(module: _M, *, inside: bool = False) -> _M:
    """A second module of the same parameters and buffers that calls no hook or observer of its own.

    ``inside``: nor one of the modules that it holds.
    """
    twin = copy(module)
    vars(twin).update({kind: OrderedDict() for kind in _WATCHERS})
    if inside:
        parts: dict[str, nn.Module | None] = vars(twin)["_modules"]
        held = {name: part and without_hooks(part, inside=True) for name, part in parts.items()}
        vars(twin)["_modules"] = held
    return twin


def any_global_hook() -> bool:
    """Whether hooks are registered for all modules of the process."""
    return bool(getattr(nn.modules.module, "_has_any_global_hook", bool)())


_SCHEMAS: dict[str, tuple[str, Callable[..., Any]]] = {
    "plane_stats": (
        "(Tensor z, bool moments, bool extrema) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        lambda *given: tuple(formula.empty_stats(*given)),
    ),
    "affine_tail": (
        "(Tensor z, Tensor r, Tensor mu, Tensor v, Tensor a, Tensor beta) -> Tensor",
        lambda z, *_: torch.empty_like(z),
    ),
    "affine_tail_backward": (
        "(Tensor g, Tensor y, Tensor z, Tensor mu) -> (Tensor, Tensor, Tensor)",
        lambda g, y, z, mu: (torch.empty_like(y), *(mu.new_empty(z.shape[:2]) for _ in range(2))),
    ),
    "stats_backward": (
        "(Tensor d, Tensor z, Tensor mu, Tensor p, Tensor? q, Tensor? t, "
        "Tensor? i, Tensor? j, Tensor? s_i, Tensor? s_j) -> Tensor",
        lambda d, *_: torch.empty_like(d),
    ),
}
_LIBRARY = torch.library.Library("spem", "DEF")


def _define(impl: str, name: str, schema: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """Defines one operator and binds its overload."""

    def call(*arguments: Any) -> Any:
        if name == "stats_backward" and impl == "numba":
            # Spikes by value are used up, and an operator may not write to what it is given.
            spikes = (None if t is None else t.clone() for t in arguments[8:])
            arguments = (*arguments[:8], *spikes)
        result = getattr(kernels_of(impl), name)(*arguments)
        return tuple(result) if isinstance(result, tuple) else result

    full = f"{impl}_{name}"
    _LIBRARY.define(full + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(full, call, "CompositeExplicitAutograd")
    torch.library.register_fake(f"spem::{full}", fake, lib=_LIBRARY)
    return getattr(torch.ops.spem, full).default


_OPERATORS = {
    impl: SimpleNamespace(**{name: _define(impl, name, *kind) for name, kind in _SCHEMAS.items()})
    for impl in _MODULES
}
