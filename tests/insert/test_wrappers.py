"""The wrapper answers for nothing but itself: no tool takes a layer's numbers and drops attention.

A plain wrapper of torch's own kind is the measure: what a tool does to that, it may do to ours.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from insert.hosts import attentions, build, images, models, scattered, set_alpha, timm
from tolerance import TOLERANCE
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.fusion import fuse_conv_bn_eval

import spem
from spem.insert import AfterNorm, true_keys
from spem.insert.start import CarriedSE
from spem.insert.wrap import BeforeModule


class Conv(nn.Module):
    """A layer as detectors write it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = Conv(width, width), Conv(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cv2(self.cv1(x))


def detector(end: str) -> nn.Module:
    network = nn.Sequential(Conv(3, 8), Block(8), Block(8)).eval()
    where = lambda m: m.cv2.get_submodule(end) if isinstance(m, Block) else None  # noqa: E731
    spem.attach(network, "se(reduction=2)", where=where)
    return working(network)


def working(network: nn.Module) -> nn.Module:
    """Everything at random and attention at work."""
    set_alpha(scattered(network), 0.8)
    return network


def test_reading_the_layers_attributes_names_where_they_are() -> None:
    norm, se = nn.BatchNorm2d(8), timm.layers.SEModule(8, rd_channels=2)
    for module, name, words in (
        (AfterNorm(norm, spem.SE(8, reduction=2), "bn2"), "weight", "attention after it"),
        (BeforeModule(norm, spem.SE(8, reduction=2), "drop"), "weight", "attention before it"),
        (CarriedSE(se, "avg", channels=8, exact=True, place="se"), "fc1", "took over its weights"),
    ):
        use = rf"{words}.*Use {module._place}\.{module.inner}\.{name}"
        with pytest.raises(AttributeError, match=use):
            getattr(module, name)
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            _ = module.nothing
        assert not hasattr(module, "running_mean")
        assert not isinstance(module, nn.BatchNorm2d)


def test_what_is_written_reaches_the_layer() -> None:
    wrapper = detector("bn")[1].cv2.bn
    norm, attention = wrapper.norm, wrapper.attention
    wrapper.momentum, wrapper.eps = 0.5, 0.1
    assert (norm.momentum, norm.eps) == (0.5, 0.1)
    wrapper.weight = nn.Parameter(torch.full((8,), 7.0))
    assert torch.equal(wrapper.state_dict()["norm.weight"], torch.full((8,), 7.0))
    wrapper.norm, wrapper.mark = nn.GroupNorm(2, 8), 3
    assert isinstance(wrapper.norm, nn.GroupNorm)
    assert wrapper.attention is attention
    assert wrapper.mark == 3


@pytest.mark.parametrize("end", ["bn", "act"])
def test_folders_of_norms_keep_the_attention_or_stop(end: str) -> None:
    network = detector(end)
    x = images(2, 16)
    expected = network(x)
    count = len(attentions(network))

    def fold() -> None:  # as detectors' fuse()
        for module in network.modules():
            if isinstance(module, Conv) and hasattr(module, "bn"):
                module.conv = fuse_conv_bn_eval(module.conv, module.bn)
                module.bn = nn.Identity()

    if end == "bn":
        with pytest.raises(AttributeError, match=r"Use bn\.norm\."):
            fold()
    else:
        fold()
    assert len(attentions(network)) == count
    torch.testing.assert_close(network(x), expected, **TOLERANCE[torch.float32])


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("timm:levit_conv_128s", 224),
        pytest.param("timm:efficientvit_m0", 224, marks=pytest.mark.slow),
        pytest.param("timm:repvit_m0_9", 64, marks=pytest.mark.slow),
        ("timm:repvgg_a0", 64),
    ],
)
def test_what_folds_itself_keeps_the_attention(name: str, size: int) -> None:
    """timm puts what fuse() gives in the place of a layer, attention inside it or not."""
    from timm.utils.model import reparameterize_model

    network = build(name)
    x = images(1, size)
    spem.attach(network, "spem", input_shape=(1, 3, size, size))
    working(network).eval()
    with torch.no_grad():
        expected = network(x)
        folded = reparameterize_model(network)
        y = folded(x)
    assert len(attentions(folded)) == len(attentions(network)) > 9
    assert (y - expected).abs().max() <= 1e-4 * expected.abs().max()


