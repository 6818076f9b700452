"""Runs compiled code on several threads: PyTorch's own where it lends them, else a small pool.

The code is a C function of one pointer to its data. Every thread that runs it takes the next piece
of work from a counter in the data until none is left, so any number of threads will do, and the
result does not depend on it.

PyTorch's own threads are the better ones: they ran the last convolution and spin for a while after
it, so that others would compete with them for the cores. They belong to an OpenMP library
(``GOMP_parallel``), which a forked process must not call. There, and where there is no such
library, Python threads do the same, without the interpreter's lock.
"""

import ctypes
import os
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path

import torch

_function = cache(ctypes.CFUNCTYPE(None, ctypes.c_void_p))


def launch(address: int, data: int, pieces: int) -> None:
    """Calls the C function at ``address`` with ``data`` on up to as many threads as torch uses.

    Returns when all of them are done. The caller's thread is one of them.

    Args:
        address: Of a function ``void f(void *data)`` that divides its work itself.
        data: What it is called with; has to live until this returns.
        pieces: More threads than this would find nothing to do; 1 stays on the caller's thread.
    """
    threads = min(torch.get_num_threads(), pieces)
    if threads <= 1:
        _function(address)(data)
    elif _parallel is not None and os.getpid() == _PROCESS:
        _parallel(address, data, threads, 0)
    else:
        _on_pool(_function(address), data, threads - 1)


def _on_pool(function: Callable[[int], None], data: int, helpers: int) -> None:
    """Runs the function on this thread and on up to this many of the pool, if they are free."""
    parts: Collection[Future[None]] = [_pool.submit(function, data) for _ in range(helpers)]
    interrupt = None
    try:
        function(data)
    finally:
        # Whoever has not begun stays out, and whoever is inside ends: only then may data go.
        while parts:
            try:
                parts = wait([part for part in parts if not part.cancel()]).not_done
            except KeyboardInterrupt as pressed:
                interrupt = pressed
        if interrupt is not None:
            raise interrupt


def _renew_pool() -> None:
    global _pool  # noqa: PLW0603  a forked process has none of its parent's threads
    _pool = ThreadPoolExecutor(1 << 10, "spem")  # of which it starts what is needed


def _find_parallel() -> Callable[[int, int, int, int], None] | None:
    """``GOMP_parallel`` of the very library that PyTorch runs its own loops with."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        # Through PyTorch's library its dependencies are searched, whatever their names are.
        found = ctypes.CDLL(str(library), mode=os.RTLD_NOLOAD | os.RTLD_NOW).GOMP_parallel
    except (OSError, AttributeError):
        return None
    found.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    found.restype = None
    return found


_PROCESS = os.getpid()  # of the first import: `spem.ops` imports this before anybody forks
_parallel = _find_parallel()
_renew_pool()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_pool)
