"""What attach does to a network, and what stays as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from insert.hosts import attentions, build, images, models, scattered, timm
from tolerance import TOLERANCE
from torch import Tensor, nn

import spem
from spem.insert import AfterNorm, IdentityStart, find_sites

TRACES_TAILS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)
PRECISIONS = [torch.float64, torch.float16, torch.bfloat16]


def small(norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Module:
    """torchvision's ResNet with one basic block a stage."""
    return models.resnet.ResNet(
        models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5, norm_layer=norm
    )


def test_resnet50_has_sixteen_sites() -> None:
    with torch.device("meta"):
        network = build("torchvision:resnet50")
    names = spem.attach(network, "spem")
    stages = [3, 4, 6, 3]
    expected = [f"layer{k + 1}.{i}.bn3" for k, n in enumerate(stages) for i in range(n)]
    assert names == expected


def test_a_dry_run_changes_nothing_and_lists_maps_and_costs() -> None:
    network = small().train()
    modules = dict(network.named_modules())
    state = copy.deepcopy(network.state_dict())
    dry = spem.attach(network, "se(reduction=8)", dry_run=True)
    sites = find_sites(network, "se(reduction=8)", input_shape=(2, 3, 64, 48))
    assert dict(network.named_modules()) == modules
    assert network.training
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert dry == [site.name for site in sites] == [f"layer{k}.0.bn2" for k in range(1, 5)]
    third = sites[2]
    assert (third.block, third.how, third.layer) == ("BasicBlock", "after", "BatchNorm2d")
    assert (third.stage, third.channels, third.shape) == (3, 256, (2, 256, 4, 3))
    assert third.parameters == 2 * 256 * 32 + 32 + 256
    assert third.flops == 2 * 2 * 2 * 256 * 32  # 2 images, 2 layers, 2 a multiply-add
    assert spem.attach(network, "se(reduction=8)") == dry


def test_sites_without_an_attention_and_with_the_hosts_own_input() -> None:
    network = timm.create_model("test_resnet", num_classes=3)
    height = network.pretrained_cfg["input_size"][1]
    sites = find_sites(network)
    assert sites[0].parameters is None
    assert sites[0].shape is not None
    assert sites[0].shape[2] == height // 4


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"stages": (3, 4)}, ["layer3.0.bn2", "layer4.0.bn2"]),
        ({"stages": 2}, ["layer2.0.bn2"]),
        ({"include": "layer[12].*"}, ["layer1.0.bn2", "layer2.0.bn2"]),
        ({"include": ["*1.0.bn2", "layer4*"]}, ["layer1.0.bn2", "layer4.0.bn2"]),
        ({"include": "*", "stages": [1]}, ["layer1.0.bn2"]),
    ],
)
def test_choice_by_name_and_stage(choice: dict[str, object], expected: list[str]) -> None:
    network = small()
    assert spem.attach(network, "spem", **choice) == expected
    assert len(attentions(network)) == len(expected)
    # What was left out can be filled with something else.
    rest = [f"layer{k}.0.bn2" for k in range(1, 5) if f"layer{k}.0.bn2" not in expected]
    assert spem.attach(network, "se", include=rest) == rest
    assert spem.detach(network) == [f"layer{k}.0.bn2" for k in range(1, 5)]


def test_stages_are_those_of_the_network_inside_others() -> None:
    network = nn.Sequential(nn.Identity(), nn.Sequential(nn.Identity(), small()))
    assert spem.attach(network, "spem", stages=4) == ["1.1.layer4.0.bn2"]


def test_modes_devices_and_dtypes_are_those_of_the_norm() -> None:
    network = small().eval()
    network.layer4.double().train()
    spem.attach(network, "se")
    first, last = (
        network.get_submodule("layer1.0").bn2.attention,
        network.get_submodule("layer4.0").bn2.attention,
    )
    assert not first.training
    assert last.training
    assert {p.dtype for p in first.parameters()} == {torch.float32}
    assert {p.dtype for p in last.parameters()} == {torch.float64}
    network.requires_grad_(False)
    spem.detach(network)
    spem.attach(network, "se")
    assert all(
        p.requires_grad for p in network.get_submodule("layer1.0").bn2.attention.parameters()
    )
    with torch.device("meta"):
        away = small()
    spem.attach(away, "se")
    assert all(p.device.type == "meta" for p in away.parameters())


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_half_precision_keeps_the_outputs(dtype: torch.dtype) -> None:
    network = scattered(small()).to(dtype).eval()
    x = images(1, 32, dtype)
    expected = network(x)
    spem.attach(network, "spem")
    y = network(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, expected, **TOLERANCE[dtype])


