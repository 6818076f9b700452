"""Networks in no table: of every rank, size and style, found by following one forward pass."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import pytest
import torch
from insert.hosts import attentions, models, scattered, set_alpha, small
from tolerance import TOLERANCE
from torch import Tensor, nn

import spem
from spem.insert import find_sites

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class Scale(nn.Module):
    """A layer scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma.reshape(-1, *[1] * (x.dim() - 2))


class Residual(nn.Module):
    """x + branch(x), with an activation after the addition or without."""

    def __init__(self, branch: Sequence[nn.Module], act: Callable[[Tensor], Tensor] | None) -> None:
        super().__init__()
        self.branch, self.act = nn.Sequential(*branch), act

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.branch(x)
        return y if self.act is None else self.act(y)


def conv(rank: int, width: int) -> nn.Module:
    return CONVS[rank](width, width, 3, padding=1)


# what ends a branch of two convolutions, and the index of that layer in it
ENDS: dict[str, tuple[Callable[[int, int], list[nn.Module]], int]] = {
    "norm": (lambda r, c: [conv(r, c), NORMS[r](c), nn.ReLU(), conv(r, c), NORMS[r](c)], 4),
    "activation": (lambda r, c: [conv(r, c), nn.SiLU(), conv(r, c), NORMS[r](c), nn.SiLU()], 4),
    "convolution": (lambda r, c: [NORMS[r](c), nn.ReLU(), conv(r, c), nn.ReLU(), conv(r, c)], 4),
    "layer scale": (lambda r, c: [conv(r, c), nn.GELU(), conv(r, c), Scale(c)], 3),
    "group norm, dropout": (
        lambda r, c: [conv(r, c), nn.ReLU(), conv(r, c), nn.GroupNorm(2, c), nn.Dropout(0.1)],
        3,
    ),
    "one convolution": (lambda r, c: [conv(r, c), nn.GELU(), NORMS[r](c)], 2),
}


@pytest.mark.parametrize(
    ("end", "rank", "act"),
    [
        *zip(ENDS, [1, 2, 3] * 2, [None, torch.relu] * 3, strict=True),
        *zip(ENDS, [2, 3, 1] * 2, [torch.relu, None] * 3, strict=True),
    ],
)
def test_what_ends_a_branch_gets_the_attention(
    end: str, rank: int, act: Callable[[Tensor], Tensor] | None
) -> None:
    make, last = ENDS[end]
    stem = CONVS[rank](3, 8, 3, padding=1)
    network = nn.Sequential(stem, *[Residual(make(rank, 8), act) for _ in range(2)])
    scattered(network).eval()
    x = torch.randn(2, 3, *[6] * rank)
    expected = network(x)
    names = spem.attach(network, "spem", input_shape=(1, 3, *[6] * rank))
    assert names == [f"{block}.branch.{last}" for block in (1, 2)]
    torch.testing.assert_close(network(x), expected, **TOLERANCE[torch.float32])
    set_alpha(network, 0.5)
    assert not torch.allclose(network(x), expected)
    assert spem.detach(network) == names
    assert torch.equal(network(x), expected)


class Shared(nn.Module):
    """Blocks that share one activation, as detectors do, or use theirs twice."""

    act = nn.SiLU()

    def __init__(self, channels: int, *, twice: bool) -> None:
        super().__init__()
        self.twice = twice
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.norm = nn.BatchNorm2d(channels)
        self.end = Shared.act

    def forward(self, x: Tensor) -> Tensor:
        z = self.conv1(x)
        z = self.end(z) if self.twice else torch.relu(z)
        return x + self.end(self.norm(self.conv2(z)))


