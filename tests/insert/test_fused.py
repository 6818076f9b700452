"""Fused blocks: the same outputs, gradients, running statistics and keys as those not fused."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from insert.hosts import attentions, build, images, models, scattered, timm
from tolerance import TAIL
from torch import Tensor, nn

import spem
from spem.insert.fused import FusedTail
from spem.ops import bn_gate_tail

SMALL = {
    "timm basic": lambda: timm.models.resnet.ResNet(
        timm.models.resnet.BasicBlock, (1, 2, 1, 1), num_classes=5, channels=(16, 16, 32, 32)
    ),
    "timm resnext": lambda: timm.models.resnet.ResNet(
        timm.models.resnet.Bottleneck, (1, 1, 1, 1), num_classes=5, cardinality=8, base_width=4
    ),
    "torchvision basic": lambda: models.resnet.ResNet(
        models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5
    ),
    "torchvision resnext": lambda: models.resnet.ResNet(
        models.resnet.Bottleneck, [1, 1, 1, 1], num_classes=5, groups=8, width_per_group=4
    ),
}


def pair(make: Callable[[], nn.Module], attention: str) -> tuple[nn.Module, nn.Module]:
    """A network with attention, all of it at random, not fused and fused."""
    plain = make().double()
    fused = copy.deepcopy(plain)
    spem.attach(plain, attention)
    spem.attach(fused, attention, fuse=True)
    scattered(plain)
    with torch.no_grad():
        for module in attentions(plain):
            module.alpha.fill_(0.7)
    assert list(fused.state_dict()) == list(plain.state_dict())
    fused.load_state_dict(plain.state_dict())
    return plain, fused


def close(value: torch.Tensor, expected: torch.Tensor) -> None:
    scale = expected.abs().max().clamp(min=1e-30)
    assert (value - expected).abs().max() <= TAIL[torch.float64] * scale


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("attention", ["spem", "se(reduction=4)", "cbam(reduction=4)"])
@pytest.mark.parametrize("net", SMALL)
def test_fused_is_equal(net: str, attention: str, training: bool) -> None:
    plain, fused = (model.train(training) for model in pair(SMALL[net], attention))
    results = []
    for model in (plain, fused):
        x = images(2, 48, torch.float64).requires_grad_()
        with spem.ops.use_impl("formula" if "cbam" not in attention else None):
            y = model(x)
            (y * torch.arange(10.0, dtype=torch.float64).reshape(2, 5)).sum().backward()
        results.append((y, x.grad, *(p.grad for p in model.parameters())))
    for value, expected in zip(*reversed(results), strict=True):
        close(value, expected)
    for (key, value), expected in zip(
        fused.state_dict().items(), plain.state_dict().values(), strict=True
    ):
        close(value.double(), expected.double())
        assert key


@pytest.mark.parametrize("net", SMALL)
def test_the_tail_is_one_operation(net: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fused = SMALL[net]()
    sites = spem.attach(fused, "spem", fuse=True)
    called: list[nn.Module] = []

    def counted(z: Tensor, residual: Tensor, norm: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        called.append(norm)
        return bn_gate_tail(z, residual, norm, *args, **kwargs)

    monkeypatch.setattr("spem.attention.base.bn_gate_tail", counted)
    with spem.ops.use_impl("formula"):
        fused(images(2, 48))
        assert {type(norm) for norm in called} == {nn.BatchNorm2d}
        assert len(called) == len(sites)
        tails = spem.cost.block_tails(fused)
    assert [(tail.impl, tail.attention) for tail in tails] == [("formula", "spem")] * len(sites)


def test_evaluation_may_reuse_memory_and_leaves_the_input_alone() -> None:
    _, fused = pair(SMALL["torchvision basic"], "spem")
    fused.eval()
    x = images(2, 48, torch.float64)
    kept = x.clone()
    with torch.no_grad(), spem.ops.use_impl("formula"):
        first, second = fused(x), fused(x)
    assert torch.equal(x, kept)
    assert torch.equal(first, second)


def test_detach_takes_the_fused_blocks_out() -> None:
    network = SMALL["timm basic"]().eval()
    modules, keys = dict(network.named_modules()), list(network.state_dict())
    x = images(1, 32)
    expected = network(x)
    names = spem.attach(network, "spem", fuse=True)
    assert names == [f"layer{place}.se" for place in ("1.0", "2.0", "2.1", "3.0", "4.0")]
    torch.testing.assert_close(network(x), expected)
    with pytest.raises(ValueError, match=r"there is attention at layer1.0.se already"):
        spem.attach(network, "se")
    assert spem.detach(network) == names
    assert dict(network.named_modules()) == modules
    assert list(network.state_dict()) == keys
    assert torch.equal(network(x), expected)


def test_keys_of_fused_and_not_fused_are_the_same_and_those_of_the_host_load() -> None:
    network = SMALL["torchvision basic"]()
    state = copy.deepcopy(network.state_dict())
    spem.attach(network, "spem", fuse=True)
    found = network.load_state_dict(state, strict=False)
    assert not found.unexpected_keys
    assert all(".attention." in key for key in found.missing_keys)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: build("torchvision:mobilenet_v2"), "is in a InvertedResidual; only the ResNet"),
        (
            lambda: timm.create_model("resnet18", drop_path_rate=0.1),
            "layer1.1.se of ResNet has a DropPath between it and the addition",
        ),
        (
            lambda: timm.create_model("resnet18", act_layer=nn.SiLU),
            "block that ends in SiLU, not ReLU",
        ),
        (
            lambda: timm.create_model("resnet18", block_args={"attn_layer": "se"}),
            "keeps its SEModule before attention; pass replace=True",
        ),
    ],
)
def test_what_cannot_be_fused(make: Callable[[], nn.Module], reason: str) -> None:
    with torch.device("meta"):
        network = make()
    modules = dict(network.named_modules())
    for dry_run in (True, False):
        with pytest.raises(ValueError, match=f"fuse=True: .*{reason}.*Leave fuse out"):
            spem.attach(network, "spem", fuse=True, dry_run=dry_run)
    assert dict(network.named_modules()) == modules


def test_a_norm_that_does_not_end_the_branch_is_not_fused() -> None:
    network = SMALL["torchvision basic"]()
    with pytest.raises(ValueError, match="is not what ends the branch of a BasicBlock"):
        spem.attach(network, "spem", fuse=True, where=first_norm)


def first_norm(module: nn.Module) -> nn.Module | None:
    return module.get_submodule("bn1") if isinstance(module, models.resnet.BasicBlock) else None


def test_a_replaced_se_is_fused() -> None:
    make = lambda: timm.models.resnet.ResNet(  # noqa: E731
        timm.models.resnet.BasicBlock,
        (1, 1, 1, 1),
        num_classes=5,
        channels=(16, 16, 32, 32),
        block_args={"attn_layer": "se"},
    )
    network = scattered(make()).double().eval()
    x = images(2, 48, torch.float64)
    expected = network(x)
    spem.attach(network, "se(pool=mix())", replace=True, fuse=True)
    with spem.ops.use_impl("formula"):
        assert [tail.impl for tail in spem.cost.block_tails(network)] == ["formula"] * 4
        close(network(x), expected)


def swap_relu(block: nn.Module) -> None:
    setattr(block, "act2" if hasattr(block, "act2") else "relu", nn.SiLU())


def set_momentum(block: nn.Module) -> None:
    block.bn2.momentum = 0.9


def replace_inner(block: nn.Module) -> None:
    block.bn1 = nn.GroupNorm(2, block.bn1.num_features)


def replace_last(block: nn.Module) -> None:
    if hasattr(block, "se"):
        block.bn2 = nn.GroupNorm(2, block.bn2.num_features)
    else:
        block.bn2.norm = nn.GroupNorm(2, block.bn2.norm.num_features)


def freeze(block: nn.Module) -> None:
    (block.bn2 if hasattr(block, "se") else block.bn2.norm).eval()


SURGERY: dict[str, Callable[[nn.Module], object]] = {
    "another convolution": lambda b: setattr(
        b, "conv2", nn.Conv2d(b.conv2.in_channels, b.conv2.out_channels, 5, padding=2).double()
    ),
    "another activation": swap_relu,
    "momentum of the norm": set_momentum,
    "another inner norm": lambda b: (replace_inner(b), b.double()),
    "another last norm": lambda b: (replace_last(b), b.double()),
    "a frozen norm": freeze,
    "a drop path": lambda b: setattr(b, "drop_path", timm.layers.DropPath(0.4)),
    "another forward": lambda b: setattr(b, "forward", lambda x: x * 2),
    "no downsample": lambda b: setattr(b, "downsample", nn.Identity()),
}


@pytest.mark.parametrize("net", ["timm basic", "torchvision basic"])
@pytest.mark.parametrize("change", SURGERY)
def test_changes_of_a_block_are_those_of_the_block_not_fused(change: str, net: str) -> None:
    """Its live attributes are read: what a host or a tool changes after attach takes effect."""
    plain, fused = (model.train() for model in pair(SMALL[net], "se(reduction=4)"))
    results = []
    for model in (plain, fused):
        torch.manual_seed(2)
        SURGERY[change](model.layer2[1] if len(model.layer2) > 1 else model.layer1[0])
        x = images(2, 48, torch.float64)
        torch.manual_seed(5)
        results.append((model(x), model.eval()(x), dict(model.state_dict())))
    for (one, two, state), (a, b, expected) in [tuple(reversed(results))]:
        close(one, a)
        close(two, b)
        assert list(state) == list(expected)
        for key, value in state.items():
            close(value.double(), expected[key].double())
    fused.load_state_dict(fused.state_dict())
    if change not in ("another forward", "no downsample"):
        assert spem.detach(fused) == spem.detach(plain)


@pytest.mark.parametrize("when", ["before attach", "after attach"])
@pytest.mark.parametrize("net", SMALL)
def test_every_hook_fires_with_what_it_saw_before(
    net: str, when: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Of the block, its layers, its wrapper and the parts of its attention; outputs stay."""
    plain, fused = pair(SMALL[net], "se(reduction=4)")
    if when == "before attach":
        spem.detach(fused)
    fired: dict[str, list[Tensor]] = {}

    def watch(model: nn.Module, label: str) -> None:
        block = model.layer1[0]
        for name, part in block.named_modules():
            if "attention" not in name and not name.startswith(("se", "bn2.norm", "bn3.norm")):
                part.register_forward_hook(
                    lambda *a, n=name: fired.setdefault(f"{label}:{n}", []).append(a[-1].clone())
                )

    watch(fused, "fused")
    if when == "before attach":
        spem.attach(fused, "se(reduction=4)", fuse=True)
        fused.load_state_dict(plain.state_dict())
        fired.clear()
    else:
        watch(plain, "plain")
    x = images(2, 48, torch.float64)
    expected = plain.eval()(x)
    with caplog.at_level(logging.INFO, logger="spem.insert"):
        fused.eval()(x), fused(x)
    close(fused(x), expected)
    seen = {key.partition(":")[2]: v for key, v in fired.items() if key.startswith("fused")}
    block = fused.layer1[0]
    expected_names = {n for n, m in SMALL[net]().layer1[0].named_modules()}
    assert expected_names <= set(seen) | {"se", "bn2.norm", "bn3.norm"}
    assert isinstance(block, FusedTail)
    for key, value in fired.items():
        if key.startswith("plain"):
            close(seen[key.partition(":")[2]][0], value[0])
    assert len([m for m in caplog.messages if "runs composed" in m]) <= 1


