"""What attach does to a network, and what stays as it was."""

from __future__ import annotations

import copy
from typing import cast

import pytest
import torch
from insert.hosts import attentions, images, scattered, small, timm
from tolerance import TOLERANCE
from torch import Tensor, nn

import spem
from spem.insert import AfterNorm, IdentityStart, find_sites
from spem.insert.attach import remembered
from spem.insert.sites import default_input

NAMES = [f"layer{k}.0.bn2" for k in range(1, 5)]


def test_a_dry_run_changes_nothing_and_lists_maps_and_costs() -> None:
    network = small().train()
    modules, state = dict(network.named_modules()), copy.deepcopy(network.state_dict())
    dry = spem.attach(network, "se(reduction=8)", dry_run=True)
    sites = find_sites(network, "se(reduction=8)", input_shape=(2, 3, 64, 48))
    assert dict(network.named_modules()) == modules
    assert network.training
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert dry == [site.name for site in sites] == NAMES
    third = sites[2]
    assert (third.block, third.how, third.layer) == ("BasicBlock", "after", "BatchNorm2d")
    assert (third.stage, third.channels, third.shape) == (3, 256, (2, 256, 4, 3))
    assert third.parameters == 2 * 256 * 32 + 32 + 256
    assert third.flops == 2 * 2 * 2 * 256 * 32  # 2 images, 2 layers, 2 a multiply-add
    assert spem.attach(network, "se(reduction=8)") == dry


def test_sites_without_an_attention_and_with_the_hosts_own_input() -> None:
    network = timm.create_model("test_resnet", num_classes=3)
    site = find_sites(network)[0]
    assert site.parameters is None
    assert site.shape is not None
    assert site.shape[2] == network.pretrained_cfg["input_size"][1] // 4


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"stages": (3, 4)}, NAMES[2:]),
        ({"stages": 2}, NAMES[1:2]),
        ({"include": "layer[12].*"}, NAMES[:2]),
        ({"include": ["*1.0.bn2", "layer4*"]}, [NAMES[0], NAMES[3]]),
        ({"include": "*", "stages": [1]}, NAMES[:1]),
    ],
)
def test_choice_by_name_and_stage(choice: dict[str, object], expected: list[str]) -> None:
    network = small()
    assert spem.attach(network, "spem", **choice) == expected
    assert len(attentions(network)) == len(expected)
    # What was left out can be filled with something else.
    rest = [name for name in NAMES if name not in expected]
    assert spem.attach(network, "se", include=rest) == rest
    assert spem.detach(network) == NAMES


def test_a_compiled_network_has_the_names_of_the_one_that_it_was_compiled_from() -> None:
    network = small()
    compiled = cast("nn.Module", torch.compile(network, backend="eager"))
    assert [site.name for site in spem.find_sites(compiled)] == NAMES
    assert spem.attach(compiled, "spem", include="layer4*") == ["layer4.0.bn2"]
    assert [part for part, _ in remembered(network)] == [""]
    assert spem.detach(compiled) == ["layer4.0.bn2"]


def test_stages_are_those_of_the_network_inside_others() -> None:
    network = nn.Sequential(nn.Identity(), nn.Sequential(nn.Identity(), small()))
    assert spem.attach(network, "spem", stages=4) == ["1.1.layer4.0.bn2"]


