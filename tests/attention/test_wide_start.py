"""The further modules when they are new: counts in ResNet164, gates, initial values, seeds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from attention.drawing import feature_map, randomise
from attention.registered import fresh
from tolerance import PRINTED, TOLERANCE
from torch import nn

import spem
from spem import attention

NEW = ["coord", "ela", "ese", "fca", "gc", "gct", "ge", "gsop", "nam", "simam", "spa", "triplet"]


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("c", [64, 128, 256])
def test_parameter_counts(c: int) -> None:
    size = {64: 32, 128: 16, 256: 8}[c]
    h = c // 16
    coord = max(8, c // 32)
    for spec, expected in (
        ("fca", 2 * c * h),
        ("fca(frequencies=4, reduction=8)", c * c // 4),
        ("gct", 3 * c),
        ("ge(form=theta)", c * (size**2 + 2)),
        ("ge(form=theta_plus)", c * (size**2 + 2) + 2 * c * h + h + c),
        ("coord", c * coord + 3 * coord + 2 * (coord * c + c)),
        ("gc", 2 * h * c + 3 * h + 2 * c + 1),
        ("gc(fusion=both)", 2 * (2 * h * c + 3 * h + c) + c + 1),
        ("gsop", 641 * c + 66_688),
        ("triplet", 300),
        ("nam", 2 * c),
        ("ese", c * c + c),
        ("spa", 22 * c * h),
        ("ela(form=T)", 7 * c),
        ("ela(form=B)", 9 * c),
        ("ela(form=S)", 42 * c),
        ("ela(form=L)", 58 * c),
    ):
        assert count(spem.create_attention(spec, c, size=size)) == expected, spec


# mean, least and greatest gate on normal maps as the facts print them; they depend on the seed
START = {
    "fca": (0.5, 0.26, 0.74),
    "ge": (0.5, 0.45, 0.55),
    "ge(form=theta)": (0.5, 0.04, 0.95),
    "ge(form=theta_plus)": (0.5, 0.499, 0.501),
    "simam": (0.68, 0.6224593, 1.0),
    "coord": (0.25, 0.04, 0.67),
    "triplet": (0.5, 0.05, 0.90),
    "nam": (0.5, 0.48, 0.52),
    "ese": (0.5, 0.47, 0.53),
    "spa": (0.5, 0.45, 0.55),
    "ela": (0.25, 0.0, 0.95),
}


@pytest.mark.parametrize("spec", START)
def test_start_about(spec: str) -> None:
    mean, least, greatest = START[spec]
    block = nn.Sequential(spem.create_attention(spec, 64, size=16))
    spem.initialise(block, 0)
    assert block[0].start_gate is None
    x = torch.randn(32, 64, 16, 16, generator=torch.Generator().manual_seed(0))
    gate = block[0].gate(x)
    assert gate.mean().item() == pytest.approx(mean, abs=0.03)
    spread = 0.5 * (greatest - least)
    assert gate.min().item() > least - spread
    assert gate.max().item() < greatest + spread
    assert gate.max() > gate.min()
    if spec == "simam":
        assert gate.min().item() >= 0.6224593 - PRINTED


def test_start_exactly() -> None:
    x = feature_map(3, 64, 4, 5, key="start", dtype=torch.float32)
    for spec, start in (
        ("gct", 1.0),
        ("gct(mode=l1)", 1.0),
        ("gc", 1.0),
        ("gc(fusion=mul)", 0.5),
        ("gc(fusion=both)", 0.5),
    ):
        block = nn.Sequential(spem.create_attention(spec, 64))
        for scope in ("backbone", "all"):
            spem.initialise(block, 3, scope=scope)
            for training in (True, False):
                module = block.train(training)[0]
                assert torch.equal(module.gate(x), torch.full_like(module.gate(x), start))
                assert torch.equal(module(x), start * x)
        assert module.start_gate == start


@pytest.mark.parametrize("name", NEW)
def test_reset_parameters_restores_the_constants(name: str) -> None:
    new = fresh(name)
    used = randomise(fresh(name), "used")
    used.reset_parameters()
    after = dict(used.named_parameters())
    for key, value in new.named_parameters():
        if value.unique().numel() == 1:
            assert torch.equal(after[key], value), key


@pytest.mark.parametrize("name", [*NEW, "ge(form=theta)", "ge(form=theta_plus)", "gc(fusion=both)"])
def test_a_seed_draws_every_random_part_anew(name: str) -> None:
    """By name: equal for a seed, different for another; constants are those of a new module."""
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed + 5)
        model = spem.resnet(11, attention=name)
        spem.initialise(model, seed)
        states.append(dict(model.layer1[0].attention.named_parameters()))
    new = dict(spem.create_attention(name, 64, size=32).named_parameters())
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key
        if new[key].unique().numel() == 1:
            assert torch.equal(value, new[key]), key
        else:
            assert not torch.equal(value, states[2][key]), key


def test_the_backbone_draw_does_not_reach_in() -> None:
    """Convolutions inside keep torch's default, U(+-1/sqrt(fan in)), unless scope="all" asks."""
    for name, path, bound in (
        ("triplet", "hw.conv", 98**-0.5),
        ("coord", "conv_h", 8**-0.5),
        ("gsop", "reduce", 64**-0.5),
        ("ela", "conv", 7**-0.5),
    ):
        model = spem.resnet(11, attention=name)
        weight = model.layer1[0].attention.get_submodule(path).weight.detach()
        assert weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.2)
    model = spem.resnet(11, attention="triplet")
    spem.initialise(model, 0, scope="all")
    weight = model.layer1[0].attention.hw.conv.weight
    assert weight.std().item() == pytest.approx((2 / 49) ** 0.5, rel=0.3)


