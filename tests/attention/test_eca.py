"""ECA's filter as shifted products: what the convolution gives, in every way of running it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import spem
from spem.attention import eca


@pytest.mark.parametrize(("channels", "kernel"), [(1, 1), (2, 5), (64, 3), (64, 7), (300, 5)])
def test_products_are_the_convolution(
    kernel: int, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = spem.ECA(channels, kernel=kernel).double()
    x = torch.randn(30, channels, 2, 2, dtype=torch.float64, requires_grad=True)
    leaves = [x, module.conv.weight]
    weights = torch.randn(30, channels, 1, 1, dtype=torch.float64)
    found: list[tuple[torch.Tensor, ...]] = []
    for few in (0, 1 << 30):
        monkeypatch.setattr(eca, "_FEW", few)
        gate = module.gate(x)
        assert ("Convolution" in str(_graph(gate))) == (few > 0)
        found.append((gate, *torch.autograd.grad((gate * weights).sum(), leaves)))
    torch.testing.assert_close(found[0], found[1])
    filtered = F.conv1d(x.mean((2, 3))[:, None], module.conv.weight, padding=kernel // 2)
    torch.testing.assert_close(found[0][0][..., 0, 0], torch.sigmoid(filtered[:, 0]))


def _graph(t: torch.Tensor) -> set[str]:
    """Names of all operations that a tensor came from."""
    seen: set[str] = set()
    rest = [t.grad_fn]
    while rest:
        node = rest.pop()
        if node is not None and hasattr(node, "next_functions"):
            seen.add(type(node).__name__)
            rest += [n for n, _ in node.next_functions]
    return seen


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
    program = torch.export.export(module, (x,), strict=False)
    torch.testing.assert_close(program.module()(x), expected)
    assert "conv1d" in str(program.graph)


class _Doubled(nn.Conv1d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    "layer",
    [
        _Doubled(1, 1, 3, padding=1, bias=False),
        nn.Conv1d(1, 1, 3, padding=1, bias=True),
        nn.Conv1d(1, 1, 3, padding=2, dilation=2, bias=False),
        nn.Conv1d(1, 1, 3, padding=1, bias=False, padding_mode="circular"),
        nn.Conv1d(1, 1, 13, padding=6, bias=False),
    ],
    ids=["own forward", "bias", "dilation", "padding mode", "many taps"],
)
def test_another_layer_in_its_place_is_called(layer: nn.Conv1d) -> None:
    """So that the result does not depend on the size of the batch."""
    module = spem.ECA(64)
    module.conv = layer
    x = torch.randn(80, 64, 2, 2)
    torch.testing.assert_close(module(x), torch.cat([module(one[None]) for one in x]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_wide_in_batches_of_all_sizes(dtype: torch.dtype) -> None:
    module = spem.ECA(64).to(dtype)
    x = torch.randn(80, 64, 2, 2).to(dtype)
    alone = torch.cat([module(one[None]) for one in x])
    torch.testing.assert_close(module(x), alone)
    wide = spem.ECA(64)
    wide.load_state_dict(module.state_dict())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = wide(x)
    assert again.dtype == dtype
    torch.testing.assert_close(again, alone)


def test_products_under_vmap() -> None:
    module = spem.ECA(64)
    x = torch.randn(3, 80, 64, 2, 2)
    found = torch.vmap(module)(x)
    torch.testing.assert_close(found, torch.stack([module(one) for one in x]))