def test_devices_and_dtypes_are_those_of_the_norm() -> None:
    network = small().eval().requires_grad_(False)
    network.layer4.double()
    spem.attach(network, "se")
    for name, dtype in (("layer1.0", torch.float32), ("layer4.0", torch.float64)):
        parameters = list(network.get_submodule(name).bn2.attention.parameters())
        assert {p.dtype for p in parameters} == {dtype}
        assert all(p.requires_grad for p in parameters)
    with torch.device("meta"):
        away = small()
    spem.attach(away, "se")
    assert all(p.device.type == "meta" for p in away.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_half_precision_keeps_the_outputs(dtype: torch.dtype) -> None:
    network = scattered(small()).to(dtype).eval()
    x = images(1, 32, dtype)
    expected = network(x)
    spem.attach(network, "spem")
    assert network(x).dtype == dtype
    torch.testing.assert_close(network(x), expected, **TOLERANCE[dtype])


def test_weights_load_before_and_after_and_missing_keys_are_named() -> None:
    source = scattered(small()).eval()
    x = images(1, 32)
    before, after = small().eval(), copy.deepcopy(small()).eval()
    before.load_state_dict(source.state_dict())
    spem.attach(before, "spem")
    spem.attach(after, "spem")
    after.load_state_dict(source.state_dict(), strict=False)
    assert torch.equal(before(x), source(x))
    assert torch.equal(after(x), source(x))
    state = after.state_dict()
    del state["layer1.0.bn2.norm.weight"]
    state["layer1.0.bn2.norm.surplus"] = torch.zeros(1)
    found = after.load_state_dict(state, strict=False)
    assert found.missing_keys == ["layer1.0.bn2.norm.weight"]
    assert found.unexpected_keys == ["layer1.0.bn2.norm.surplus"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"layer1.0.bn2.norm.weight"'):
        after.load_state_dict(state)
    # And after detach the plain network's have the plain keys.
    spem.detach(after)
    assert list(after.state_dict()) == list(source.state_dict())


def test_a_taken_slot_keeps_its_layer_and_ours_follows() -> None:
    network = timm.create_model("resnet18", num_classes=3, block_args={"attn_layer": "se"}).eval()
    block = network.get_submodule("layer1.0")
    theirs = block.se
    assert find_sites(network)[0].layer == "SEModule"
    assert spem.attach(network, "spem")[0] == "layer1.0.se"
    assert block.se.norm is theirs
    assert isinstance(block.se.attention, IdentityStart)
    spem.detach(network)
    assert block.se is theirs


def test_a_failure_leaves_the_network_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    network = small()
    modules, keys = dict(network.named_modules()), list(network.state_dict())
    with pytest.raises(ValueError, match=r"attach: layer1.0.bn2: SE: reduction=100"):
        spem.attach(network, "se(reduction=100)")  # fits 128 channels, not 64
    assert dict(network.named_modules()) == modules
    left = iter(range(3))

    def breaks(self: AfterNorm, *args: object) -> None:
        if next(left) == 2:
            raise RuntimeError("the third")
        original(self, *args)

    original = AfterNorm.__init__
    monkeypatch.setattr(AfterNorm, "__init__", breaks)
    with pytest.raises(RuntimeError, match="the third"):
        spem.attach(network, "spem")
    assert dict(network.named_modules()) == modules
    assert list(network.state_dict()) == keys


def test_our_own_networks() -> None:
    network = spem.resnet(20, block="basic").eval()
    plain = sum(p.numel() for p in network.parameters())
    x = images(1, 32)
    expected = network(x)
    names = spem.attach(network, "spem")
    assert len(names) == 9
    assert names[0] == "layer1.0.attention"
    torch.testing.assert_close(network(x), expected, **TOLERANCE[torch.float32])
    cost = spem.cost.count(network, (1, 3, 32, 32))
    assert [tail.attention for tail in cost.tails] == ["spem"] * 9
    added = 3 * sum(4 * c + 2 + 1 for c in (16, 32, 64))  # alpha is one more
    assert cost.attention_parameters == added
    assert cost.parameters == plain + added
    assert spem.detach(network) == names


class Mine(nn.Module):
    """A residual block as people write it: with a shortcut that ends in a norm as well."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        conv = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(outputs))
        layers = [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
        layers += [nn.Conv2d(outputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs)]
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def test_a_network_of_no_known_family() -> None:
    """The additions of a forward pass are followed, or where= says it; a shortcut is not a site."""
    network = nn.Sequential(*(Mine(*size) for size in ((3, 8), (8, 8), (8, 12))))
    scattered(network).eval()
    x = images(1, 16)
    expected = network(x)
    names = ["0.body.4", "1.body.4", "2.body.4"]
    last = lambda m: m.body[4] if isinstance(m, Mine) else None  # noqa: E731
    # A module that has no number of channels is traced.
    whole = lambda m: m if isinstance(m, Mine) else None  # noqa: E731
    for where, sites in ((None, names), (last, names), (whole, ["0", "1", "2"])):
        found = spem.attach(network, "spem", where=where, input_shape=(1, 3, 16, 16))
        assert found == sites
        assert [module.channels for module in attentions(network)] == [8, 8, 12]
        assert torch.equal(network(x), expected)
        assert spem.detach(network) == sites


def test_modules_that_must_know_the_size_of_their_maps() -> None:
    network = small().eval()
    expected = network(images(1, 64))
    spem.attach(network, "fca", input_shape=(1, 3, 64, 64), stages=(1, 2))
    assert torch.equal(network(images(1, 64)), expected)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_input_has_the_channels_that_a_network_of_timm_was_built_for(channels: int) -> None:
    for name in ("test_resnet", "test_convnext"):
        network = timm.create_model(name, in_chans=channels)
        assert find_sites(network)[0].shape is not None, name
        assert default_input(network)[1] == channels
    network = timm.create_model("test_resnet")
    network.conv1[0] = nn.Conv2d(channels, network.conv1[0].out_channels, 3)
    assert default_input(network)[1] == channels
    patches = timm.create_model("tresnet_m", num_classes=3)  # its first convolution takes 48
    assert default_input(patches) == (1, 3, 224, 224)