@pytest.mark.parametrize("twice", [False, True])
def test_an_activation_is_a_place_only_where_it_ends_the_branch(twice: bool) -> None:
    layers = [nn.Conv2d(3, 16, 3), Shared(16, twice=twice), nn.Conv2d(16, 8, 3)]
    layers += [Shared(8, twice=twice), Shared(8, twice=twice), nn.Conv2d(8, 4, 3)]
    network = nn.Sequential(*layers, Shared.act).eval()
    last = "norm" if twice else "end"
    shape = (1, 3, 12, 12)
    sites = find_sites(network, input_shape=shape)
    assert [(site.name, site.channels) for site in sites] == [
        (f"1.{last}", 16),
        (f"3.{last}", 8),
        (f"4.{last}", 8),
    ]
    assert spem.attach(network, "eca", input_shape=shape) == [site.name for site in sites]
    ran = dict.fromkeys(attentions(network), 0)
    for module in ran:
        module.register_forward_hook(lambda m, *_: ran.__setitem__(m, ran[m] + 1))
    network(torch.randn(shape))
    assert list(ran.values()) == [1, 1, 1]


class Unit(nn.Module):
    """A convolution with a norm and an activation; a detector folds the norm away."""

    act_of_all = nn.SiLU()

    def __init__(self, inputs: int, outputs: int, *, act: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.act = Unit.act_of_all if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))

    def forward_fuse(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))


class Detector(nn.Module):
    def __init__(self, *, branch: bool, act: bool) -> None:
        super().__init__()
        self.branch = branch
        self.stem, self.down = Unit(3, 16), Unit(16, 8)
        self.cv1, self.cv2 = Unit(8, 12), Unit(12, 8, act=act)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(self.stem(x))
        y = self.cv2(self.cv1(x))
        return x + y if self.branch else y

    def fuse(self) -> None:
        for m in self.modules():
            if isinstance(m, Unit):
                m.conv = nn.utils.fuse_conv_bn_eval(m.conv, m.bn)
                del m.bn
                m.forward = m.forward_fuse


@pytest.mark.parametrize("act", [False, True])
@pytest.mark.parametrize("branch", [False, True])
def test_a_network_that_folds_its_norms_keeps_its_attention(branch: bool, act: bool) -> None:
    network = scattered(Detector(branch=branch, act=act)).eval()
    x = torch.randn(2, 3, 12, 12)
    warned = nullcontext() if branch else pytest.warns(UserWarning, match="no residual branches")
    with warned:
        names = spem.attach(network, "se(reduction=4)", input_shape=(1, 3, 12, 12))
    assert names == ["cv2.act"]
    set_alpha(network, 0.5)
    expected = network(x)
    network.fuse()
    assert len(attentions(network)) == 1
    torch.testing.assert_close(network(x), expected)


class ConvNorm(nn.Sequential):
    """A convolution and its norm that give one layer to put in their place, as timm's do."""

    def fuse(self) -> nn.Module:
        conv, norm = self
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        return nn.utils.fuse_conv_bn_eval(conv, norm)


def test_without_branches_a_layer_that_gives_itself_folded_is_followed_whole() -> None:
    layers = [ConvNorm(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), nn.ReLU(), nn.Conv2d(8, 4, 3)]
    network = scattered(nn.Sequential(*layers)).eval()
    x = torch.randn(2, 3, 12, 12)
    with pytest.warns(UserWarning, match="no residual branches"):
        assert spem.attach(network, "se(reduction=4)", input_shape=(1, 3, 12, 12)) == ["0"]
    set_alpha(network, 0.5)
    expected = network(x)
    for parent in [*network.modules()]:
        for name, child in [*parent.named_children()]:
            if isinstance(child, ConvNorm):
                parent.add_module(name, child.fuse())
    torch.testing.assert_close(network(x), expected)


