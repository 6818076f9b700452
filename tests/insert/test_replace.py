"""Layers that a network has are replaced; an SE's weights, activation and gate go over."""

from __future__ import annotations

import copy

import pytest
import torch
from insert.hosts import attentions, build, images, models, scattered, timm
from tolerance import TAIL, TOLERANCE
from torch import nn

import spem
from spem.insert import CarriedSE, find_sites

# the layers it has; activation and gate of the SE are those of the host
HOSTS = [
    ("timm:efficientnet_b0", 16, "SiLU, sigmoid"),
    ("timm:mobilenetv3_small_050", 9, "ReLU, hard sigmoid"),
    ("timm:regnety_002", 13, "ReLU, sigmoid"),
    ("timm:seresnext26t_32x4d", 8, "ReLU, sigmoid, in the slot"),
    ("timm:legacy_seresnet18", 8, "ReLU, sigmoid, in the slot"),
    ("timm:ghostnet_050", 7, "ReLU, hard sigmoid"),
    ("timm:rexnet_100", 13, "ReLU after a norm, sigmoid"),
    ("timm:convnext_atto", 12, "has none: the usual sites"),
    ("torchvision:efficientnet_b0", 16, "SiLU, sigmoid"),
    ("torchvision:mobilenet_v3_small", 9, "ReLU, hard sigmoid"),
    ("torchvision:regnet_y_400mf", 16, "ReLU, sigmoid"),
]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(("host", "count", "kind"), HOSTS, ids=[host for host, _, _ in HOSTS])
def test_a_better_pool_for_a_trained_se(host: str, count: int, kind: str, training: bool) -> None:
    """se(pool=mix()) starts as the exact average: equal outputs, then the pool learns."""
    network = scattered(build(host))
    if training:
        without_drops(network).train()
    x = images(4 if training else 2)
    twin = copy.deepcopy(network)
    state = copy.deepcopy(network.state_dict())
    names = spem.attach(twin, "se(pool=mix())", replace=True)
    assert len(names) == count, kind
    y, expected = twin(x), network(x)
    torch.testing.assert_close(y, expected, **TOLERANCE[torch.float32])
    y.square().sum().backward()
    found = twin.load_state_dict(state, strict=False)  # plain weights go in afterwards, too
    assert not found.unexpected_keys
    assert all(is_added(key) for key in found.missing_keys)
    carried = [module for module in attentions(twin) if isinstance(module, CarriedSE)]
    assert len(carried) == (0 if "convnext" in host else count)
    for module in carried:
        assert module.pool.beta.grad is not None
        assert module.pool.beta.grad != 0
        with torch.no_grad():
            module.pool.beta.fill_(0.5)
    if carried:
        assert not torch.allclose(twin(x), expected)
    assert spem.detach(twin) == names
    assert list(twin.state_dict()) == list(state)


def is_added(key: str) -> bool:
    return any(part in key for part in (".pool.", ".alpha", ".inner."))


def without_drops(network: nn.Module) -> nn.Module:
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "drop_rate"):
            module.drop_rate = 0.0
        if type(module).__name__ == "StochasticDepth":
            module.p = 0.0
    return network


def test_sites_tell_what_is_replaced() -> None:
    network = build("timm:efficientnet_b0")
    site = find_sites(network, "se", replace=True, input_shape=(1, 3, 64, 64))[1]
    assert (site.name, site.how, site.layer) == ("blocks.1.0.se", "replace", "SqueezeExcite")
    assert (site.block, site.stage) == ("InvertedResidual", 2)
    assert (site.channels, site.shape) == (96, (1, 96, 16, 16))


def test_gates_of_half_precision_are_computed_in_full() -> None:
    network = scattered(build("torchvision:mobilenet_v3_small")).eval().to(torch.bfloat16)
    x = images(1, 64, torch.bfloat16)
    spem.attach(network, "se(pool=mix())", replace=True)
    attention = attentions(network)[0]
    stats = spem.ops.plane_stats(torch.rand(1, attention.channels, 3, 3, dtype=torch.bfloat16))
    assert attention.gate_from(stats).dtype == torch.float32
    assert network(x).dtype == torch.bfloat16


def test_a_pool_from_the_start_and_the_average_itself() -> None:
    network = scattered(build("torchvision:mobilenet_v3_small")).eval()
    x = images()
    expected = network(x)
    spem.attach(network, "se", replace=True)
    assert "pool" not in " ".join(network.state_dict())
    torch.testing.assert_close(network(x), expected, **TOLERANCE[torch.float32])
    spem.detach(network)
    spem.attach(network, "se(pool=max)", replace=True, start="module")
    assert not torch.allclose(network(x), expected)