PARAMETRISED: dict[str, Callable[[nn.Module], object]] = {
    "spectral norm": parametrizations.spectral_norm,
    "weight norm": parametrizations.weight_norm,
    "pruning": lambda conv: prune.l1_unstructured(conv, "weight", 0.5),
    "fx": lambda conv: None,
}


@pytest.mark.parametrize(
    ("kind", "fuse"), [*((kind, False) for kind in PARAMETRISED), ("weight norm", True)]
)
def test_copies_of_parametrised_layers_keep_the_attention(kind: str, fuse: bool) -> None:
    """Such layers have special methods of their own, which a wrapper must not hand on."""
    network = models.resnet18(num_classes=5)
    last = network.layer4[1]
    last.bn2 = torch.fx.symbolic_trace(nn.Sequential(last.bn2)) if kind == "fx" else last.bn2
    where = None if fuse else lambda m: getattr(m, "bn2", None)
    spem.attach(network, "spem", where=where, fuse=fuse, input_shape=(1, 3, 32, 32))
    working(network).eval()
    for module in list(network.modules()):
        if isinstance(module, nn.Conv2d):
            PARAMETRISED[kind](module)
        elif isinstance(module, nn.BatchNorm2d) and kind == "weight norm":
            parametrizations.weight_norm(module, dim=None)
    x = images(2, 32)
    with torch.no_grad():
        expected = network.eval()(x)
        other = copy.deepcopy(network)
        assert len(attentions(other)) == 8
        assert torch.equal(other(x), expected)