class Gated(nn.Module):
    """A branch that ends in a gate of linear layers, made as large as the map, and in one of 2D."""

    def __init__(self, *, viewed: bool = False) -> None:
        super().__init__()
        self.conv, self.viewed = nn.Conv2d(8, 8, 3, padding=1), viewed
        self.fc = nn.Linear(8, 8)
        self.spatial = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(torch.relu(x))
        gate = torch.sigmoid(self.fc(y.mean((2, 3))))
        gate = gate.view(*y.shape[:2], 1, 1) if self.viewed else gate.unsqueeze(2).unsqueeze(3)
        y = gate.expand_as(y) * y
        return x + y * torch.sigmoid(self.spatial(y.mean(1, keepdim=True)))


def test_a_gate_made_as_large_as_its_map_hides_no_branch() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), Gated(), Gated(viewed=True)).eval()
    sites = find_sites(network, input_shape=(1, 3, 12, 12))
    assert [(site.name, site.channels) for site in sites] == [("1.conv", 8), ("2.conv", 8)]


class Functional(nn.Module):
    """Everything but the weights is a function, and the branch is in the network's own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(1, 6, 3, padding=1)
        self.a, self.b = nn.Conv1d(6, 6, 3, padding=1), nn.Conv1d(6, 6, 3, padding=1)
        self.skip, self.end = nn.Conv1d(6, 12, 1), nn.Conv1d(6, 12, 3, padding=1)
        self.head = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = x + 0.1 * self.b(torch.relu(self.a(x)))
        y = self.skip(x) + self.end(torch.relu(self.a(x)))
        return self.head(y.mean(-1))


def test_branches_in_a_plain_forward_and_a_guessed_input() -> None:
    """No input_shape is needed: the first convolution has rank and channels."""
    sites = find_sites(Functional(), "spem")
    assert [site.name for site in sites] == ["b", "end"]
    assert sites[0].shape == (1, 6, 1024)
    assert sites[1].channels == 12
    assert "residual branch of 2 convolutions" in sites[0].reason


class Listed(nn.Module):
    """Its layers are in a list, which does not run."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3, 3, 3, padding=1) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        z = self.layers[1](torch.relu(self.layers[0](x)))
        return x + z


def test_layers_in_a_list() -> None:
    network = nn.Sequential(Listed(), Listed())
    names = spem.attach(network, "eca", input_shape=(1, 3, 8, 8))
    assert names == ["0.layers.1", "1.layers.1"]
    assert spem.detach(network) == names


def test_videos() -> None:
    with torch.device("meta"):
        network = models.video.r3d_18()
    names = spem.attach(network, "se")
    assert names == [f"layer{k}.{i}.conv2.1" for k in range(1, 5) for i in range(2)]


def test_without_branches_the_last_norm_of_each_resolution_is_offered() -> None:
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 8), (8, 8), (8, 16)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
        layers += [nn.Conv2d(outputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
        layers += [nn.MaxPool2d(2)]
    network = scattered(nn.Sequential(*layers)).eval()
    x = torch.randn(2, 3, 32, 32)
    expected = network(x)
    sites = find_sites(network, input_shape=(1, 3, 32, 32))
    assert [(s.name, s.reason) for s in sites] == [
        ("4", "last norm at 32 x 32, no residual branches"),
        ("11", "last norm at 16 x 16, no residual branches"),
        ("18", "last norm at 8 x 8, no residual branches"),
    ]
    with pytest.warns(
        UserWarning, match="no residual branches. Attention follows .* 3 resolutions"
    ):
        assert spem.attach(network, "se(reduction=4)") == ["4", "11", "18"]
    assert torch.equal(network(x), expected)


def test_a_dry_run_ranks_what_was_found(caplog: pytest.LogCaptureFixture) -> None:
    one = Residual([conv(2, 8), nn.BatchNorm2d(8)], None)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), one, Residual(ENDS["norm"][0](2, 8), None))
    with caplog.at_level("INFO", logger="spem.insert"):
        names = spem.attach(network, "spem", dry_run=True, input_shape=(1, 3, 12, 12))
    assert names == ["2.branch.4"]
    assert caplog.messages == [
        "rank 1, taken: 2.branch.4, ends a residual branch of 2 convolutions",
        "rank 2, not taken: 1.branch.1, ends a residual branch of 1 convolution",
        "rank 3, not taken: 2.branch.4, last norm at 10 x 10, no residual branches",
    ]