@pytest.mark.parametrize("attention", ["spem", "se(reduction=4)", "eca"])
def test_weights_that_do_not_go_over_are_told(attention: str) -> None:
    network = scattered(build("timm:seresnext26t_32x4d")).eval()
    modules = dict(network.named_modules())
    x = images(1)
    expected = network(x)
    with pytest.warns(UserWarning, match=r"weights of 8 replaced layers .*layer1.0.se.* do not go"):
        names = spem.attach(network, attention, replace=True)
    assert not torch.allclose(network(x), expected)
    network.double()
    assert spem.detach(network) == names
    assert dict(network.named_modules()) == modules
    network.float()
    torch.testing.assert_close(network(x), expected, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("layer", ["eca", "cbam", "ese", "gc"])
def test_other_layers_are_replaced(layer: str) -> None:
    network = timm.models.resnet.ResNet(
        timm.models.resnet.BasicBlock,
        (1, 1, 1, 1),
        num_classes=5,
        channels=(32, 32, 32, 64),
        block_args={"attn_layer": layer},
    ).eval()
    sites = find_sites(network, "se", replace=True, input_shape=(1, 3, 64, 64))
    assert [site.channels for site in sites] == [32, 32, 32, 64]
    with pytest.warns(UserWarning, match="do not go over"):
        spem.attach(network, "se", replace=True, input_shape=(1, 3, 64, 64))
    assert {type(module.inner) for module in attentions(network)} == {spem.SE}
    assert network(images(1)).isfinite().all()


def test_where_names_what_is_replaced() -> None:
    network = models.resnet.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5)
    x = images(1)

    def act(module: nn.Module) -> nn.Module | None:
        return module.get_submodule("bn2") if isinstance(module, models.resnet.BasicBlock) else None

    with pytest.warns(UserWarning, match="do not go over into spem"):
        names = spem.attach(network, "spem", where=act, replace=True)
    assert names == [f"layer{k}.0.bn2" for k in range(1, 5)]
    assert [type(module.inner) for module in attentions(network)] == [spem.SPEM] * 4
    assert network(x).isfinite().all()
    spem.detach(network)
    assert isinstance(network.get_submodule("layer1.0.bn2"), nn.BatchNorm2d)


def test_ours_are_replaced_too_but_not_what_attach_put_there() -> None:
    layer = spem.attn_layer("se")
    network = timm.models.resnet.ResNet(
        timm.models.resnet.BasicBlock, (1, 1, 1, 1), num_classes=5, block_args={"attn_layer": layer}
    )
    assert not spem.detach(network)
    with pytest.warns(UserWarning, match="do not go over into spem"):
        names = spem.attach(network, "spem", replace=True)
    assert names == [f"layer{k}.0.se" for k in range(1, 5)]
    with pytest.raises(ValueError, match=r"attention at layer1\.0\.se already"):
        spem.attach(network, "se", replace=True)
    spem.detach(network)
    assert {type(module) for module in attentions(network)} == {spem.SE}


def test_a_pool_that_starts_as_the_average_is_not_decayed() -> None:
    network = models.mobilenet_v3_small()
    spem.attach(network, "se(pool=mix())", replace=True)
    betas = {id(module.pool.beta) for module in attentions(network)}
    assert len(betas) == 9
    for group in spem.param_groups(network, 0.1, 1e-4):
        if betas & {id(p) for p in group["params"]}:
            assert group["weight_decay"] == 0
    assert len(spem.learned_mixes(network)) == 9


def test_reparameterised_networks_keep_their_attention() -> None:
    network = scattered(build("timm:repvgg_a0")).double().eval()
    x = images(1, 64, torch.float64)
    spem.attach(network, "spem")
    with torch.no_grad():
        for module in attentions(network):
            module.alpha.fill_(0.5)
        expected = network(x)
        for module in list(network.modules()):
            if hasattr(module, "reparameterize"):
                module.reparameterize()
        assert len(attentions(network)) == 22
        y = network(x)
    assert (y - expected).abs().max() <= TAIL[torch.float64] * expected.abs().max()


def test_layers_that_are_folded_keep_the_attention_around_them() -> None:
    """timm folds norms into convolutions by putting what fuse() gives in their place."""
    from timm.utils.model import reparameterize_model

    network = scattered(build("timm:repvit_m0_9")).eval()  # its fuse() makes float32 layers
    x = images(1, 64)
    spem.attach(network, "spem", input_shape=(1, 3, 64, 64))
    with torch.no_grad():
        for module in attentions(network):
            module.alpha.fill_(0.5)
        expected = network(x)
        folded = reparameterize_model(network)
        assert len(attentions(folded)) == 26
        y = folded(x)
    assert (y - expected).abs().max() <= TAIL[torch.float32] * expected.abs().max()
