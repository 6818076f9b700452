"""Launching compiled code: several callers at once, forked processes, failures, one thread."""

import ctypes
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from spem.ops import threads

SOURCE = Path(__file__).resolve().parents[2] / "src"
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


@pytest.fixture(params=["torch's threads", "pool"])
def either(request, monkeypatch):
    """Both ways to run on several threads."""
    if request.param == "pool":
        monkeypatch.setattr(threads, "_parallel", None)
    elif threads._parallel is None:
        pytest.skip("PyTorch has no OpenMP library here")


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def callback(function):
    """A Python function as C code, and its address."""
    code = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)
    return code, ctypes.cast(code, ctypes.c_void_p).value


@pytest.mark.usefixtures("either", "two_threads")
def test_runs_on_at_most_the_asked_threads():
    seen = []
    code, address = callback(lambda data: seen.append((data, threading.get_ident())))
    for pieces in (1, 2, 50):
        seen.clear()
        threads.launch(address, 7, pieces)
        assert 1 <= len(seen) <= min(pieces, 2)
        assert {data for data, _ in seen} == {7}
        assert threading.get_ident() in {thread for _, thread in seen}
    del code


@pytest.mark.usefixtures("either", "two_threads")
def test_returns_when_all_are_done():
    running = threading.Barrier(2, timeout=20)
    done = []

    def work(data):
        running.wait()  # both threads are in here
        if threading.get_ident() != caller:
            time.sleep(0.2)
        done.append(data)

    caller = threading.get_ident()
    code, address = callback(work)
    threads.launch(address, 1, 2)
    assert len(done) == 2
    del code


