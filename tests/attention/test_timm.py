"""The layers that timm has too: equal to them where they are the published module."""

from __future__ import annotations

import warnings

import pytest
import torch
from attention.drawing import feature_map, randomise
from tolerance import TOLERANCE
from torch import nn

import spem
from spem import attention

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    layers = pytest.importorskip("timm.layers", reason="timm is not installed")
    cbam = pytest.importorskip("timm.layers.cbam", reason="timm is not installed")


def same(ours: nn.Module, theirs: nn.Module, channels: int) -> None:
    x = feature_map(4, channels, 5, 6)
    weights = feature_map(4, channels, 5, 6, key="weights")
    for training in (False, True):  # timm's norms have another momentum
        found = []
        for module in (ours, theirs):
            leaf = x.clone().requires_grad_()
            out = module.train(training)(leaf)
            (out * weights).sum().backward()
            found.append((out, leaf.grad))
        torch.testing.assert_close(*found, **TOLERANCE[torch.float64])


def copied(ours: nn.Module, theirs: nn.Module, *names: str) -> None:
    """The weights of linear layers into 1 x 1 convolutions of the same names."""
    for name in names:
        mine, other = ours.get_submodule(name), theirs.get_submodule(name)
        with torch.no_grad():
            other.weight.copy_(mine.weight[..., None, None])
            other.bias.copy_(mine.bias)


@pytest.mark.parametrize("channels", [64, 128])
def test_se_and_cbam(channels: int) -> None:
    ours = randomise(spem.SE(channels).double(), "timm")
    theirs = layers.SEModule(channels, rd_channels=channels // 16).double()
    copied(ours, theirs, "fc1", "fc2")
    same(ours, theirs, channels)
    ours = randomise(spem.CBAM(channels).double(), "timm")
    theirs = cbam.CbamModule(channels, rd_channels=channels // 16, mlp_bias=True).double()
    copied(ours, theirs.channel, "fc1", "fc2")
    with torch.no_grad():  # timm puts the mean first
        theirs.spatial.conv.conv.weight.copy_(ours.spatial.weight.flip(1))
    theirs.spatial.conv.bn.load_state_dict(ours.norm.state_dict())
    same(ours, theirs, channels)


@pytest.mark.parametrize("channels", [16, 128, 2048])
def test_eca(channels: int) -> None:
    ours = randomise(spem.ECA(channels).double(), "timm")
    theirs = layers.EcaModule(channels).double()
    theirs.load_state_dict(ours.state_dict())  # the same key, the same kernel size
    same(ours, theirs, channels)


class Hard(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + 3).clamp(0, 6) / 6  # torch's has 1/6 in float32


def test_ese_ge_and_gc() -> None:
    ours = randomise(attention.ESE(64).double(), "timm")
    theirs = layers.EffectiveSEModule(64).double()
    theirs.gate = Hard()
    copied(ours, theirs, "fc")
    same(ours, theirs, 64)
    for extent in (0, 2, 4, 8):  # the one way that works there; 0 is global
        ours = attention.GE(16, extent=extent or "global")
        same(ours, layers.GatherExcite(16, extent=extent, use_mlp=False), 16)
    ours = randomise(attention.GC(64, fusion="mul", reduction=8).double(), "timm")
    theirs = layers.GlobalContext(64, fuse_add=False, fuse_scale=True, rd_divisor=1).double()
    theirs.conv_attn.load_state_dict(ours.mask.state_dict())
    copied(ours.mul, theirs.mlp_scale, "fc1", "fc2")
    theirs.mlp_scale.norm.load_state_dict(ours.mul.norm.state_dict())
    ours.mul.norm.eps = theirs.mlp_scale.norm.eps  # 1e-6 there
    same(ours, theirs, 64)
