"""Every family: the number of sites, equal outputs, backward, state dict, and back again."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from insert.hosts import COUNTED, RUN, Host, attentions, build, images, models, scattered, timm
from tolerance import TOLERANCE
from torch import nn
from torchvision.ops import StochasticDepth

import spem
from spem.insert import find_sites

SHORTCUTS = re.compile(r"downsample|shortcut|skip|proj\b|\.identity|branch1")


@pytest.mark.parametrize("host", [*RUN, *COUNTED], ids=lambda host: host.name)
def test_number_of_sites(host: Host) -> None:
    """On the meta device, where a network of any size is built and run in no time."""
    if "regnet" in host.name and host.name.startswith("torchvision"):
        network = build(host.name)  # it computes its widths with tensors
    else:
        with torch.device("meta"):
            network = build(host.name)
    shape = (1, 3, 224, 224) if "maxvit" in host.name else (1, 3, 96, 96)
    sites = find_sites(network, input_shape=shape)
    assert len(sites) == host.sites, host.why
    assert max(site.stage for site in sites) == host.stages, host.why
    assert sorted({site.stage for site in sites}) == list(range(1, host.stages + 1))
    assert spem.attach(network, "eca", input_shape=shape) == [site.name for site in sites]
    names = {site.name for site in sites}
    assert len(names) == host.sites
    if "repvit" not in host.name:  # whose "downsample" leads into a stage and has branches
        assert not [name for name in names if SHORTCUTS.search(name)]
    assert spem.detach(network) == [site.name for site in sites]


def test_thirty_architectures() -> None:
    assert len(RUN) >= 30
    assert len({host.name for host in [*RUN, *COUNTED]}) == len(RUN) + len(COUNTED)


@pytest.mark.parametrize("host", RUN, ids=lambda host: host.name)
def test_family(host: Host) -> None:
    network, x = scattered(build(host.name)), images()
    plain_state = copy.deepcopy(network.state_dict())
    plain_modules = dict(network.named_modules())
    with torch.no_grad():
        expected = network(x)
    assert expected.isfinite().all()
    assert expected.std() > 0

    names = spem.attach(network, "spem", input_shape=tuple(x.shape))
    added = attentions(network)
    assert len(names) == len(added) == host.sites
    draw(added)
    with torch.no_grad():
        torch.testing.assert_close(network(x), expected, **TOLERANCE[torch.float32])
    state = copy.deepcopy(network.state_dict())
    plain_weights_load(network, plain_state)
    network.load_state_dict(state)
    every_site_learns(network, x)
    with torch.no_grad():
        for attention in added:
            attention.alpha.fill_(0.5)
        assert not torch.allclose(network.eval()(x), expected)

    assert spem.detach(network) == names
    assert dict(network.named_modules()) == plain_modules
    assert list(network.state_dict()) == list(plain_state)
    network.load_state_dict(plain_state)
    with torch.no_grad():
        torch.testing.assert_close(network(x), expected, rtol=0, atol=0)


def draw(added: list[nn.Module]) -> None:
    """Everything of the attention but the alphas."""
    rng = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for attention in added:
            for parameter in attention.inner.parameters():
                parameter.normal_(0.0, 0.5, generator=rng)


def plain_weights_load(network: nn.Module, plain: dict[str, torch.Tensor]) -> None:
    """With only keys of attention missing; its own load strictly, and all names are true."""
    own = network.state_dict()
    assert {name for name, _ in network.named_parameters()} <= set(own)
    for tensor in network.state_dict().values():
        if tensor.is_floating_point():
            tensor.zero_()
    found = network.load_state_dict(plain, strict=False)
    assert not found.unexpected_keys
    assert all(is_added(key) for key in found.missing_keys)
    now = network.state_dict()
    kept = [key for key in own if key not in found.missing_keys]
    assert len(kept) == len(plain)
    for key, value in zip(kept, plain.values(), strict=True):
        assert torch.equal(now[key], value), key


def is_added(key: str) -> bool:
    return ".alpha" in key or ".inner." in key


def every_site_learns(network: nn.Module, x: torch.Tensor) -> None:
    """In training every attention is called once and its alpha gets a gradient."""
    calls: dict[int, int] = {}
    added = attentions(network)
    handles = [
        attention.register_forward_hook(
            lambda module, *_: calls.__setitem__(id(module), calls.get(id(module), 0) + 1)
        )
        for attention in added
    ]
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
        assert attention.alpha.grad is not None
        assert attention.alpha.grad.isfinite()
        assert attention.alpha.grad != 0


@pytest.mark.parametrize("arch", ["vit_tiny_patch16_224", "mixer_s32_224"])
def test_networks_without_convolutions(arch: str) -> None:
    with torch.device("meta"):
        network = timm.create_model(arch)
    with pytest.raises(ValueError, match=r"no site found in \w+ \(\d convolutions, .* where="):
        spem.attach(network, "spem")


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
    losses = detector.train()(
        x, [{"boxes": torch.tensor([[4.0, 4, 40, 40]]), "labels": torch.tensor([1])}]
    )
    sum(losses.values()).backward()
    assert detector.backbone.body.get_submodule("layer4.2").bn3.attention.w_e.grad is not None


def test_segmentation() -> None:
    network = models.segmentation.deeplabv3_resnet50(
        weights=None, weights_backbone=None, num_classes=3
    ).eval()
    with torch.no_grad():
        expected = network(images())["out"]
        assert len(spem.attach(network, "spem")) == 16
        torch.testing.assert_close(network(images())["out"], expected, **TOLERANCE[torch.float32])


def test_unet() -> None:
    smp = pytest.importorskip("segmentation_models_pytorch", reason="not installed")
    network = scattered(smp.Unet("resnet18", encoder_weights=None)).eval()
    with torch.no_grad():
        expected = network(images())
        assert len(spem.attach(network, "spem")) == 8
        torch.testing.assert_close(network(images()), expected, **TOLERANCE[torch.float32])