class Bare(nn.Module):
    """A block without norm and addition."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x))


def test_a_refusal_says_what_was_seen_and_shows_a_rule_that_works() -> None:
    network = nn.Sequential(Bare(3, 8), Bare(8, 16), Bare(16, 16), nn.Flatten()).eval()
    x = torch.randn(1, 3, 9, 9)
    expected = network(x)
    with pytest.raises(ValueError, match="no site found in Sequential") as caught:
        spem.attach(network, "spem", input_shape=(1, 3, 9, 9))
    said = str(caught.value)
    assert "3 convolutions, no addition joins a branch with what it came from, no norm" in said
    line = re.search(r"where=(lambda m: .*? else None)", said)
    assert line is not None
    rule = eval(line[1])  # the line of the message is what is tested
    assert spem.attach(network, "spem", where=rule, input_shape=(1, 3, 9, 9)) == [
        f"{i}.conv" for i in range(3)
    ]
    assert torch.equal(network(x), expected)


class Tokens(nn.Module):
    """Maps whose channels are the last axis: attention of planes has no place there."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.local = nn.Conv2d(3, 8, 4, stride=4), nn.Conv2d(8, 8, 3, padding=1)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).permute(0, 2, 3, 1)
        local = self.local(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.down(torch.relu(self.up(local)))


def test_maps_with_their_channels_last_are_refused() -> None:
    with pytest.raises(ValueError, match="none joins a branch of convolutions"):
        spem.attach(Tokens(), "spem", input_shape=(1, 3, 16, 16))


class Twice(nn.Module):
    """Holds the layers of a backbone a second time, and runs only these."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = models.vgg11_bn(num_classes=3)
        self.stages = nn.ModuleList([self.backbone.features[:8], self.backbone.features[8:]])

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return x


def test_layers_that_are_held_twice_are_wrapped_under_every_parent() -> None:
    network = scattered(Twice()).eval()
    modules = [dict(part.named_children()) for part in network.modules()]
    x = torch.randn(1, 3, 32, 32)
    expected = network(x)
    names = spem.attach(network, "eca", input_shape=(1, 3, 32, 32))
    assert len(names) == len(attentions(network)) == 5
    set_alpha(network, 0.5)
    assert not torch.allclose(network(x), expected)
    assert spem.detach(network) == names
    assert [dict(part.named_children()) for part in network.modules()] == modules
    assert torch.equal(network(x), expected)


class Unused(nn.Module):
    """A network whose second backbone never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.runs, self.idle = small(), small()

    def forward(self, x: Tensor) -> Tensor:
        return self.runs(x)


def test_a_site_that_does_not_run_is_refused() -> None:
    network = Unused()
    modules = dict(network.named_modules())
    with pytest.raises(ValueError, match=r"4 of 8 sites do not run .* idle.layer1.0.bn2 first"):
        spem.attach(network, "spem", input_shape=(1, 3, 32, 32))
    assert dict(network.named_modules()) == modules
    assert network.training
    assert len(spem.attach(network, "spem", include="runs.*")) == 4


def test_following_leaves_hooks_modes_and_statistics_alone() -> None:
    make, _ = ENDS["norm"]
    network = nn.Sequential(nn.Conv2d(3, 8, 3), Residual(make(2, 8), torch.relu)).train()
    network[1].branch[1].eval()
    state = copy.deepcopy(network.state_dict())
    modes = [module.training for module in network.modules()]
    assert len(spem.attach(network, "spem", dry_run=True, input_shape=(1, 3, 9, 9))) == 1
    assert modes == [module.training for module in network.modules()]
    assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())
    assert not any(module._forward_hooks for module in network.modules())