@pytest.mark.parametrize("keyed", [True, False])
def test_drawn_parts_have_the_published_spread(keyed: bool) -> None:
    """GE: MSRA over the map's positions and 0.01; GC: Kaiming over the channels."""
    torch.manual_seed(0)
    ge = spem.create_attention("ge(form=theta_plus, reduction=4)", 64, size=(6, 8))
    gc = spem.create_attention("gc", 2048)
    if keyed:
        spem.initialise(nn.Sequential(ge, gc), 7)
    assert ge.gather.weight.std().item() == pytest.approx((2 / 48) ** 0.5, rel=0.1)
    for layer in (ge.fc1, ge.fc2):
        assert layer.weight.std().item() == pytest.approx(0.01, rel=0.1)
        assert not layer.bias.any()
    assert gc.mask.weight.std().item() == pytest.approx((2 / 2048) ** 0.5, rel=0.1)
    assert not gc.mask.bias.any()
    assert not gc.add.fc2.weight.any()
    assert not gc.add.fc2.bias.any()
    assert gc.add.fc1.bias.any()


def test_settings_of_the_norms() -> None:
    triplet = attention.Triplet(8)
    assert all(plane.norm.momentum == 0.01 for plane in (triplet.cw, triplet.hc, triplet.hw))
    for norm in (attention.CoordAtt(8).norm, attention.NAM(8).norm, attention.GSoP(8).norm):
        assert norm.momentum == 0.1
    norms = [m for n in NEW for m in fresh(n).modules() if hasattr(m, "eps")]
    assert len(norms) == 9
    assert all(norm.eps == 1e-5 for norm in norms)


@pytest.mark.parametrize(
    ("name", "momentum"), [("triplet", 0.01), ("coord", 0.1), ("nam", 0.1), ("gsop", 0.1)]
)
def test_running_statistics_move_by_the_momentum(name: str, momentum: float) -> None:
    module = fresh(name, dtype=torch.float64).train()
    x = feature_map(4, 64, 5, 7)
    seen: dict[str, torch.Tensor] = {}
    for key, norm in module.named_modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.register_forward_pre_hook(
                lambda _, args, key=key: seen.__setitem__(key, args[0].detach())
            )
    module(x)
    assert seen
    for key, v in seen.items():
        norm = module.get_submodule(key)
        mean, var = v.mean((0, 2, 3)), v.var((0, 2, 3))
        np.testing.assert_allclose(norm.running_mean, momentum * mean, **TOLERANCE[torch.float64])
        np.testing.assert_allclose(
            norm.running_var, 1 - momentum + momentum * var, **TOLERANCE[torch.float64]
        )


@pytest.mark.parametrize(("channels", "stride"), [(64, 2), (256, 2), (257, 1), (512, 1)])
def test_the_stride_of_gsop(channels: int, stride: int) -> None:
    assert attention.GSoP(channels, dims=4).reduce.stride == (stride, stride)


def test_the_least_gate_of_simam() -> None:
    x = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    assert math.isclose(attention.SimAM(1).gate(x).max().item(), 1 / (1 + math.exp(-0.5)))


def test_branches_of_sk_start_as_the_convolution_they_replace() -> None:
    model = spem.resnet(56, attention="sk")
    for name in ("near", "far"):
        weights = torch.cat(
            [getattr(block.conv2, name).weight.detach().flatten() for block in model.layer3]
        )
        assert weights.var().item() == pytest.approx(2 / (9 * 64), rel=0.08)
