"""Two processes that share a norm's statistics compute what one process does with both batches."""

from __future__ import annotations

import multiprocessing
import tempfile
from pathlib import Path

import pytest
import torch
from attention.drawing import feature_map, randomise
from torch import Tensor, distributed, nn

import spem
from spem.ops import bn_gate_tail

CHANNELS = 5


def parts(sizes: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    shape = (sum(sizes), CHANNELS, 4, 6)
    return feature_map(*shape, key="z"), feature_map(*shape, key="r"), feature_map(*shape, key="g")


def one_step(
    z: Tensor, r: Tensor, g: Tensor, norm: nn.Module, impl: str
) -> dict[str, Tensor | None]:
    module = randomise(spem.SPEM(CHANNELS), "synchronised").double()
    z, r = z.clone().requires_grad_(), r.clone().requires_grad_()
    y = bn_gate_tail(z, r, norm, module.gate_from, statistics=module.statistics, impl=impl)
    y.backward(g)
    found = {"y": y.detach(), "dz": z.grad, "dr": r.grad}
    found |= {f"d {n}": p.grad for n, p in [*norm.named_parameters(), *module.named_parameters()]}
    return found | {n: b.clone() for n, b in norm.named_buffers()}


def worker(rank: int, sizes: tuple[int, ...], impl: str, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=len(sizes)
    )
    start = sum(sizes[:rank])
    mine = slice(start, start + sizes[rank])
    norm = randomise(nn.SyncBatchNorm(CHANNELS), "norm").double().train()
    found = one_step(*(t[mine] for t in parts(sizes)), norm, impl)
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("impl", "sizes"),
    [
        ("numba", (3, 2)),
        *(
            pytest.param(*more, marks=pytest.mark.slow)
            for more in (("formula", (3, 2)), ("numba", (4, 0)), ("formula", (1, 1, 3)))
        ),
    ],
    ids=str,
)
def test_several_processes_equal_one(impl: str, sizes: tuple[int, ...]) -> None:
    if impl == "numba" and spem.ops.choose("t", "cpu", torch.float64).impl != "numba":
        pytest.skip("numba is not installed")
    norm = randomise(nn.BatchNorm2d(CHANNELS), "norm").double().train()
    expected = one_step(*parts(sizes), norm, impl)
    start = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            start.Process(target=worker, args=(rank, sizes, impl, folder))
            for rank in range(len(sizes))
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
            assert process.exitcode == 0
        found = [
            torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(len(sizes))
        ]
    for name, value in expected.items():
        each = [f[name] for f in found]
        if name in ("y", "dz", "dr"):
            torch.testing.assert_close(torch.cat(each), value)
        elif name.startswith("d "):  # gradients are sums over images, each process has its part
            torch.testing.assert_close(torch.stack(each).sum(0), value)
        else:  # running statistics are everybody's
            for mine in each:
                torch.testing.assert_close(mine, value)
                assert torch.equal(mine, each[0])
