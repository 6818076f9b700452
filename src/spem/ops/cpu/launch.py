"""Kernels as machine code: compiled for one dtype when first used, kept on disk, run on threads."""

import array
import functools
import hashlib
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any, cast

import torch
from numba import types
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.ccallback import CFunc
from torch import Tensor

from spem.ops import threads
from spem.ops.cpu.language import BYTES, CHUNKS, COUNTERS, LINE, Lanes, kernel_of

# The dtypes of maps, and what their elements are to a kernel.
_ELEMENTS: dict[torch.dtype, Any] = {
    torch.float32: types.float32,
    torch.float64: types.float64,
    torch.bfloat16: types.uint16,
}

_log = logging.getLogger("spem.ops")
_compiling = threading.RLock()
if hasattr(os, "register_at_fork"):
    # A fork waits until a kernel is compiled: its copy of numba would stay locked for ever.
    os.register_at_fork(
        before=_compiling.acquire,
        after_in_parent=_compiling.release,
        after_in_child=_compiling.release,
    )


@functools.cache
def _sources() -> str:
    """A digest of all that the kernels are made of."""
    texts = [f.read_bytes() for f in sorted(Path(__file__).parent.glob("*.py"))]
    return hashlib.sha256(b"".join(texts)).hexdigest()


class _Cache(FunctionCache):
    """Kernels on disk, in files of their own for each state of the sources.

    numba alone would look at one function's file and bytes only for changes, and stumble over types
    in older files that are called otherwise now.
    """

    def __init__(self, kernel: Any) -> None:
        super().__init__(kernel)
        impl = cast("Any", self)._impl
        name, stamp = f"{impl.filename_base}-{_sources()[:16]}", impl.locator.get_source_stamp()
        self._cache_file = IndexDataCacheFile(cast("Any", self)._cache_path, name, stamp)

    def _index_key(self, sig: Any, codegen: Any) -> Any:
        return sig, codegen.magic_tuple()

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The kernel on disk; None where it is not, or a power cut left parts of its files."""
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # noqa: BLE001  # whatever reading half a pickle raises
            self.flush()
            return None


_kernels: dict[tuple[Any, torch.dtype, int], Any] = {}


def address_of(kernel: Any, dtype: torch.dtype, lines: int) -> int:
    """The address of a kernel for maps of this dtype and vectors of this many cache lines."""
    key = (kernel, dtype, lines)
    if key not in _kernels:
        with _compiling:
            if key not in _kernels:
                _kernels[key] = _compile(*key)
    return _kernels[key].address


def _compile(work: Any, dtype: torch.dtype, lines: int) -> Any:
    start = time.perf_counter()
    block = Lanes(_ELEMENTS[dtype], lines * (8 if dtype == torch.float64 else 16))
    kernel = kernel_of(work)

    def build(cached: bool) -> Any:
        callback = cast("Any", CFunc)(kernel, ((block,), types.void), {}, {"error_model": "numpy"})
        if cached:
            callback._cache = _Cache(kernel)
        callback.compile()
        return callback

    try:
        callback = build(cached=True)
    except (OSError, RuntimeError) as reason:
        # No place to write to: numba finds none (RuntimeError), or it is full or gone (OSError).
        _log.debug("kernels are not kept on disk: %s", reason)
        callback = build(cached=False)
    if not callback.cache_hits:
        seconds = time.perf_counter() - start
        _log.info("%s for %s compiled in %.1f s", kernel.__qualname__, dtype, seconds)
    return callback


def run(
    kernel: Any,
    dtype: torch.dtype,
    head: tuple[int, ...],
    *args: Tensor | int | None,
    lines: int = 1,
    alone: bool = False,
) -> None:
    """Runs a kernel on the table made of its head (chunks, step, B, C, K, flags) and arguments.

    Tensors are in the table with their addresses, integers as they are. A vector of the kernel's
    numbers fills this many lines of the cache. ``alone`` stays on the caller's thread.
    """
    regions = 1 if alone else min(torch.get_num_threads(), head[0])
    table = array.array("q", bytes(8 * (COUNTERS + LINE * regions) + BYTES))
    start = -table.buffer_info()[0] % BYTES // 8  # counters have cache lines of their own
    places = [a if isinstance(a, int) else 0 if a is None else a.data_ptr() for a in args]
    values = [*head, regions, *places]
    table[start + CHUNKS : start + CHUNKS + len(values)] = array.array("q", values)
    address = address_of(kernel, dtype, lines)
    threads.launch(address, table.buffer_info()[0] + 8 * start, regions)
