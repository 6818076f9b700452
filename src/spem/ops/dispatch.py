"""Which implementation runs a tail: the only place where this is decided.

``"reference"`` is composed torch modules, ``"formula"`` the four passes in torch operations,
``"numba"`` the passes compiled for the CPU, ``"triton"`` those for CUDA. Unless one is asked for,
the fastest that is known to be right here is taken: Triton's kernels prove themselves on a device
first (`spem.ops.cuda.proof`). A request that cannot be met raises.
"""

import logging
import os
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from spem.extras import first_line
from spem.ops.library import is_dense, is_exporting, kernels_of

Impl = Literal["reference", "formula", "numba", "triton"]
IMPLEMENTATIONS: tuple[str, ...] = get_args(Impl)

SMALL = 1 << 18
"""Values of a map below which composed modules are faster on a CPU: a call of the fused tail costs
some 0.1 ms, whatever the size. An implementation that is asked for takes maps of all sizes."""

_NUMBA_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _found(package: str) -> bool:
    """Whether a package can be found; finders may raise instead of finding nothing."""
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):
        return False


# Constants, since a tracing compiler cannot follow the look-ups.
_INSTALLED = {name: _found(name) for name in ("numba", "triton")}
_TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
_LOG = logging.getLogger("spem.ops")


class Choice(NamedTuple):
    """An implementation and, where another might have been expected, why it is this one."""

    impl: str
    reason: str


_default: ContextVar[str | None] = ContextVar("spem.ops.impl", default=None)


def _of_block() -> str | None:
    """What a ``with`` block says."""
    return _default.get()


if _TORCH < (2, 15):  # whose compiler cannot ask a ContextVar: compiled code keeps the answer
    _of_block = torch.compiler.assume_constant_result(_of_block)


@contextmanager
def use_impl(impl: str | None) -> Generator[None]:
    """Sets the implementation for all tails in a ``with`` block.

    Other threads and asyncio tasks keep theirs (a new thread starts without one).

    Args:
        impl: ``"reference"``, ``"formula"``, ``"numba"`` or ``"triton"``; None is the automatic
            choice. Outside of any block the environment variable ``SPEM_IMPL`` decides.

    Raises:
        ValueError: No such implementation.
    """
    _check_name(impl, "use_impl")
    token = _default.set(impl or "auto")
    try:
        yield
    finally:
        _default.reset(token)


def requested(impl: str | None, op: str) -> str | None:
    """What was asked for: the argument, else the block, else the environment; None is automatic."""
    if impl is None:
        impl = _of_block() or os.environ.get("SPEM_IMPL") or None
    if impl == "auto":
        return None
    _check_name(impl, op)
    return impl


def _check_name(impl: str | None, op: str) -> None:
    if impl is not None and impl not in IMPLEMENTATIONS:
        raise ValueError(
            f"{op}: impl={impl!r} is unknown. Use one of {', '.join(IMPLEMENTATIONS)}, or None."
        )


def unsupported(impl: str, device: str, dtype: torch.dtype, *, dense: bool = True) -> str | None:
    """Why an implementation cannot take maps of this kind; None if it can."""
    if impl in ("reference", "formula"):
        zeros = impl == "formula" and torch.compiler.is_compiling() and torch.is_grad_enabled()
        if zeros and _TORCH < (2, 13):  # whose compiler makes all gradients zero, without a word
            return f"needs torch 2.13 or newer in compiled training, this is {torch.__version__}"
        return None
    home, dtypes = ("cpu", _NUMBA_DTYPES) if impl == "numba" else ("cuda", _TRITON_DTYPES)
    if device != home and not (impl == "triton" and device == "cpu" and _interpreted()):
        name = "CPU" if home == "cpu" else "CUDA"
        return f"needs a {name} tensor, got device {device!r}"
    if not _INSTALLED[impl]:
        known = {"numba": "install it: in a checkout pip install '.[cpu]'"}
        extra = known.get(impl, "it comes with torch")
        return f"is not installed ({extra})"
    if _TORCH < (2, 11):
        return f"needs torch 2.11 or newer, this is {torch.__version__}"
    if impl == "numba" and not torch.compiler.is_compiling() and _load_error():
        return f"cannot load numba: {_load_error()}"
    if dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        return f"takes {names}, got {str(dtype).removeprefix('torch.')}"
    if not dense:
        return (
            "needs a contiguous or channels_last map, got other strides (a view of a larger map?)"
        )
    return None