class Host(nn.Module):
    """Reads the parts of its part, and has names that a wrapper has too."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Module()
        self.branch.out_channels = width
        self.branch.conv = nn.Conv2d(width, width, 3, padding=1)
        self.branch.norm = nn.BatchNorm2d(width)
        self.branch.attention = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch.attention(self.branch.norm(self.branch.conv(x)))


def test_a_host_that_calls_the_parts_of_a_layer_gets_attention_after_the_last() -> None:
    network = scattered(nn.Sequential(Host(8), Host(8))).eval()
    x = torch.randn(2, 8, 6, 6)
    expected = network(x)
    where = lambda m: m.branch if isinstance(m, Host) else None  # noqa: E731
    names = spem.attach(network, "se(reduction=2)", where=where, input_shape=(1, 8, 6, 6))
    assert names == ["0.branch.attention", "1.branch.attention"]
    assert torch.equal(network(x), expected)
    working(network)
    assert not torch.allclose(network(x), expected)
    assert spem.detach(network) == names


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_the_parts_of_a_transition_stay_the_hosts(library: str) -> None:
    with torch.device("meta"):
        network = build(f"{library}:densenet121")
    part = network.features.transition1
    parts = dict(part.named_children())
    spem.attach(network, "se")
    assert network.features.transition1 is part
    changed = {name for name, child in part.named_children() if child is not parts[name]}
    assert changed == {"pool"}


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_every_tensor_has_one_true_name(library: str) -> None:
    network = build(f"{library}:resnet18")
    spem.attach(network, "se(pool=mix())")
    names = [name for name, _ in (*network.named_parameters(), *network.named_buffers())]
    assert sorted(names) == sorted(network.state_dict())
    for name in names:
        assert network.state_dict()[name].data_ptr() == _tensor(network, name).data_ptr()
    groups = spem.param_groups(network, 0.1, 1e-4)
    counted = [id(p) for group in groups for p in group["params"]]
    assert len(counted) == len(set(counted)) == len(list(network.parameters()))


def _tensor(network: nn.Module, name: str) -> Tensor:
    above, _, last = name.rpartition(".")
    return getattr(network.get_submodule(above), last)


def test_plain_weights_load_where_the_layer_has_the_wrappers_names() -> None:
    """The layer's own children are called norm and attention, as the wrapper's."""

    class Branch(nn.Sequential):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(4)
            self.attention = nn.Conv2d(4, 4, 1)

    plain = nn.Sequential(nn.Conv2d(3, 4, 3), Branch(), nn.ReLU())
    state = {key: torch.randn_like(value.float()) for key, value in plain.state_dict().items()}
    where = lambda m: m if isinstance(m, Branch) else None  # noqa: E731
    spem.attach(plain, "se(reduction=2)", where=where, input_shape=(1, 3, 8, 8))
    found = plain.load_state_dict(state, strict=False)
    assert found.unexpected_keys == []
    assert all(key.startswith("1.attention.") for key in found.missing_keys)
    assert torch.equal(plain[1].norm.norm.weight, state["1.norm.weight"])
    assert torch.equal(plain[1].norm.attention.weight, state["1.attention.weight"])
    written = plain.state_dict()
    assert sorted(true_keys(plain, written)) == sorted(written)
    plain.load_state_dict(written)
    layer, plain[1].attention = plain[1].norm, spem.ECA(4)  # what is written is the wrapper's
    assert isinstance(layer.attention, nn.Conv2d)


# network, and the names of wrappers in its keys
@pytest.mark.parametrize(
    ("name", "longer", "plain"),
    [
        ("torchvision:resnet18", ".norm.", "."),
        ("torchvision:densenet121", "norm5.norm.", "norm5."),
        ("timm:convnext_atto", "none", "none"),
    ],
)
def test_keys_without_the_names_of_wrappers_are_found(name: str, longer: str, plain: str) -> None:
    network, other = build(name), build(name)
    spem.attach(network, "spem")
    spem.attach(other, "spem")
    state = scattered(network).state_dict()
    written = {key.replace(longer, plain): value.clone() for key, value in state.items()}
    assert len(written) == len(state)
    mapped = true_keys(other, written)
    assert sorted(mapped) == sorted(state)
    other.load_state_dict(mapped)
    for key, value in other.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_sorting_walks_find_every_parameter_once_and_the_norm_as_a_norm() -> None:
    network = models.resnet18().eval()
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in network.modules())
    spem.attach(network, "eca", fuse=True)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in network.modules()) == norms
    assert sum(isinstance(m, AfterNorm) for m in network.modules()) == 8
    taken = [p for m in network.modules() for p in m.parameters(recurse=False)]
    assert len(taken) == len({id(p) for p in taken}) == len(list(network.parameters()))
    # A walk that replaces by name finds what it replaces.
    network.set_submodule("layer1.0.bn2.norm", nn.GroupNorm(8, 64))
    assert isinstance(network.layer1[0].bn2.norm, nn.GroupNorm)
    assert network(images(1, 32)).isfinite().all()


def test_low_rank_adapters_around_a_wrapped_layer_and_in_the_attention() -> None:
    class Adapted(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer, self.gain = layer, nn.Parameter(torch.tensor(1.5))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * self.gain

    network = timm.create_model("resnet18", num_classes=3).eval()
    spem.attach(network, "se", fuse=True)
    working(network)
    x = images(1, 64)
    before = network(x)
    slot = network.layer1[0].se.inner
    slot.fc1 = Adapted(slot.fc1)
    network.layer1[0].conv2 = Adapted(network.layer1[0].conv2)
    after = network(x)
    assert not torch.allclose(before, after)
    after.sum().backward()
    assert slot.fc1.gain.grad not in (None, 0)
    assert network.layer1[0].conv2.gain.grad not in (None, 0)
