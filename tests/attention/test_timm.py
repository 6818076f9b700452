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

MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def same(ours: nn.Module, theirs: nn.Module, channels: int) -> None:
    x = feature_map(4, channels, 5, 6)
    first, second = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, expected = ours(first), theirs(second)
    torch.testing.assert_close(out, expected, **TOLERANCE[torch.float64])
    weights = feature_map(4, channels, 5, 6, key="weights")
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(first.grad, second.grad, **TOLERANCE[torch.float64])


@MODES
@pytest.mark.parametrize("channels", [64, 128])
def test_se(channels: int, training: bool) -> None:
    ours = randomise(spem.SE(channels).double(), "timm").train(training)
    theirs = layers.SEModule(channels, rd_channels=channels // 16).double().train(training)
    with torch.no_grad():
        for mine, other in ((ours.fc1, theirs.fc1), (ours.fc2, theirs.fc2)):
            other.weight.copy_(mine.weight[..., None, None])
            other.bias.copy_(mine.bias)
    same(ours, theirs, channels)


@MODES
@pytest.mark.parametrize("channels", [16, 64, 128, 2048])
def test_eca(channels: int, training: bool) -> None:
    ours = randomise(spem.ECA(channels).double(), "timm").train(training)
    theirs = layers.EcaModule(channels).double().train(training)
    theirs.load_state_dict(ours.state_dict())  # the same key, the same kernel size
    same(ours, theirs, channels)


@MODES
@pytest.mark.parametrize("channels", [64, 128])
def test_cbam(channels: int, training: bool) -> None:
    ours = randomise(spem.CBAM(channels).double(), "timm").train(training)
    theirs = (
        cbam.CbamModule(channels, rd_channels=channels // 16, mlp_bias=True)
        .double()
        .train(training)
    )
    with torch.no_grad():
        for mine, other in ((ours.fc1, theirs.channel.fc1), (ours.fc2, theirs.channel.fc2)):
            other.weight.copy_(mine.weight[..., None, None])
            other.bias.copy_(mine.bias)
        theirs.spatial.conv.conv.weight.copy_(
            ours.spatial.weight.flip(1)
        )  # timm puts the mean first
        theirs.spatial.conv.bn.load_state_dict(ours.norm.state_dict())
    same(ours, theirs, channels)


class Add3(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 3


class Sixth(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / 6


@MODES
@pytest.mark.parametrize("channels", [16, 64])
def test_ese(channels: int, training: bool) -> None:
    ours = randomise(attention.ESE(channels).double(), "timm").train(training)
    theirs = layers.EffectiveSEModule(channels).double().train(training)
    theirs.gate = nn.Sequential(Add3(), nn.ReLU6(), Sixth())  # torch's has 1/6 in float32
    with torch.no_grad():
        theirs.fc.weight.copy_(ours.fc.weight[..., None, None])
        theirs.fc.bias.copy_(ours.fc.bias)
    same(ours, theirs, channels)


@MODES
@pytest.mark.parametrize("extent", [0, 2, 4, 8])
def test_ge_without_parameters(extent: int, training: bool) -> None:
    """The one way that works there; 0 is global."""
    ours = attention.GE(16, extent=extent or "global").train(training)
    theirs = layers.GatherExcite(16, extent=extent, use_mlp=False).train(training)
    same(ours, theirs, 16)


def test_gc_multiplies_like_the_global_context() -> None:
    ours = randomise(attention.GC(64, fusion="mul", reduction=8).double(), "timm")
    theirs = layers.GlobalContext(64, fuse_add=False, fuse_scale=True, rd_divisor=1).double()
    mine, other = ours.mul, theirs.mlp_scale
    with torch.no_grad():
        theirs.conv_attn.weight.copy_(ours.mask.weight)
        theirs.conv_attn.bias.copy_(ours.mask.bias)
        for name in ("fc1", "fc2"):
            getattr(other, name).weight.copy_(getattr(mine, name).weight[..., None, None])
            getattr(other, name).bias.copy_(getattr(mine, name).bias)
        other.norm.load_state_dict(mine.norm.state_dict())
    mine.norm.eps = other.norm.eps  # 1e-6 there
    same(ours, theirs, 64)
