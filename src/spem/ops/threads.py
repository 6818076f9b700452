"""Runs compiled code on several threads: PyTorch's own where it lends them, else a small pool.

The code is a C function of one pointer to its data. It divides the work itself: every thread that
runs it takes the next piece from a counter in the data until none is left, so any number of threads
will do, and what comes out does not depend on it.

PyTorch's own threads are the better ones: they are those that ran the last convolution, and which
spin for a while after it, so that others would compete with them for the same cores. They belong to
an OpenMP library (``GOMP_parallel``), which a forked process must not call. There, and where there
is no such library, a pool of Python threads does the same; the code runs without the interpreter's
lock.
"""

import ctypes
import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path

import torch

_Function = Callable[[int], None]
_PROTOTYPE = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


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
        _pool.run(_function(address), data, threads)


_functions: dict[int, _Function] = {}


def _function(address: int) -> _Function:
    found = _functions.get(address)
    if found is None:
        found = _functions[address] = _PROTOTYPE(address)
    return found


class _Job:
    """One call of a function, in which any number of threads take part."""

    def __init__(self, function: _Function, data: int) -> None:
        self.function = function
        self.data = data
        self.failure: BaseException | None = None
        self._state = threading.Condition(threading.Lock())
        self._running = 0
        self._closed = False

    def take_part(self) -> None:
        """What a thread of the pool does; nothing where the caller is through already."""
        with self._state:
            if self._closed:
                return
            self._running += 1
        try:
            self.function(self.data)
        except BaseException as failure:  # noqa: BLE001  handed to the caller, not swallowed
            self.failure = failure
        finally:
            with self._state:
                self._running -= 1
                self._state.notify()

    def finish(self) -> None:
        """Lets nobody in any more and waits for those inside: only then may the data go."""
        interrupted: BaseException | None = None
        while True:
            try:
                with self._state:
                    self._closed = True
                    while self._running:
                        self._state.wait()
                break
            except KeyboardInterrupt as interrupt:
                interrupted = interrupt
        failure = interrupted or self.failure
        if failure is not None:
            raise failure


class _Pool:
    """Threads that wait for jobs; started when first needed, and again after a fork.

    A caller that finds no free thread does all the work itself, so that no call waits for another
    caller's job and nothing can block.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._size = 0

    def run(self, function: _Function, data: int, threads: int) -> None:
        """Runs the function on this thread and on up to ``threads - 1`` others."""
        job = _Job(function, data)
        self._grow(threads - 1)
        for _ in range(threads - 1):
            self._jobs.put(job)
        try:
            function(data)
        finally:
            job.finish()

    def _grow(self, size: int) -> None:
        if self._size >= size:
            return
        with self._lock:
            while self._size < size:
                name = f"spem-{self._size}"
                threading.Thread(target=self._work, name=name, daemon=True).start()
                self._size += 1

    def _work(self) -> None:
        while True:
            self._jobs.get().take_part()


def _renew_pool() -> None:
    global _pool  # noqa: PLW0603  a forked process has none of its parent's threads
    _pool = _Pool()


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
_pool = _Pool()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_pool)
