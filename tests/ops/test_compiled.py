"""Tails inside torch's machinery: opcheck, torch.compile, autocast."""

from __future__ import annotations

import copy

import pytest
import torch
from ops.tails import error, home, pairwise, tail
from ops.test_tail import needs
from tolerance import TAIL
from torch import Tensor

import spem
from spem.ops import use_impl

LAYOUTS = (torch.contiguous_format, torch.channels_last)


def arguments(layout: torch.memory_format, device: str = "cpu") -> dict[str, tuple[object, ...]]:
    rng = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=rng).to(device)
        return x.contiguous(memory_format=layout) if len(shape) == 4 else x

    z, r, g, mu = draw(2, 3, 4, 4), draw(2, 3, 4, 4), draw(2, 3, 4, 4), draw(3)
    i = torch.tensor([[0, 3, 15], [7, 7, 1]], dtype=torch.int32, device=device)
    planes = [draw(2, 3) for _ in range(5)]
    y = r.relu()
    return {
        "plane_stats": (z, True, True),
        "affine_tail": (z, r, mu, planes[0], mu, mu),
        "affine_tail_backward": (g, y, z, mu),
        "stats_backward": (g, z, mu, *planes[:3], i, i.flip(0), *planes[3:]),
    }


def operator(impl: str, name: str) -> torch._ops.OpOverload:
    return getattr(torch.ops.spem, f"{impl}_{name}").default


@pairwise(impl=("numba", "triton"), layout=LAYOUTS, name=arguments(torch.contiguous_format))
def test_opcheck(impl: str, layout: torch.memory_format, name: str) -> None:
    needs(impl, torch.float32, home(impl))
    torch.library.opcheck(operator(impl, name), arguments(layout, home(impl))[name])


@pytest.mark.parametrize("impl", ["numba", "triton"])
def test_opcheck_without_optional_parts(impl: str) -> None:
    needs(impl, torch.float32, home(impl))
    z, _, mu, p, *_ = arguments(torch.contiguous_format, home(impl))["affine_tail"]
    torch.library.opcheck(operator(impl, "plane_stats"), (z, False, True))
    torch.library.opcheck(operator(impl, "plane_stats"), (z, True, False))
    torch.library.opcheck(operator(impl, "stats_backward"), (z, z, mu, p, *[None] * 6))


@pairwise(
    impl=("formula", "numba", "triton"),
    layout=LAYOUTS,
    gate=("none", "spem", "srm"),
    norm=("train", "eval"),
)
def test_compiled_whole(impl: str, layout: torch.memory_format, gate: str, norm: str) -> None:
    needs(impl, torch.float32, home(impl))
    eager = tail(
        gate, (4, 5, 6, 6), norm, dtype=torch.float32, memory_format=layout, device=home(impl)
    )
    compiled = copy.deepcopy(eager)
    torch.compiler.reset()
    run = torch.compile(lambda: compiled.forward(impl), fullgraph=True, backend="aot_eager")
    y = run()
    expected = eager.forward(impl)
    assert y.stride() == expected.stride()
    found = torch.autograd.grad(y, list(compiled.parameters().values()), compiled.weights)
    wanted = torch.autograd.grad(expected, list(eager.parameters().values()), eager.weights)
    for name, a, b in zip(eager.parameters(), found, wanted, strict=True):
        assert error(a, b) <= 10 * TAIL[torch.float32], name
    assert error(y.detach(), expected.detach()) <= TAIL[torch.float32]
    torch.testing.assert_close(compiled.norm.running_var, eager.norm.running_var)


@pytest.mark.parametrize("gradients", [True, False])
def test_what_compiled_code_calls(gradients: bool) -> None:
    """Kernels in a training step; in inference the compiler fuses the modules better itself."""
    needs("numba", torch.float32, "cpu")
    seen: list[str] = []

    def look(graph: torch.fx.GraphModule, _: object) -> object:
        parts = [part for part in graph.modules() if isinstance(part, torch.fx.GraphModule)]
        seen.extend(str(node.target) for part in parts for node in part.graph.nodes)
        return graph.forward

    model = spem.resnet(11, attention="spem").train(gradients)
    torch.compiler.reset()
    with torch.set_grad_enabled(gradients):
        torch.compile(model, fullgraph=True, backend=look)(torch.randn(8, 3, 32, 32))
    assert any("numba" in target for target in seen) == gradients


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["formula", "numba"])
def test_a_network_compiled_by_inductor(impl: str) -> None:
    """One training step of a whole network, compiled to code, equals the eager one."""
    needs(impl, torch.float32, home(impl))
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    model = spem.resnet(11, attention="spem")
    models = [model, copy.deepcopy(model)]
    with use_impl(impl):
        torch.compiler.reset()
        run = torch.compile(models[0], fullgraph=True)
        logits = [run(x), models[1](x)]
    for out in logits:
        out.square().mean().backward()
    assert error(logits[0].detach(), logits[1].detach()) <= 10 * TAIL[torch.float32]
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert error(a.grad, b.grad) <= 1e-2, name


@pytest.mark.parametrize("impl", [None, "formula", "triton"])
def test_autocast(impl: str | None) -> None:
    """Under autocast maps are bfloat16, gates float32, and so are the parameters' gradients."""
    if impl == "triton":
        needs(impl, torch.bfloat16, home(impl))
    device = "cpu" if impl is None else home(impl)
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(device)
    found: list[dict[str, Tensor]] = []
    for how, half in ((impl, True), ("reference", True), ("reference", False)):
        model = spem.resnet(11, attention="se").to(device)
        with use_impl(how), torch.autocast(device, torch.bfloat16, enabled=half):
            out = model(x)
        out.float().square().mean().backward()
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
        found.append({"out": out.detach().float(), "g": model.fc.weight.grad})
    # A whole network rounds a hundred times: fused it may be twice as far from float32 as composed.
    for name, exact in found[2].items():
        fused, composed = (error(one[name], exact) for one in found[:2])
        assert fused <= 2 * composed + 2**-7, name


def test_the_operator_of_spikes_by_value_writes_to_no_argument() -> None:
    """Its kernel uses the spikes up, which its schema does not declare."""
    pytest.importorskip("numba")
    z = torch.randn(2, 8, 3, 3).to(memory_format=torch.channels_last)
    spikes = torch.randn(2, 2, 8).unbind()
    values = (z.amax((2, 3)), z.amin((2, 3)))
    case = (z, z, torch.randn(8), *torch.randn(3, 2, 8).unbind(), *values, *spikes)
    before = [t.clone() for t in spikes]
    op = operator("numba", "stats_backward")
    assert torch.equal(op(*case), op(*case))
    assert all(map(torch.equal, spikes, before))
