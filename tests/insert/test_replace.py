"""Layers that a network has are replaced; an SE's weights, activation and gate go over."""

from __future__ import annotations

import copy

import pytest
import torch
from insert.hosts import attentions, build, images, sampled, scattered, small, small_timm, timm
from tolerance import TOLERANCE
from torch import nn

import spem
from spem.insert import CarriedSE, find_sites

# the layers it has; activation and gate of the SE are those of the host
HOSTS = {
    "timm:efficientnet_b0": 16,  # SiLU, sigmoid
    "timm:mobilenetv3_small_050": 9,  # ReLU, hard sigmoid
    "timm:regnety_002": 13,  # ReLU, sigmoid
    "timm:seresnext26t_32x4d": 8,  # in the slot
    "timm:legacy_seresnet18": 8,
    "timm:ghostnet_050": 7,  # ReLU, hard sigmoid
    "timm:rexnet_100": 13,  # ReLU after a norm, sigmoid
    "timm:convnext_atto": 12,  # has none: the usual sites
    "torchvision:efficientnet_b0": 16,
    "torchvision:mobilenet_v3_small": 9,
    "torchvision:regnet_y_400mf": 16,
}


@pytest.mark.parametrize("host", sampled(HOSTS))
def test_a_better_pool_for_a_trained_se(host: str) -> None:
    """se(pool=mix()) starts as the exact average: equal outputs, then the pool learns."""
    network = scattered(build(host))
    for x in (images(2), images(4)):
        twin = copy.deepcopy(network)
        state = copy.deepcopy(network.state_dict())
        names = spem.attach(twin, "se(pool=mix())", replace=True)
        assert len(names) == HOSTS[host]
        y, expected = twin(x), network(x)
        torch.testing.assert_close(y, expected, **TOLERANCE[torch.float32])
        y.square().sum().backward()
        found = twin.load_state_dict(state, strict=False)  # plain weights go in afterwards, too
        assert not found.unexpected_keys
        added = (".pool.", ".alpha", ".inner.")
        assert all(any(part in key for part in added) for key in found.missing_keys)
        carried = [module for module in attentions(twin) if isinstance(module, CarriedSE)]
        assert len(carried) == (0 if "convnext" in host else HOSTS[host])
        for module in carried:
            assert module.pool.beta.grad != 0
            nn.init.constant_(module.pool.beta, 0.5)
        assert not carried or not torch.allclose(twin(x), expected)
        assert spem.detach(twin) == names
        assert list(twin.state_dict()) == list(state)
        without_drops(network).train()


def without_drops(network: nn.Module) -> nn.Module:
    for module in network.modules():
        if isinstance(module, nn.Dropout) or type(module).__name__ == "StochasticDepth":
            module.p = 0.0
        if hasattr(module, "drop_rate"):
            module.drop_rate = 0.0
    return network


def test_sites_tell_what_is_replaced() -> None:
    network = build("timm:efficientnet_b0")
    site = find_sites(network, "se", replace=True, input_shape=(1, 3, 64, 64))[1]
    assert (site.name, site.how, site.layer) == ("blocks.1.0.se", "replace", "SqueezeExcite")
    assert (site.block, site.stage) == ("InvertedResidual", 2)
    assert (site.channels, site.shape) == (96, (1, 96, 16, 16))


def test_other_pools_half_precision_and_decay() -> None:
    network = scattered(build("torchvision:mobilenet_v3_small")).eval()
    x = images()
    expected = network(x)
    spem.attach(network, "se", replace=True)
    assert "pool" not in " ".join(network.state_dict())
    torch.testing.assert_close(network(x), expected, **TOLERANCE[torch.float32])
    spem.detach(network)
    spem.attach(network, "se(pool=max)", replace=True, start="module")
    assert not torch.allclose(network(x), expected)
    spem.detach(network)
    spem.attach(network.bfloat16(), "se(pool=mix())", replace=True)
    attention = attentions(network)[0]
    stats = spem.ops.plane_stats(torch.rand(1, attention.channels, 3, 3, dtype=torch.bfloat16))
    assert attention.gate_from(stats).dtype == torch.float32
    assert network(x.bfloat16()).dtype == torch.bfloat16
    betas = {id(module.pool.beta) for module in attentions(network)}
    assert len(betas) == len(spem.learned_mixes(network)) == 9
    for group in spem.param_groups(network, 0.1, 1e-4):
        if betas & {id(p) for p in group["params"]}:
            assert group["weight_decay"] == 0


@pytest.mark.parametrize("attention", ["se(reduction=4)", "eca"])
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


@pytest.mark.parametrize("layer", ["eca", "cbam", "ese", "gc", spem.attn_layer("spem")])
def test_other_layers_are_replaced_but_not_what_attach_put_there(layer: object) -> None:
    network = small_timm(channels=(32, 32, 32, 64), block_args={"attn_layer": layer}).eval()
    assert not spem.detach(network)
    sites = find_sites(network, "se", replace=True, input_shape=(1, 3, 64, 64))
    assert [site.channels for site in sites] == [32, 32, 32, 64]
    with pytest.warns(UserWarning, match="do not go over into se"):
        names = spem.attach(network, "se", replace=True, input_shape=(1, 3, 64, 64))
    assert {type(module.inner) for module in attentions(network)} == {spem.SE}
    assert network(images(1)).isfinite().all()
    with pytest.raises(ValueError, match=r"attention at layer1\.0\.se already"):
        spem.attach(network, "se", replace=True)
    assert spem.detach(network) == names


def test_where_names_what_is_replaced() -> None:
    network = small()
    norm = lambda m: getattr(m, "bn2", None)  # noqa: E731
    with pytest.warns(UserWarning, match="do not go over into spem"):
        names = spem.attach(network, "spem", where=norm, replace=True)
    assert names == [f"layer{k}.0.bn2" for k in range(1, 5)]
    assert [type(module.inner) for module in attentions(network)] == [spem.SPEM] * 4
    assert network(images(1)).isfinite().all()
    spem.detach(network)
    assert isinstance(network.get_submodule("layer1.0.bn2"), nn.BatchNorm2d)


def test_a_subclass_with_a_forward_of_its_own_is_not_taken_for_its_base() -> None:
    """Its parts may mean something else, so no outputs could be kept."""

    class Residual(timm.layers.SEModule):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + super().forward(x)

    network = small_timm()
    network.layer1[0].se, network.layer2[0].se = timm.layers.SEModule(64), Residual(128)
    network.layer3[0].se = timm.layers.SEModule(256, add_maxpool=True)
    with pytest.warns(UserWarning, match=r"weights of 2 replaced layers \(layer2.0.se"):
        spem.attach(network, "se", replace=True)
    assert [isinstance(module, CarriedSE) for module in attentions(network)] == [True, False, False]
