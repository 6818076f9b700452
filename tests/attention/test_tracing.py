"""Tracers of the field take networks with attention, and what they trace is the network."""

from __future__ import annotations

import warnings

import pytest
import torch
from attention.cases import ALL, C, drawn, maps, sampled
from attention.drawing import feature_map, randomise
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import spem


def traced_by_jit(model: nn.Module, x: Tensor) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated in torch
        return torch.jit.trace(model, x)


def exported(model: nn.Module, x: Tensor, *, strict: bool = False) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(model, (x,), strict=strict).module()


TRACERS = {
    "fx": lambda model, x: torch.fx.symbolic_trace(model),
    "jit": traced_by_jit,  # with gradients, and checked by a second trace without
    "export": exported,
    "make_fx": lambda model, x: make_fx(model)(x),
}


@pytest.mark.parametrize(("name", "tracer"), sampled(ALL, list(TRACERS), each=1))
def test_networks(name: str, tracer: str) -> None:
    model = randomise(spem.resnet(11, attention=name), "traced", name).eval()
    x = feature_map(2, 3, 32, 32, dtype=torch.float32)
    found = TRACERS[tracer](model, x)(x)
    torch.testing.assert_close(found, model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__ < "2.7", reason="torch 2.6 exports not strictly")
@pytest.mark.parametrize("name", ["spem", "cbam", "dia", "iebn", "sk"])
def test_strict_export(name: str) -> None:
    model = randomise(spem.resnet(11, attention=name), "traced", name).eval()
    x = feature_map(2, 3, 32, 32, dtype=torch.float32)
    torch.testing.assert_close(exported(model, x, strict=True)(x), model(x), rtol=1e-5, atol=1e-6)


def test_fx_calls_a_module_as_one() -> None:
    for name in ALL[::3]:
        holder = nn.Sequential(drawn(name, training=False))
        graph = torch.fx.symbolic_trace(holder)
        assert [node.op for node in graph.graph.nodes] == ["placeholder", "call_module", "output"]
        assert torch.equal(graph(maps()), holder(maps()))
        with pytest.raises(TypeError, match=r"torch\.fx traces networks that hold an attention"):
            torch.fx.symbolic_trace(holder[0])


def test_feature_extractors() -> None:
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model = randomise(spem.resnet(11, attention="dia"), "features").eval()
    x = feature_map(2, 3, 32, 32, dtype=torch.float32)
    nodes = {"layer1.0.conv3": "a", "fc": "b"}
    found = extraction.create_feature_extractor(model, nodes)(x)
    assert list(found) == ["a", "b"]
    torch.testing.assert_close(found["b"], model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*deprecated")  # torch's own forward mode scripts
@pytest.mark.parametrize("name", ALL)
def test_transforms_and_second_derivatives(name: str) -> None:
    module = drawn(name, torch.float64, training=False)
    x, tangent = maps(torch.float64, 2, C, 4, 5), maps(torch.float64, 2, C, 4, 5, key="tangent")
    stacked = torch.stack([x, tangent])
    torch.testing.assert_close(
        torch.func.vmap(module)(stacked), torch.stack([module(x), module(tangent)])
    )
    out, derivative = torch.func.jvp(module, (x,), (tangent,))
    torch.testing.assert_close(out, module(x))
    step = 1e-6
    numeric = (module(x + step * tangent) - module(x - step * tangent)) / (2 * step)
    torch.testing.assert_close(derivative, numeric, rtol=1e-4, atol=1e-6)
    leaf = x.clone().requires_grad_()
    [first] = torch.autograd.grad(module(leaf).square().sum(), leaf, create_graph=True)
    [second] = torch.autograd.grad(first.square().sum(), leaf)
    assert torch.isfinite(second).all()
    assert second.abs().max() > 0
