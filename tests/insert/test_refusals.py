"""Bad input: the message names what, and what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from insert.hosts import models, timm
from torch import nn

import spem
from spem.insert import find_sites


def network() -> nn.Module:
    return models.resnet.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5)


class Permuted(nn.Module):
    """A norm over channels that stand last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm = nn.LayerNorm(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x).permute(0, 2, 3, 1))


def norm_of(module: nn.Module) -> nn.Module | None:
    return module if isinstance(module, nn.LayerNorm) else None


REFUSED: list[tuple[Callable[[], nn.Module], str, dict[str, Any], str]] = [
    (network, "speem", {}, "unknown attention 'speem'. Did you mean spem"),
    (network, "none", {}, "'none' is the plain network; there is nothing to put in"),
    (network, "se(reduction=100)", {}, r"layer1.0.bn2: SE: reduction=100 .* Use reduction <= 64"),
    (network, "sge(groups=48)", {}, r"layer1.0.bn2: SGE: .*48"),
    (network, "bam", {}, "bam stands after every stage but the last.*placement 'tail'"),
    (network, "sk", {}, "sk stands in place of the 3x3 convolution"),
    (network, "dia", {}, "dia is one module for all blocks of a stage, which only spem.resnet has"),
    (
        lambda: spem.resnet(11, attention="dia"),
        "spem",
        {},
        "layer1.0.attention would not run, because the blocks of layer1 share one dia",
    ),
    (network, "spem", {"start": "zero"}, "start='zero' is unknown. Use 'identity' or 'module'"),
    (network, "spem", {"stages": (3, 5)}, r"stages=\[3, 5\], but this network has stages 1 to 4"),
    (network, "spem", {"include": "layer9*"}, r"include='layer9\*' matches no site.*layer1.0.bn2"),
    (
        network,
        "spem",
        {"where": lambda module: None},
        "where= gave None for every module",
    ),
    (network, "spem", {"where": lambda module: "bn2"}, "where= gave 'bn2' for the network"),
    (network, "spem", {"where": lambda module: nn.ReLU()}, "that is no part of the network"),
    (network, "fca", {"input_shape": (1, 4, 64, 64)}, r"does not run on .*\[1, 4, 64, 64\].*Pass"),
    (
        Permuted,
        "spem",
        {"where": norm_of, "input_shape": (1, 3, 9, 9)},
        r"norm is \[1, 7, 7, 6\], but its norm says 6 channels",
    ),
    (
        lambda: nn.Sequential(nn.Linear(3, 3)),
        "spem",
        {},
        r"no site found in Sequential \(no convolutional layers\). Pass where= a rule",
    ),
    (
        lambda: nn.Sequential(timm.models.resnet.BasicBlock(8, 8))[0].bn2,
        "spem",
        {},
        r"no site found in BatchNorm2d",
    ),
]


@pytest.mark.parametrize(("make", "attention", "options", "message"), REFUSED)
def test_refused(
    make: Callable[[], nn.Module], attention: str, options: dict[str, Any], message: str
) -> None:
    model = make()
    modules = dict(model.named_modules())
    with pytest.raises((ValueError, TypeError), match=f"(?s){message}"):
        spem.attach(model, attention, **options)
    assert dict(model.named_modules()) == modules
    assert model.training


def test_attention_is_put_in_once() -> None:
    model = network()
    spem.attach(model, "spem", stages=(1, 2))
    with pytest.raises(ValueError, match=r"attention at layer1.0.bn2 already.*spem.detach"):
        spem.attach(model, "se")
    assert spem.attach(model, "se", stages=(3, 4)) == ["layer3.0.bn2", "layer4.0.bn2"]


def test_no_module_and_no_network() -> None:
    with pytest.raises(TypeError, match=r"needs a torch.nn.Module, got str"):
        spem.attach("resnet50", "spem")
    assert spem.detach(network()) == []


def test_layers_a_forward_pass_does_not_come_by() -> None:
    model = models.googlenet(weights=None, init_weights=False, aux_logits=False)
    model.inception5b = nn.Identity()

    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.aside = models.googlenet(init_weights=False, aux_logits=False).inception5b

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.model.inception3a(self.model.conv1(x)[:, :1].repeat(1, 192, 1, 1))

    with pytest.raises(ValueError, match=r"did not come by model.inception3b.* include="):
        find_sites(Aside(), input_shape=(1, 3, 64, 64))
