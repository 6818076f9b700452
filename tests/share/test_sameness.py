"""save_pretrained compares outputs: what has no parameters may not get lost either."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import spem

timm = pytest.importorskip("timm")


def host(name: str = "test_resnet", **options: Any) -> Any:
    """A network of timm whose norms are drawn at random: at the start many of them are zero."""
    model = timm.create_model(name, pretrained=False, **options).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.bias, module.running_mean):
                    tensor.copy_(torch.randn(tensor.shape, generator=generator))
                drawn = torch.rand(module.running_var.shape, generator=generator)
                module.running_var.copy_(0.5 + drawn)
    return model


def test_pooling_and_channels_are_read_off_the_network(tmp_path: Path):
    model = host(global_pool="max", in_chans=4, num_classes=3)
    again = spem.from_pretrained(spem.save_pretrained(model, tmp_path))
    x = torch.randn(2, 4, 64, 64)
    assert torch.equal(model(x), again(x))
    assert json.loads((tmp_path / "config.json").read_text())["network"]["options"] == {
        "num_classes": 3,
        "in_chans": 4,
        "global_pool": "max",
    }


def changed(model: Any, change: Callable[[Any], object]) -> Any:
    change(model)
    return model


def blind(model: Any, kind: type[nn.Module]) -> None:
    """Lets the attentions of a kind gate by another rule than they say."""
    for module in model.modules():
        if isinstance(module, kind):
            module.gate = lambda x, module=module: kind.gate(module, x) ** 2


class SimAM(nn.Module):
    """Attention without parameters, by its formula."""

    def __init__(self, channels: int, **_: Any) -> None:
        super().__init__()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        square = (x - x.mean((2, 3), keepdim=True)) ** 2
        return x * torch.sigmoid(square / (4 * square.mean((2, 3), keepdim=True) + 4e-4) + 0.5)


def hidden_pool(model: Any) -> None:
    model.global_pool = nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten())


def blind_starts(model: Any) -> None:
    spem.attach(model, "simam")
    blind(model, spem.SimAM)


plain = partial(timm.create_model, pretrained=False)
simam = {"block_args": {"attn_layer": SimAM}}
CASES: dict[str, Callable[[], Any]] = {
    "max pooling that is hidden": lambda: changed(host(), hidden_pool),
    "silu": lambda: host(act_layer="silu"),
    "simam by block_args": lambda: host(**simam),
    "behind last norms of zero": lambda: plain("test_resnet", **simam),
    "behind identity starts": lambda: changed(host(), blind_starts),
    "a layer scale of 1e-6": lambda: plain("convnext_atto", act_layer="silu"),
    "a hook": lambda: changed(
        host(), lambda m: m.layer3.register_forward_hook(lambda *a: a[2].relu() + 1)
    ),
    "another epsilon": lambda: changed(host(), lambda m: setattr(m.layer4[0].bn1, "eps", 1e-2)),
}


@pytest.mark.parametrize("case", CASES)
def test_what_would_load_as_another_network_is_not_written(case: str, tmp_path: Path):
    with pytest.raises(ValueError, match=r"computes other outputs: pass options= as it was built"):
        spem.save_pretrained(CASES[case](), tmp_path / "out")
    assert not (tmp_path / "out").exists()
