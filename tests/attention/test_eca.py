"""ECA's filter as shifted products: what the convolution gives, in every way of running it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import spem
from spem.attention import eca


@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
@pytest.mark.parametrize("channels", [1, 2, 64, 300])
def test_products_are_the_convolution(
    kernel: int, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = spem.ECA(channels, kernel=kernel).double()
    z = torch.randn(30, channels, dtype=torch.float64, requires_grad=True)
    leaves = [z, module.conv.weight]
    weights = torch.randn(30, channels, dtype=torch.float64)
    expected = F.conv1d(z[:, None], module.conv.weight, padding=kernel // 2)[:, 0]
    wanted = torch.autograd.grad((expected * weights).sum(), leaves)
    with monkeypatch.context() as patch:
        patch.setattr(eca, "_FEW", 0)
        patch.setattr(eca, "conv", None)  # it is not called
        found = eca._along_channels(module.conv, z)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad((found * weights).sum(), leaves), wanted)


def test_few_values_are_convolved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eca, "conv", lambda layer, z: torch.full_like(z, 7.0))
    module = spem.ECA(16)
    assert (eca._along_channels(module.conv, torch.randn(2, 16)) == 7).all()


@pytest.mark.parametrize("kind", ["forward", "pre"])
def test_a_hook_on_the_convolution_is_called(kind: str) -> None:
    called: list[nn.Module] = []
    module = spem.ECA(64)

    def hook(layer: nn.Module, *_: object) -> None:
        called.append(layer)

    if kind == "forward":
        module.conv.register_forward_hook(hook)
    else:
        module.conv.register_forward_pre_hook(hook)
    module(torch.randn(128, 64, 2, 2))
    assert called == [module.conv]


def test_large_maps_compile_and_export() -> None:
    module = spem.ECA(64).eval()
    x = torch.randn(128, 64, 3, 3)
    expected = module(x)
    torch.compiler.reset()
    torch.testing.assert_close(
        torch.compile(module, fullgraph=True, backend="aot_eager")(x), expected
    )
    program = torch.export.export(module, (x,))
    torch.testing.assert_close(program.module()(x), expected)
    assert "conv1d" in str(program.graph)