def choose(
    op: str,
    device: str | torch.device,
    dtype: torch.dtype,
    *,
    dense: bool = True,
    values: int | None = None,
    composed: str | None = None,
    impl: str | None = None,
    graph: bool = False,
) -> Choice:
    """Decides the implementation of one call.

    Args:
        op: Name of the operation, for messages.
        device: The map's device, or its type.
        dense: Whether the map is contiguous or channels_last.
        values: Number of values of the map, or None for one that is large enough.
        composed: A reason that leaves composed modules as the only way, or None.
        impl: What the call asks for.
        graph: Whether the call has a gate and is to be replayed from a CUDA graph. On an H200 a
            network's step with kernels took 0.85 to 0.92 of the composed one's time there; launched
            one by one, and without a gate, composed modules were faster.

    Raises:
        ValueError: What was asked for cannot run here, or is unknown.
    """
    where, device = device, device if isinstance(device, str) else device.type
    wanted = requested(impl, op)
    if wanted is not None:
        reason = composed if wanted != "reference" else None
        reason = reason or unsupported(wanted, device, dtype, dense=dense)
        if reason is not None:
            raise ValueError(f"{op}: impl={wanted!r} {reason}. Use impl=None or 'reference'.")
        return Choice(wanted, "asked for")
    if composed is not None:
        return Choice("reference", composed)
    if is_exporting():
        return Choice("reference", "exported")
    if device == "cpu":
        if torch.compiler.is_compiling() and not torch.is_grad_enabled():
            # The compiler fuses the modules itself; a kernel would be a wall in its graph.
            return Choice("reference", "compiled")
        if values is not None and values < SMALL:
            return Choice("reference", f"a map of fewer than {SMALL:,} values")
        reason = unsupported("numba", device, dtype, dense=dense)
        return Choice("numba", "") if reason is None else Choice("reference", f"numba {reason}")
    if device == "cuda":
        if torch.compiler.is_compiling():
            reason = unsupported("formula", device, dtype)
            return Choice("reference", reason) if reason else Choice("formula", "compiled")
        if not graph:
            return Choice("reference", "Triton kernels are faster only in CUDA graphs, with a gate")
        reason = unsupported("triton", device, dtype, dense=dense) or _objection(where)
        return Choice("triton", "") if reason is None else Choice("reference", f"triton {reason}")
    return Choice("reference", f"no kernels for {device}")


def log_choice(op: str, z: Tensor, choice: Choice) -> None:
    """Logs a choice once per operation, device, dtype and layout."""
    if torch.compiler.is_compiling() or not isinstance(z, Tensor):
        return
    layout = "contiguous" if z.is_contiguous() else "channels_last" if is_dense(z) else "strided"
    log_once(op, z.device.type, z.dtype, layout, choice)


@cache
def log_once(op: str, device: str, dtype: torch.dtype, layout: str, choice: Choice) -> None:
    """What `log_choice` logs."""
    reason = f" ({choice.reason})" if choice.reason else ""
    kind = str(dtype).removeprefix("torch.")
    _LOG.info("%s on %s, %s, %s: %s%s", op, device, kind, layout, choice.impl, reason)


def _objection(device: str | torch.device) -> str | None:
    """Why the Triton kernels are not used on a CUDA device, which they are tried on first."""
    if not torch.cuda.is_available():
        return "kernels have no CUDA device here to prove themselves on"
    place = torch.device(device)
    if place.index is None:
        place = torch.device("cuda", torch.cuda.current_device())
    return import_module("spem.ops.cuda.proof").objection(place)


@cache
def _load_error() -> str:
    """Why the kernels for the CPU cannot be loaded, say by a numba that refuses this numpy."""
    try:
        kernels_of("numba")
    except Exception as error:  # noqa: BLE001  # whatever an import raises
        return first_line(error)
    return ""


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
