"""Every family: the number of sites, equal outputs, backward, state dict, and back again."""

from __future__ import annotations

import copy
import re
from collections import Counter

import pytest
import torch
from insert.hosts import (
    COUNTED,
    RUN,
    attentions,
    build,
    draw_inner,
    images,
    meta,
    models,
    sampled,
    scattered,
    set_alpha,
    stages_of,
    timm,
)
from tolerance import TOLERANCE
from torch import nn
from torchvision.ops import StochasticDepth

import spem
from spem.insert import find_sites
from spem.insert.families import is_norm

SHORTCUTS = re.compile(r"downsample|shortcut|skip|proj\b|\.identity|branch1")


def sites_are_right(host: str, network: nn.Module, shape: tuple[int, ...]) -> list[str]:
    sites = find_sites(network, input_shape=shape)
    stages = Counter(site.stage for site in sites)
    assert [stages[stage] for stage in sorted(stages)] == stages_of(host)
    assert sorted(stages) == list(range(1, len(stages) + 1))
    names = [site.name for site in sites]
    assert len(set(names)) == len(names)
    if "repvit" not in host:  # whose "downsample" leads into a stage and has branches
        assert not [name for name in names if SHORTCUTS.search(name)]
    return names


@pytest.mark.parametrize("host", sampled(COUNTED))
def test_number_of_sites(host: str) -> None:
    network = meta(host)
    shape = (1, 3, 224, 224) if "maxvit" in host else (1, 3, 96, 96)
    names = sites_are_right(host, network, shape)
    assert not host.endswith("_bn") or all(is_norm(network.get_submodule(name)) for name in names)
    assert spem.attach(network, "eca", input_shape=shape) == names
    assert spem.detach(network) == names


@pytest.mark.parametrize("host", sampled(RUN))
def test_family(host: str) -> None:
    network, x = scattered(build(host)), images()
    plain_state = copy.deepcopy(network.state_dict())
    plain_modules = dict(network.named_modules())
    with torch.no_grad():
        expected = network(x)
    assert expected.isfinite().all()
    assert expected.std() > 0

    names = sites_are_right(host, network, tuple(x.shape))
    assert spem.attach(network, "spem", input_shape=tuple(x.shape)) == names
    assert len(attentions(network)) == len(names)
    draw_inner(network, 0.5)
    with torch.no_grad():
        torch.testing.assert_close(network(x), expected, **TOLERANCE[torch.float32])
    state = copy.deepcopy(network.state_dict())
    plain_weights_load(network, plain_state)
    network.load_state_dict(state)
    every_site_learns(network, x)
    set_alpha(network, 0.5)
    with torch.no_grad():
        assert not torch.allclose(network.eval()(x), expected)

    assert spem.detach(network) == names
    assert dict(network.named_modules()) == plain_modules
    assert list(network.state_dict()) == list(plain_state)
    network.load_state_dict(plain_state)
    with torch.no_grad():
        torch.testing.assert_close(network(x), expected, rtol=0, atol=0)


def plain_weights_load(network: nn.Module, plain: dict[str, torch.Tensor]) -> None:
    """With only keys of attention missing; its own load strictly, and all names are true."""
    own = network.state_dict()
    assert {name for name, _ in network.named_parameters()} <= set(own)
    for tensor in own.values():
        if tensor.is_floating_point():
            tensor.zero_()
    found = network.load_state_dict(plain, strict=False)
    assert not found.unexpected_keys
    assert all(".alpha" in key or ".inner." in key for key in found.missing_keys)
    now = network.state_dict()
    kept = [key for key in own if key not in found.missing_keys]
    for key, value in zip(kept, plain.values(), strict=True):
        assert torch.equal(now[key], value), key


def every_site_learns(network: nn.Module, x: torch.Tensor) -> None:
    """In training every attention is called once and its alpha gets a gradient."""
    calls: Counter[nn.Module] = Counter()
    added = attentions(network)
    handles = [m.register_forward_hook(lambda module, *_: calls.update([module])) for m in added]
    network.train()
    for module in network.modules():
        if isinstance(module, (nn.Dropout, StochasticDepth)):  # may drop a branch of all images
            module.eval()
    network(x).square().sum().backward()
    for handle in handles:
        handle.remove()
    assert list(calls.values()) == [1] * len(added)
    for attention in added:
        assert attention.training
        assert attention.alpha.grad.isfinite()
        assert attention.alpha.grad != 0


@pytest.mark.parametrize("arch", ["vit_tiny_patch16_224", "mixer_s32_224"])
def test_networks_without_convolutions(arch: str) -> None:
    with torch.device("meta"):
        network = timm.create_model(arch)
    with pytest.raises(ValueError, match=r"no site found in \w+ \(\d convolutions, .* where="):
        spem.attach(network, "spem")


@pytest.mark.slow
def test_detection_with_frozen_norms() -> None:
    """torchvision freezes the norms of a detector's backbone; attention takes their channels."""
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
    from torchvision.ops import FrozenBatchNorm2d

    resnet = models.resnet50(weights=None, norm_layer=FrozenBatchNorm2d)
    backbone = _resnet_fpn_extractor(scattered(resnet), 5)
    detector = FasterRCNN(backbone, num_classes=3, min_size=64, max_size=64).eval()
    x = [images(1)[0]]
    with torch.no_grad():
        expected = detector.backbone(images())
    names = spem.attach(detector, "spem")
    assert len(names) == 16
    assert names[0] == "backbone.body.layer1.0.bn3"
    with torch.no_grad():
        for key, value in detector.backbone(images()).items():
            torch.testing.assert_close(value, expected[key], **TOLERANCE[torch.float32])
        assert set(detector(x)[0]) == {"boxes", "labels", "scores"}
    spem.detach(detector)
    with pytest.warns(UserWarning, match="trained"):
        spem.attach(detector, "spem", start="module")
    truth = {"boxes": torch.tensor([[4.0, 4, 40, 40]]), "labels": torch.tensor([1])}
    sum(detector.train()(x, [truth]).values()).backward()
    assert detector.backbone.body.get_submodule("layer4.2").bn3.attention.w_e.grad is not None


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "sites"), [("deeplab", 16), ("unet", 8)])
def test_segmentation(kind: str, sites: int) -> None:
    if kind == "unet":
        smp = pytest.importorskip("segmentation_models_pytorch", reason="not installed")
        network = smp.Unet("resnet18", encoder_weights=None)
        out = lambda y: y  # noqa: E731
    else:
        network = models.segmentation.deeplabv3_resnet50(
            weights=None, weights_backbone=None, num_classes=3
        )
        out = lambda y: y["out"]  # noqa: E731
    scattered(network).eval()
    with torch.no_grad():
        expected = out(network(images()))
        assert len(spem.attach(network, "spem")) == sites
        torch.testing.assert_close(out(network(images())), expected, **TOLERANCE[torch.float32])
