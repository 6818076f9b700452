"""Folding: gates become constants in the norms; the network is the plain one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from insert.hosts import (
    attentions,
    build,
    draw_inner,
    images,
    models,
    scattered,
    set_alpha,
    small,
    small_timm,
    timm,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import spem
from spem.insert import FoldReport, fold

HOSTS: dict[str, Callable[[], nn.Module]] = {
    "torchvision, norms wrapped": small,
    "timm, free slots": lambda: small_timm(channels=(32, 32, 32, 64)),
    "timm, layer scale": lambda: timm.create_model("test_convnext", num_classes=5),
    "vgg, convolutions": lambda: nn.Sequential(
        models.vgg11(num_classes=5).features, nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ),
}


def attached(host: str, attention: str, **options: object) -> tuple[nn.Module, nn.Module]:
    """A network at random with attention at work, and the plain one."""
    plain = scattered(HOSTS[host]()).double().eval()
    network = copy.deepcopy(plain)
    where = None
    if host.startswith("vgg"):
        convs = [m for m in network.modules() if isinstance(m, nn.Conv2d)][1:4]
        where = lambda module: module if any(module is c for c in convs) else None  # noqa: E731
    spem.attach(network, attention, where=where, input_shape=(1, 3, 64, 64), **options)
    set_alpha(network, 0.6)
    draw_inner(network, 0.4)
    return network, plain


def mean_gates(network: nn.Module, batches: list[Tensor]) -> list[Tensor]:
    """The mean of every gate by hand: output over input of each attention."""
    found: dict[nn.Module, list[Tensor]] = {module: [] for module in attentions(network)}
    handles = [
        module.register_forward_hook(
            lambda m, inputs, y: found[m].append((y / inputs[0]).nanmedian(-1)[0].nanmedian(-1)[0])
        )
        for module in found
    ]
    with torch.no_grad():
        for x in batches:
            network(x)
    for handle in handles:
        handle.remove()
    return [torch.cat(values).mean(0) for values in found.values()]


@pytest.mark.parametrize(
    ("host", "attention"), [*zip(HOSTS, ["spem", "se(reduction=4)"] * 2, strict=True)]
)
def test_the_folded_network_is_the_plain_one_with_constant_gates(host: str, attention: str) -> None:
    network, plain = attached(host, attention)
    batches = [images(3, 64, torch.float64), images(2, 64, torch.float64) * 1.5]
    constants = mean_gates(network, batches)
    held = copy.deepcopy(network)
    for module, constant in zip(attentions(held), constants, strict=True):
        module.forward = lambda z, v=constant: z * v[:, None, None]
    report = fold(network, batches)
    assert not attentions(network)
    assert not network.training
    # The modules and names are those of the plain network, and so are the operations.
    assert [(n, type(m)) for n, m in network.named_modules()] == [
        (n, type(m)) for n, m in plain.named_modules()
    ]
    assert list(network.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        for x in batches:
            torch.testing.assert_close(network(x), held(x), rtol=1e-9, atol=1e-12)
    assert report.images == 5
    assert len(report.sites) == len(constants)
    for site, constant in zip(report.sites, constants, strict=True):
        assert site.channels == len(constant)
        assert site.gate == pytest.approx(float(constant.mean()))
        assert 0 < site.spread < 2
    assert spem.detach(network) == []


def test_a_layer_of_several_ends_in_the_one_that_takes_the_factor() -> None:
    network = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), nn.ReLU()).eval()
    layer = network[0]
    spem.attach(network, "scale", where=lambda module: module if module is layer else None)
    set_alpha(network, 0.6)
    assert fold(network, [images(2, 16)]).difference < 1e-6
    assert network[0] is layer


def test_the_report_tells_spread_agreement_and_accuracy() -> None:
    network, _ = attached("torchvision, norms wrapped", "se(reduction=4)")
    x = [images(4, 64, torch.float64), -images(4, 64, torch.float64)]
    before = copy.deepcopy(network)
    labels = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
    report = fold(network, x, labels)
    with torch.no_grad():
        a, b = torch.cat([before(i) for i in x]), torch.cat([network(i) for i in x])
    assert report.difference == pytest.approx(float((a - b).abs().max() / a.abs().max()))
    assert report.agreement == float((a.argmax(1) == b.argmax(1)).double().mean())
    assert report.accuracy_before == float((a.argmax(1) == labels).double().mean())
    assert report.accuracy_after == float((b.argmax(1) == labels).double().mean())
    mixed = fold(before, [(x[0], labels[:4]), x[1]])  # accuracy is that of the labelled images
    assert mixed.agreement == report.agreement
    assert mixed.accuracy_before == float((a[:4].argmax(1) == labels[:4]).double().mean())
    text = str(report)
    assert "layer1.0.bn2.attention" in text
    assert "4 gates folded over 8 images" in text
    assert "Accuracy" in text


def test_a_gate_that_is_constant_folds_exactly() -> None:
    network, _ = attached("timm, free slots", "scale")
    report = fold(network, [(images(2, 64, torch.float64), torch.tensor([0, 1]))])
    assert report.difference < 1e-12
    assert report.agreement == 1.0
    assert report.accuracy_before == report.accuracy_after
    assert all(site.spread < 1e-6 for site in report.sites)


@pytest.mark.parametrize("attention", ["spem", "eca", "se(pool=mix())"])
def test_our_own_networks_and_fused_blocks(attention: str) -> None:
    network = scattered(spem.resnet(11, attention=attention)).train()
    report = fold(network, [images(4, 32)])
    assert isinstance(report, FoldReport)
    assert len(report.sites) == 3
    assert network.spec is None
    assert network.training
    plain = spem.resnet(11)
    plain.load_state_dict(network.state_dict())
    x = images(2, 32)
    assert torch.equal(plain.eval()(x), network.eval()(x))
    fused, host = attached("timm, free slots", attention, fuse=True)
    fold(fused, [images(2, 64, torch.float64)])
    assert [type(m) for m in fused.modules()] == [type(m) for m in host.modules()]


REFUSED: list[tuple[Callable[[], nn.Module], str]] = [
    (lambda: spem.resnet(11), "there is no attention in ResNet"),
    (lambda: spem.SE(16), "one attention"),
    (lambda: spem.resnet(11, attention="cbam"), r"layer1.0.attention \(cbam\) has another gate"),
    (lambda: spem.resnet(11, attention="dia"), r"layer1.shared \(dia\) is one module for all"),
    (lambda: spem.resnet(11, attention="iebn"), r"\(iebn\) does more than multiply"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_refused(make: Callable[[], nn.Module], message: str) -> None:
    network = make()
    state = copy.deepcopy(network.state_dict())
    with pytest.raises(ValueError, match=f"fold: .*({message})"):
        fold(network, [images(2, 32)])
    for key, value in network.state_dict().items():
        if "running" not in key and "num_batches" not in key:
            assert torch.equal(value, state[key])
    assert network.training


def test_a_sum_of_branches_and_an_activation_before_the_gate_are_refused() -> None:
    """The norm of one branch of RepVGG is not all that comes before the gate."""
    network = scattered(build("timm:repvgg_a0")).double()
    spem.attach(network, "se(reduction=4)", stages=(2,))
    set_alpha(network, 0.7)
    state = copy.deepcopy(network.state_dict())
    with pytest.raises(ValueError, match="sum of several branches"):
        fold(network, [images(2, 64, torch.float64)])
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    own = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 4, 1))
    spem.attach(own, "spem", where=lambda m: m if isinstance(m, nn.SiLU) else None)
    with pytest.raises(ValueError, match="follows no norm"):
        fold(own, [images(2, 16)])


@pytest.mark.parametrize(
    ("batches", "labels", "message"),
    [
        ([], None, "no images were given"),
        ([images(2, 64)], [1], r"labels \[1\] are not one number for each image"),
        ([images(2, 64)], [1, 0, 1], r"labels \[3\] are not one number for each image"),
        ([images(2, 64)], torch.zeros(2, 5), r"labels \[2, 5\]"),
        (images(2, 64), None, "batches is a Tensor"),
        (None, None, "batches is a NoneType"),
        ([{"image": images(2, 64)}], None, "a batch is a dict"),
        ([images(2, 64) * float("nan")], None, "not finite"),
    ],
)
def test_batches_and_labels_that_say_nothing(batches: Any, labels: Any, message: str) -> None:
    network, _ = attached("torchvision, norms wrapped", "spem")
    state = copy.deepcopy(network.state_dict())
    with pytest.raises((TypeError, ValueError), match=f"fold: .*{message}"):
        fold(network, batches, labels)
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


def test_batches_as_loaders_give_them() -> None:
    """Lists of one tensor, empty batches, targets that are no classes."""
    x = images(4, 64, torch.float64)
    for batches in (
        DataLoader(TensorDataset(x), 2),
        [x[:0], x],
        [(x, torch.rand(4, 5))],
        [(x, "names", 3)],
    ):
        network, _ = attached("torchvision, norms wrapped", "spem")
        report = fold(network, batches)
        assert (report.images, report.accuracy_before) == (4, None)


def test_batches_that_come_only_once() -> None:
    class Once:
        def __init__(self, batches: list[Tensor]) -> None:
            self.batches = batches

        def __iter__(self) -> Iterator[Tensor]:
            while self.batches:
                yield self.batches.pop()

    network, _ = attached("torchvision, norms wrapped", "spem")
    with pytest.raises(ValueError, match="came only once"):
        fold(network, Once([images(2, 64)]))
    assert len(attentions(network)) == 4
    assert fold(network, iter([images(2, 64)])).images == 2


class Answering(nn.Module):
    """A network whose output is made of scores."""

    def __init__(self, answer: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.network, self.answer = spem.resnet(11, attention="spem"), answer

    def forward(self, x: Tensor) -> object:
        return self.answer(self.network(x))


def test_outputs_of_every_kind() -> None:
    x = images(4, 32)
    for answer in (lambda y: (y, None), lambda y: (None, y), lambda y: {"a": y, "b": "text"}):
        assert fold(Answering(answer), [x]).agreement is not None
    with pytest.raises(ValueError, match="Answering gives no tensor"):
        fold(Answering(lambda _: None), [x])
    idle = Answering(lambda y: y)
    idle.forward = lambda x: x.mean((2, 3))
    with pytest.raises(ValueError, match=r"network\.layer1\.0\.attention did not run"):
        fold(idle, [x])
    ever = iter(range(1, 9))
    with pytest.raises(ValueError, match="the outputs have other shapes, as detections have"):
        fold(Answering(lambda y: y[:, : next(ever)]), [x])


@pytest.mark.parametrize("training", [False, True])
def test_every_module_is_in_the_mode_of_the_network(training: bool) -> None:
    """What fills the slots again, too."""
    network = timm.create_model("test_byobnet", num_classes=3).train(training)
    spem.attach(network, "se(reduction=4)", include="stages.0*", input_shape=(1, 3, 64, 64))
    fold(network, [images(2, 64)])
    assert not attentions(network)
    assert all(module.training == training for module in network.modules())
