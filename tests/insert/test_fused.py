"""Fused blocks: the same outputs, gradients, running statistics and keys as those not fused."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from insert.hosts import build, images, models, scattered, set_alpha, small, small_timm, timm
from tolerance import TAIL
from torch import Tensor, nn

import spem
from spem.insert.fused import FusedTail
from spem.ops import bn_gate_tail

SMALL: dict[str, Callable[[], nn.Module]] = {
    "timm basic": lambda: small_timm(layers=(1, 2, 1, 1), channels=(16, 16, 32, 32)),
    "timm resnext": lambda: small_timm("Bottleneck", cardinality=8, base_width=4),
    "torchvision basic": small,
    "torchvision resnext": lambda: small(block="Bottleneck", groups=8, width_per_group=4),
}


def pair(make: Callable[[], nn.Module], attention: str) -> tuple[nn.Module, nn.Module]:
    """A network with attention, all of it at random, not fused and fused."""
    plain = make().double()
    fused = copy.deepcopy(plain)
    spem.attach(plain, attention)
    spem.attach(fused, attention, fuse=True)
    set_alpha(scattered(plain), 0.7)
    assert list(fused.state_dict()) == list(plain.state_dict())
    fused.load_state_dict(plain.state_dict())
    return plain, fused


def close(value: torch.Tensor, expected: torch.Tensor) -> None:
    scale = expected.abs().max().clamp(min=1e-30)
    assert (value - expected).abs().max() <= TAIL[torch.float64] * scale


@pytest.mark.parametrize(
    ("net", "attention", "training"),
    [
        ("timm basic", "spem", True),
        ("timm basic", "cbam(reduction=4)", False),
        ("timm resnext", "se(reduction=4)", True),
        ("timm resnext", "spem", False),
        ("torchvision basic", "cbam(reduction=4)", True),
        ("torchvision basic", "se(reduction=4)", False),
        ("torchvision resnext", "spem", True),
        ("torchvision resnext", "spem", False),
    ],
)
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
    same_state(fused, plain)


def same_state(one: nn.Module, other: nn.Module) -> None:
    assert list(one.state_dict()) == list(other.state_dict())
    for value, expected in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        close(value.double(), expected.double())


@pytest.mark.parametrize("net", ["timm basic", "torchvision resnext"])
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


def test_detach_takes_the_fused_blocks_out() -> None:
    network = SMALL["timm basic"]().eval()
    modules, keys = dict(network.named_modules()), list(network.state_dict())
    x = images(1, 32)
    expected = network(x)
    block = network.layer1[0]
    names = spem.attach(network, "spem", fuse=True)
    assert network.layer1[0] is block
    assert isinstance(block, timm.models.resnet.BasicBlock)
    assert type(block).__name__ == "FusedBasicBlock"
    assert names == [f"layer{place}.se" for place in ("1.0", "2.0", "2.1", "3.0", "4.0")]
    torch.testing.assert_close(network(x), expected)
    with pytest.raises(ValueError, match=r"there is attention at layer1.0.se already"):
        spem.attach(network, "se")
    assert spem.detach(network) == names
    assert dict(network.named_modules()) == modules
    assert list(network.state_dict()) == keys
    assert torch.equal(network(x), expected)


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
        with pytest.raises(ValueError, match=f"fuse=True: .*{reason}.*Leave fuse=True out"):
            spem.attach(network, "spem", fuse=True, dry_run=dry_run)
    assert dict(network.named_modules()) == modules


def test_a_norm_that_does_not_end_the_branch_is_not_fused() -> None:
    network = SMALL["torchvision basic"]()
    with pytest.raises(ValueError, match="is not what ends the branch of a BasicBlock"):
        spem.attach(network, "spem", fuse=True, where=first_norm)


def first_norm(module: nn.Module) -> nn.Module | None:
    return module.get_submodule("bn1") if isinstance(module, models.resnet.BasicBlock) else None


def test_a_replaced_se_is_fused() -> None:
    make = lambda: small_timm(channels=(16, 16, 32, 32), block_args={"attn_layer": "se"})  # noqa: E731
    network = scattered(make()).double().eval()
    x = images(2, 48, torch.float64)
    expected = network(x)
    spem.attach(network, "se(pool=mix())", replace=True, fuse=True)
    with spem.ops.use_impl("formula"):
        assert [tail.impl for tail in spem.cost.block_tails(network)] == ["formula"] * 4
        close(network(x), expected)


def replace(name: str, make: Callable[[Any], nn.Module]) -> Callable[[Any], object]:
    """Puts another layer in the place of one, of its width."""

    def change(block: Any) -> None:
        wrapped = name == "bn2" and not hasattr(block, "se")
        parent = block.bn2 if wrapped else block
        setattr(parent, "norm" if wrapped else name, make(block).double())

    return change


def last_norm(block: Any) -> Any:
    return block.bn2 if hasattr(block, "se") else block.bn2.norm


SURGERY: dict[str, Callable[[Any], object]] = {
    "another convolution": replace(
        "conv2", lambda b: nn.Conv2d(b.conv2.in_channels, b.conv2.out_channels, 5, padding=2)
    ),
    "another activation": lambda b: setattr(b, "act2" if hasattr(b, "se") else "relu", nn.SiLU()),
    "momentum of the norm": lambda b: setattr(b.bn2, "momentum", 0.9),
    "another inner norm": replace("bn1", lambda b: nn.GroupNorm(2, b.bn1.num_features)),
    "another last norm": replace("bn2", lambda b: nn.GroupNorm(2, last_norm(b).num_features)),
    "a frozen norm": lambda b: last_norm(b).eval(),
    "a drop path": lambda b: setattr(b, "drop_path", timm.layers.DropPath(0.4)),
    "another forward": lambda b: setattr(b, "forward", lambda x: x * 2),
    "no downsample": lambda b: setattr(b, "downsample", nn.Identity()),
}


@pytest.mark.parametrize(
    ("change", "net"),
    [
        *zip(SURGERY, ["timm basic", "torchvision basic"] * 5, strict=False),
        ("another last norm", "timm basic"),
        ("another activation", "timm basic"),
        ("a drop path", "torchvision basic"),
    ],
)
def test_changes_of_a_block_are_those_of_the_block_not_fused(change: str, net: str) -> None:
    """Its live attributes are read: what a host or a tool changes after attach takes effect."""
    plain, fused = (model.train() for model in pair(SMALL[net], "se(reduction=4)"))
    results = []
    for model in (plain, fused):
        torch.manual_seed(2)
        SURGERY[change](model.layer2[1] if len(model.layer2) > 1 else model.layer1[0])
        x = images(2, 48, torch.float64)
        torch.manual_seed(5)
        results.append((model(x), model.eval()(x)))
    for value, expected in zip(*reversed(results), strict=True):
        close(value, expected)
    same_state(fused, plain)
    fused.load_state_dict(fused.state_dict())
    if change not in ("another forward", "no downsample"):
        assert spem.detach(fused) == spem.detach(plain)


@pytest.mark.parametrize(
    ("net", "when"), [*zip(SMALL, ["before attach", "after attach"] * 2, strict=True)]
)
def test_every_hook_fires_with_what_it_saw_before(net: str, when: str) -> None:
    """Of the block, its layers, its wrapper and the parts of its attention; outputs stay."""
    plain, fused = pair(SMALL[net], "se(reduction=4)")
    if when == "before attach":
        spem.detach(fused)
    seen: dict[tuple[nn.Module, str], Tensor] = {}

    def watch(model: nn.Module) -> None:
        for name, part in model.layer1[0].named_modules():
            part.register_forward_hook(lambda *a, n=name: seen.update({(model, n): a[-1].clone()}))

    watch(fused)
    hosts = {name for name, _ in fused.layer1[0].named_modules() if not name.startswith("se")}
    if when == "before attach":
        spem.attach(fused, "se(reduction=4)", fuse=True)
        fused.load_state_dict(plain.state_dict())
        seen.clear()
    else:
        watch(plain)
    x = images(2, 48, torch.float64)
    close(fused.eval()(x), plain.eval()(x))
    assert isinstance(fused.layer1[0], FusedTail)
    silent = hosts - {name for model, name in seen if model is fused}
    assert silent <= {"bn2.attention.inner", "bn3.attention.inner"}  # whose gate alone is called
    for (model, name), value in seen.items():
        if model is plain:
            close(seen[fused, name], value)


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


def test_averaged_weights_get_new_statistics() -> None:
    """`update_bn` sets momentum=None: the running average of all batches."""
    from torch.optim.swa_utils import update_bn

    plain, fused = pair(SMALL["torchvision basic"], "spem")
    batches = [images(2, 48, torch.float64) * s for s in (1.0, 2.0, 0.5)]
    for model in (plain, fused):
        update_bn(batches, model)
    same_state(fused, plain)