def test_a_block_that_somebody_watches_says_once_that_it_is_composed(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spem.insert.fused._LOGGED", set())
    network = SMALL["torchvision basic"]().eval()
    spem.attach(network, "spem", fuse=True)
    for stage in (network.layer1, network.layer2):
        stage[0].relu.register_forward_hook(lambda *_: None)
    with caplog.at_level(logging.INFO, logger="spem.insert"):
        network(images(1, 32)), network(images(1, 32))
    assert caplog.messages == ["A fused block runs composed: relu is a ReLU with hooks."]
    reasons = [tail.reason for tail in spem.cost.block_tails(network)]
    assert [r for r in reasons if r] == ["relu is a ReLU with hooks"] * 2


def test_subclasses_are_found_by_their_hosts_class() -> None:
    network = SMALL["timm basic"]()
    block = network.layer1[0]
    spem.attach(network, "spem", fuse=True)
    assert network.layer1[0] is block
    assert isinstance(block, timm.models.resnet.BasicBlock)
    assert type(block).__name__ == "FusedBasicBlock"
    spem.detach(network)
    assert type(block) is timm.models.resnet.BasicBlock


def test_averages_of_weights_take_statistics_anew() -> None:
    """`update_bn` sets momentum=None: the running average of all batches."""
    from torch.optim.swa_utils import update_bn

    plain, fused = pair(SMALL["torchvision basic"], "spem")
    batches = [images(2, 48, torch.float64) * s for s in (1.0, 2.0, 0.5)]
    for model in (plain, fused):
        update_bn(batches, model)
    for (key, value), expected in zip(
        fused.state_dict().items(), plain.state_dict().values(), strict=True
    ):
        assert key
        close(value.double(), expected.double())