def test_a_copy_loads_and_names_missing_keys() -> None:
    network = copy.deepcopy(small())
    spem.attach(network, "spem")
    state = network.state_dict()
    del state["layer1.0.bn2.norm.weight"]
    state["layer1.0.bn2.norm.surplus"] = torch.zeros(1)
    found = network.load_state_dict(state, strict=False)
    assert found.missing_keys == ["layer1.0.bn2.norm.weight"]
    assert found.unexpected_keys == ["layer1.0.bn2.norm.surplus"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"layer1.0.bn2.norm.weight"'):
        network.load_state_dict(state)


def test_weights_load_before_and_after() -> None:
    source = scattered(small()).eval()
    x = images(1, 32)
    before, after = small().eval(), small().eval()
    before.load_state_dict(source.state_dict())
    spem.attach(before, "spem")
    spem.attach(after, "spem")
    after.load_state_dict(source.state_dict(), strict=False)
    assert torch.equal(before(x), source(x))
    assert torch.equal(after(x), source(x))
    # And after detach the plain network's stand under the plain keys.
    spem.detach(after)
    assert list(after.state_dict()) == list(source.state_dict())


def test_a_taken_slot_keeps_its_layer_and_ours_follows() -> None:
    network = timm.create_model("resnet18", num_classes=3, block_args={"attn_layer": "se"}).eval()
    theirs = network.get_submodule("layer1.0").se
    names = spem.attach(network, "spem")
    assert names[0] == "layer1.0.se"
    assert network.get_submodule("layer1.0").se.norm is theirs
    assert isinstance(network.get_submodule("layer1.0").se.attention, IdentityStart)
    site = find_sites(timm.create_model("resnet18", block_args={"attn_layer": "se"}))[0]
    assert site.layer == "SEModule"
    spem.detach(network)
    assert network.get_submodule("layer1.0").se is theirs


def test_a_failure_leaves_the_network_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    network = small()
    modules, keys = dict(network.named_modules()), list(network.state_dict())
    with pytest.raises(ValueError, match=r"attach: layer1.0.bn2: SE: reduction=100"):
        spem.attach(network, "se(reduction=100)")  # fits 128 channels, not 64
    assert dict(network.named_modules()) == modules
    count = 0

    def breaks(self: AfterNorm, norm: nn.Module, attention: nn.Module, place: str) -> None:
        nonlocal count
        count += 1
        if count == 3:
            raise RuntimeError("the third")
        original(self, norm, attention, place)

    original = AfterNorm.__init__
    monkeypatch.setattr(AfterNorm, "__init__", breaks)
    with pytest.raises(RuntimeError, match="the third"):
        spem.attach(network, "spem")
    assert dict(network.named_modules()) == modules
    assert list(network.state_dict()) == keys


def test_our_own_networks() -> None:
    network = spem.resnet(20, block="basic").eval()
    x = images(1, 32)
    expected = network(x)
    names = spem.attach(network, "spem")
    assert len(names) == 9
    assert names[0] == "layer1.0.attention"
    torch.testing.assert_close(network(x), expected, **TOLERANCE[torch.float32])
    assert [tail.attention for tail in spem.cost.block_tails(network)] == ["spem"] * 9
    assert spem.detach(network) == names


class Mine(nn.Module):
    """A residual block as people write it: with a shortcut that ends in a norm as well."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.shortcut = nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        )
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=1),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


class PreActivation(Mine):
    """Norms before the convolutions: one of these ends the branch."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.body = nn.Sequential(nn.BatchNorm2d(inputs), *list(self.body)[:-1])


def mine(block: type[Mine]) -> nn.Module:
    return nn.Sequential(
        block(3, 8), block(8, 8), block(8, 12), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


def test_a_network_of_no_known_family() -> None:
    """The additions of a forward pass are followed; the shortcut's norm is no site."""
    network = scattered(mine(Mine)).eval()
    x = images(1, 16)
    expected = network(x)
    names = spem.attach(network, "spem", input_shape=(1, 3, 16, 16))
    assert names == ["0.body.4", "1.body.4", "2.body.4"]
    assert torch.equal(network(x), expected)
    other = mine(PreActivation)
    assert spem.attach(other, "spem", input_shape=(1, 3, 16, 16)) == names
    assert isinstance(other[0].body[4].norm, nn.Conv2d)


def test_where_names_the_norm_to_follow() -> None:
    network = scattered(mine(PreActivation)).eval()
    x = images(1, 16)
    expected = network(x)

    def last_conv(module: nn.Module) -> nn.Module | None:
        return module.body[4] if isinstance(module, PreActivation) else None

    assert spem.attach(network, "spem", where=last_conv) == ["0.body.4", "1.body.4", "2.body.4"]
    assert torch.equal(network(x), expected)
    assert len(spem.detach(network)) == 3
    # A module that has no number of channels is traced.
    whole = lambda module: module if isinstance(module, Mine) else None  # noqa: E731
    assert spem.attach(network, "spem", where=whole, input_shape=(1, 3, 16, 16)) == ["0", "1", "2"]
    assert [module.channels for module in attentions(network)] == [8, 8, 12]
    assert torch.equal(network(x), expected)


def test_modules_that_must_know_the_size_of_their_maps() -> None:
    network = small().eval()
    expected = network(images(1, 64))
    spem.attach(network, "fca", input_shape=(1, 3, 64, 64), stages=(1, 2))
    assert torch.equal(network(images(1, 64)), expected)


def test_costs_are_counted_with_attention() -> None:
    network = small()
    plain = sum(p.numel() for p in network.parameters())
    spem.attach(network, "spem")
    cost = spem.cost.count(network, (1, 3, 32, 32))
    added = sum(4 * c + 2 + 1 for c in (64, 128, 256, 512))  # alpha is one more
    assert cost.attention_parameters == added
    assert cost.parameters == plain + added