@pytest.mark.usefixtures("two_threads")
def test_one_thread_of_torch_is_one_thread(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(threads, "_parallel", None)
    monkeypatch.setattr(threads, "_on_pool", None)
    seen = []
    code, address = callback(lambda data: seen.append(threading.get_ident()))
    threads.launch(address, 0, 100)
    assert seen == [threading.get_ident()]
    del code


def test_failure_of_the_caller_waits_for_the_others():
    started, ended = threading.Event(), threading.Event()
    caller = threading.get_ident()

    def work(data):
        if threading.get_ident() == caller:
            assert started.wait(20)
            raise ValueError("mine")
        started.set()
        time.sleep(0.2)
        ended.set()

    with pytest.raises(ValueError, match="mine"):
        threads._on_pool(work, 0, 1)
    assert ended.is_set()


def test_a_busy_pool_blocks_nobody():
    hold, inside = threading.Event(), threading.Event()

    def long_work(data):
        inside.set()
        assert hold.wait(20)

    slow = threading.Thread(target=threads._on_pool, args=(long_work, 0, 1))
    slow.start()
    assert inside.wait(20)
    done = []
    threads._on_pool(done.append, 5, 1)
    assert done
    hold.set()
    slow.join(20)
    assert not slow.is_alive()


SETUP = """
import os, sys, threading
import torch
from spem.ops import cpu, threads
from spem.ops.formula import Norm
torch.set_num_threads(2)
if POOL:
    threads._parallel = None
z, r = torch.randn(16, 32, 24, 24), torch.randn(16, 32, 24, 24)
c, p = torch.randn(32), torch.randn(16, 32)
def passes():
    raw = cpu.plane_stats(z, True, True)
    y = cpu.affine_tail(z, r, c, p, c, c)
    d, a, b = cpu.affine_tail_backward(r, y, z, c)
    dz = cpu.stats_backward(d, z, c, p, a, b, raw.at_high, raw.at_low, p, p)
    batch = cpu.normalise_batch(raw, Norm(c, None, None, None, 1e-5), 576, True)
    return *raw, *batch[:5], *batch.normal, y, d, a, b, dz
def same(one, two):
    # numpy's comparison: torch's own operations on several threads hang in a forked process
    return all((a.numpy() == b.numpy()).all() for a, b in zip(one, two, strict=True))
expected = passes()
def in_child(work):
    pid = os.fork()
    if not pid:
        try:
            os._exit(0 if work() else 1)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""


def run_script(pool, script, **settings):
    """In a process of its own: what hangs or dies there does not here."""
    pytest.importorskip("numba")
    done = subprocess.run(
        [sys.executable, "-c", f"POOL = {pool}\n{SETUP}\n{script}"],
        env=os.environ | {"PYTHONPATH": str(SOURCE), **settings},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("pool", [False, True])
class TestProcesses:
    def test_any_number_of_threads_gives_the_same_bits(self, pool):
        script = """
for count in (1, 3, 8):
    torch.set_num_threads(count)
    assert same(passes(), expected), count
"""
        run_script(pool, script)

    def test_eight_callers_at_once(self, pool):
        script = """
good = []
def call():
    good.append(all(same(passes(), expected) for _ in range(30)))
callers = [threading.Thread(target=call) for _ in range(8)]
[t.start() for t in callers]
[t.join() for t in callers]
assert good == [True] * 8, good
"""
        run_script(pool, script)

    @needs_fork
    def test_forked_process(self, pool):
        script = """
assert in_child(lambda: same(passes(), expected)) == 0
# a child of the child, after the child's own pool was used
def twice():
    return same(passes(), expected) and in_child(lambda: same(passes(), expected)) == 0
assert in_child(twice) == 0
assert same(passes(), expected)
"""
        run_script(pool, script)

    @needs_fork
    @pytest.mark.slow
    def test_fork_while_another_thread_computes(self, pool):
        script = """
stop = threading.Event()
wrong = []
def call():
    while not stop.is_set():
        if not same(passes(), expected):
            wrong.append(1)
callers = [threading.Thread(target=call) for _ in range(2)]
[t.start() for t in callers]
try:
    for _ in range(10):
        assert in_child(lambda: same(passes(), expected)) == 0
finally:
    stop.set()
    [t.join() for t in callers]
assert not wrong
"""
        run_script(pool, script)

    @needs_fork
    @pytest.mark.slow
    def test_data_loader_workers(self, pool):
        script = """
def sums(found):  # numpy's: torch's depend on its number of threads, which is 1 in a worker
    return torch.tensor([t.numpy().sum(dtype="float64") for t in found])
class Maps(torch.utils.data.Dataset):
    def __len__(self): return 4
    def __getitem__(self, k): return sums(passes())
loader = torch.utils.data.DataLoader(Maps(), num_workers=2, multiprocessing_context="fork")
want = sums(expected)
for got in loader:
    assert (got[0].numpy() == want.numpy()).all()
"""
        run_script(pool, script)

    @needs_fork
    @pytest.mark.slow
    def test_fork_while_a_kernel_is_compiled(self, pool, tmp_path):
        script = """
w = [t[:2].double() if t.dim() > 1 else t.double() for t in (z, r, c, p)] + [c.double()] * 2
caller = threading.Thread(target=lambda: cpu.affine_tail(*w))
caller.start()
assert in_child(lambda: cpu.affine_tail(*w).shape == w[0].shape) == 0
caller.join()
"""
        run_script(pool, script, NUMBA_CACHE_DIR=str(tmp_path))


TAILS = """
import spem
from torch import nn
module, norm = spem.SPEM(32), nn.BatchNorm2d(32)
nn.init.constant_(module.w_e, 0.5)
nn.init.constant_(module.w_r, -0.3)
def tails():
    w = z.clone().requires_grad_()
    y = module.tail(w, r, norm)
    names = (module.w_e, module.w_r, module.pool.p, norm.weight)
    return y.detach(), *torch.autograd.grad(y, (w, *names), r)
wanted = tails()
"""


@pytest.mark.parametrize("pool", [False, True])
class TestWholeTails:
    """Norm, gate and gradients, as users call them."""

    def test_eight_callers_at_once(self, pool):
        script = """
good = []
def call():
    good.append(all(same(tails(), wanted) for _ in range(10)))
callers = [threading.Thread(target=call) for _ in range(8)]
[t.start() for t in callers]
[t.join() for t in callers]
assert good == [True] * 8, good
"""
        run_script(pool, TAILS + script)

    @needs_fork
    def test_forked_process(self, pool):
        script = """
def work():
    torch.set_num_threads(1)  # torch's own operations hang in a forked process with more
    return same(tails(), wanted)
torch.set_num_threads(1)
wanted = tails()
torch.set_num_threads(2)
assert in_child(work) == 0
assert same(tails()[:2], wanted[:2])
"""
        run_script(pool, TAILS + script)


WITHOUT = """
import os, torch
for name in ("sched_getaffinity", "RTLD_NOLOAD", "register_at_fork", "fork", "O_DIRECTORY"):
    if hasattr(os, name):
        delattr(os, name)
import spem, spem.training
from spem.ops import threads
assert threads._parallel is None
torch.set_num_threads(2)
model = spem.resnet(11)
spem.attach(model, "spem")
x = torch.randn(20, 3, 32, 32)
model(x).square().mean().backward()
with torch.no_grad():
    model.eval()(x)
"""


@pytest.mark.slow
def test_without_what_only_linux_has():
    """On macOS and Windows these names are missing: the pool runs the kernels."""
    path = {"PYTHONPATH": str(SOURCE)}
    command = [sys.executable, "-c", WITHOUT]
    done = subprocess.run(
        command, env=os.environ | path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
