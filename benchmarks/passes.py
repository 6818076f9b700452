"""Where the time of a fused training tail goes: each pass over the maps beside copying a map.

    python benchmarks/passes.py

A pass that moves bytes as fast as a copy does cannot be made faster, only left out; what the tail
takes beyond its four passes are its scalar stages, the gate and the calls. Rows go into
results/passes.csv. Maps are channels_last, the gate is SPEM's.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from record import Row, facts, write

import spem
from spem.ops import cpu
from spem.training.step import keep_freed_memory

MAPS = ((128, 64, 32, 32), (128, 128, 16, 16), (128, 256, 8, 8))
SECONDS = 0.3


def milliseconds(call: Callable[[], object]) -> float:
    """The median time of a call."""
    call()
    times: list[float] = []
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        started = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times)


def calls(
    shape: tuple[int, ...], dtype: torch.dtype
) -> dict[str, tuple[int, Callable[[], object]]]:
    """Maps that a call reads and writes, and the call."""
    torch.manual_seed(0)
    batch, channels = shape[:2]
    z, r, g = (
        torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last) for _ in range(3)
    )
    mu, a, beta = torch.randn(3, channels)
    v, p, q, t = torch.rand(4, batch, channels)
    y, raw = cpu.affine_tail(z, r, mu, v, a, beta), cpu.plane_stats(z, True, True, False)
    norm, attention = torch.nn.BatchNorm2d(channels), spem.SPEM(channels)
    z_in, r_in = z.clone().requires_grad_(), r.clone().requires_grad_()
    inputs = [z_in, r_in, *norm.parameters()]

    def plain() -> object:
        return torch.autograd.grad(torch.relu_(norm(z_in).add_(r_in)), inputs, g)

    def tail() -> object:
        return torch.autograd.grad(
            attention.tail(z_in, r_in, norm), [*inputs, *attention.parameters()], g
        )

    def last() -> object:  # which uses up what falls on the extrema
        spikes = (raw.high, raw.low, p.clone(), q.clone())
        return cpu.stats_backward(g, z, mu, p, q, t, *spikes)

    return {
        "copy": (2, lambda: torch.empty_like(z).copy_(z)),
        "F1": (1, lambda: cpu.plane_stats(z, True, True, False)),
        "F2": (3, lambda: cpu.affine_tail(z, r, mu, v, a, beta)),
        "B1": (4, lambda: cpu.affine_tail_backward(g, y, z, mu)),
        "B2": (3, last),
        "tail": (11, tail),
        "plain": (16, plain),
    }


def main() -> int:
    """Time every pass on one thread and on all."""
    keep_freed_memory()
    rows: list[Row] = []
    for threads in sorted({1, torch.get_num_threads()}):
        torch.set_num_threads(threads)
        for dtype, shape in ((d, s) for d in (torch.float32, torch.bfloat16) for s in MAPS):
            size = shape[0] * shape[1] * shape[2] * shape[3] * dtype.itemsize
            for name, (maps, call) in calls(shape, dtype).items():
                took = milliseconds(call)
                row: Row = {"pass": name, "map": "x".join(map(str, shape)), "dtype": str(dtype)[6:]}
                row |= {"threads": str(threads), "maps": str(maps), "time_ms": f"{took:.4f}"}
                row["gigabytes_per_second"] = f"{maps * size / took / 1e6:.1f}"
                rows.append(row | facts(torch.device("cpu")))
                print(*list(row.values()), flush=True)
    write(rows, Path(__file__).parent / "results" / "passes.csv")
    return 0


if __name__ == "__main__":
    sys.exit(main())
