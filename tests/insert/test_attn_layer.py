"""Every module as timm's attn_layer."""

from __future__ import annotations

import pickle

import pytest
import torch
from insert.hosts import attentions, images, timm
from insert.test_learning import TAILS

import spem


@pytest.mark.parametrize("name", [name for name in TAILS if name != "fca"])
def test_every_module_of_the_tail(name: str) -> None:
    layer = spem.attn_layer(name)
    network = timm.models.resnet.ResNet(
        timm.models.resnet.BasicBlock,
        (1, 1, 1, 1),
        num_classes=5,
        channels=(64, 64, 64, 64),
        output_stride=8,
        block_args={"attn_layer": layer},
    )
    assert [module.name for module in attentions(network)] == [name] * 4
    y = network(images(2, 64))
    y.sum().backward()
    assert y.isfinite().all()
    for module in attentions(network):
        assert all(p.grad is not None for p in module.parameters())


def test_resnet50_has_sixteen() -> None:
    with torch.device("meta"):
        network = timm.create_model("resnet50", block_args={"attn_layer": spem.attn_layer("spem")})
    channels = [module.channels for module in attentions(network)]
    assert channels == [256] * 3 + [512] * 4 + [1024] * 6 + [2048] * 3


def test_timms_device_dtype_and_hints() -> None:
    layer = pickle.loads(pickle.dumps(spem.attn_layer("se(reduction=8)")))  # noqa: S301
    module = layer(32, device="meta", dtype=torch.float64, rd_ratio=0.25, act_layer=torch.nn.ReLU)
    assert module.fc1.weight.dtype == torch.float64
    assert module.fc1.weight.device.type == "meta"
    assert module.fc1.out_features == 4


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("none", "attn_layer: 'none' is the plain network"),
        ("speem", "unknown attention 'speem'. Did you mean spem"),
        ("iebn", "attn_layer: iebn stands in place of every norm"),
        ("ean", "attn_layer: ean is one module for all blocks of a stage"),
    ],
)
def test_refused(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spem.attn_layer(spec)


def test_a_module_that_must_know_the_size_says_so() -> None:
    """Every stage has maps of its own size, which timm does not pass on; attach finds them."""
    with pytest.raises(ValueError, match=r"FCA: .*size"):
        spem.attn_layer("fca")(64)
    assert spem.attn_layer("fca(size=7)")(64).channels == 64
