"""Whole networks as ONNX: what is left out, what is left as it is, what the file says."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attention.drawing import randomise
from export.graphs import FORBIDDEN, expected, loaded, maps, module, network, operators, ran
from tolerance import TOLERANCE
from torch import nn

import spem
from spem.export import to_onnx
from spem.insert import AfterNorm, IdentityStart

CLOSE = TOLERANCE[torch.float32]


def started(spec: str, alpha: float, channels: int = 16) -> IdentityStart:
    start = IdentityStart(module(spec, channels)).eval()
    nn.init.constant_(start.alpha, alpha)
    return start


def test_a_whole_network(tmp_path: Path) -> None:
    model = randomise(spem.resnet(11, attention="spem"), "resnet")
    before = copy.deepcopy(model.state_dict())
    path = tmp_path / "resnet.onnx"
    model.train()
    exported = to_onnx(model, path, (1, 3, 16, 16), dynamic_size=True)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [found.shape for found in exported.differences] == [
        (1, 3, 16, 16),
        (3, 3, 16, 16),
        (1, 3, 48, 80),
    ]
    assert all(0 <= found.relative < 1e-4 for found in exported.differences)
    assert exported.bytes == path.stat().st_size
    assert list(tmp_path.iterdir()) == [path]
    model.eval()
    for shape in [(1, 3, 16, 16), (4, 3, 16, 16), (2, 3, 24, 40)]:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(5))
        np.testing.assert_allclose(ran(path, x), expected(model, x), rtol=1e-4, atol=1e-5)
    found = operators(path)
    assert found.count("ReduceMax") == 3  # a block in each of three stages
    assert not FORBIDDEN & set(found)
    graph = loaded(path)
    about = {entry.key: entry.value for entry in graph.metadata_props}
    assert about["spem_attention"] == "spem"
    assert about["spem_version"] == spem.__version__
    assert about["spem_precision"] == "fp32"
    assert str(Path(spem.__file__).parent).encode() not in path.read_bytes()
    assert not [name for name in graph.graph.initializer if name.name.endswith("pool.p")]


def test_fused_blocks_and_our_own(tmp_path: Path) -> None:
    """Half of the starts have an alpha of 0 and are left out, whatever they are in."""
    blocks = pytest.importorskip("torchvision.models.resnet", reason="torchvision is not installed")
    host = nn.Sequential(nn.Conv2d(3, 16, 1), blocks.BasicBlock(16, 16), blocks.BasicBlock(16, 16))
    spem.attach(host, "spem", input_shape=(1, 3, 8, 8), fuse=True)
    ours = spem.resnet(11)
    spem.attach(ours, "gc", input_shape=(1, 3, 8, 8))  # which mixes maps
    for number, model in enumerate((host, ours)):
        randomise(model, "host").eval()
        for k, start in enumerate(m for m in model.modules() if isinstance(m, IdentityStart)):
            nn.init.constant_(start.alpha, 0.6 * (k % 2))
        x = maps(2, 3, 8, 8)
        path = tmp_path / f"{number}.onnx"
        to_onnx(model, path, (1, 3, 8, 8))
        np.testing.assert_allclose(ran(path, x), expected(model, x), rtol=1e-4, atol=1e-4)
        assert any(isinstance(part, IdentityStart) for part in model.modules())


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_a_wrapped_network_is_the_one_inside(wrap: Any, tmp_path: Path) -> None:
    model, x = network(started("se", 0.4)).eval(), maps(3, 3, 8, 8)
    exported = to_onnx(wrap(model), tmp_path / "net.onnx", (1, 3, 8, 8))
    assert [d.shape for d in exported.differences] == [(1, 3, 8, 8), (3, 3, 8, 8)]
    np.testing.assert_allclose(ran(tmp_path / "net.onnx", x), expected(model, x), **CLOSE)


def test_attention_that_has_not_started_is_left_out(tmp_path: Path) -> None:
    x = maps(3, 3, 8, 9)
    found: dict[float | None, list[str]] = {}
    for alpha in (None, 0.0, 0.4):
        model = network(nn.Identity() if alpha is None else started("se", 0.0))
        if alpha is not None:
            nn.init.constant_(model.attention.alpha, alpha)
        path = tmp_path / f"{alpha}.onnx"
        to_onnx(model, path, (1, 3, 8, 8), dynamic_size=True)
        np.testing.assert_allclose(ran(path, x), expected(model, x), **CLOSE)
        found[alpha] = operators(path)
        about = {entry.key: entry.value for entry in loaded(path).metadata_props}
        assert about["spem_attention"] == ("se" if alpha else "none")
    assert found[0.0] == found[None]
    assert found[0.4].count("Sigmoid") == 1


def test_the_norms_weights_are_those_of_the_host(tmp_path: Path) -> None:
    """attention around a norm, as attach leaves it."""
    model = network(nn.Identity())
    model.norm = AfterNorm(model.norm, started("eca", 0.7))
    path, x = tmp_path / "around.onnx", maps(2, 3, 8, 8)
    to_onnx(model, path, example=maps(1, 3, 8, 8), metadata={"owner": "test"})
    np.testing.assert_allclose(ran(path, x), expected(model, x), **CLOSE)
    about = {entry.key: entry.value for entry in loaded(path).metadata_props}
    assert (about["spem_attention"], about["owner"]) == ("eca", "test")


def test_several_outputs(tmp_path: Path) -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"maps": x * 2, "mean": x.mean((2, 3))}

    exported = to_onnx(Two().eval(), tmp_path / "two.onnx", (1, 4, 5, 6), opset=18)
    assert exported.opset == 18
    names = [value.name for value in loaded(exported.path).graph.output]
    assert names == ["output_0", "output_1"]


def test_fp16_computes_gates_in_float32(tmp_path: Path) -> None:
    model = network(module("srm", 16))
    path, x = tmp_path / "half.onnx", maps(2, 3, 8, 8).half().float()
    exported = to_onnx(model, path, (1, 3, 8, 8), precision="fp16")
    assert model.conv.weight.dtype == torch.float32
    y = expected(model, x)
    error = np.abs(ran(path, x) - y).max() / np.abs(y).max()
    assert 0 < error < 1e-2
    assert max(found.relative for found in exported.differences) < 1e-2
    graph = onnx_types(path)
    assert graph["Sigmoid"] == {"FLOAT"}
    assert graph["Conv"] == {"FLOAT16"}


def onnx_types(path: Path) -> dict[str, set[str]]:
    """The element types that each operator reads first."""
    import onnx

    model = onnx.shape_inference.infer_shapes(loaded(path))
    graph = model.graph
    values = [*graph.input, *graph.value_info, *graph.output]
    of = {value.name: value.type.tensor_type.elem_type for value in values}
    types: dict[str, set[str]] = {}
    for node in graph.node:
        if node.input and node.input[0] in of:
            kind = onnx.TensorProto.DataType.Name(of[node.input[0]])
            types.setdefault(node.op_type, set()).add(kind)
    return types
