"""What the modules are when they are new: counts, gates, derivatives, initial values, draws."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from attention.cases import ALL, EVERY, POOLS, REWEIGHTS, C, fresh
from attention.drawing import feature_map, randomise
from tolerance import PRINTED, TOLERANCE
from torch import nn

import spem
from spem import attention

F64 = TOLERANCE[torch.float64]


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def se(c: int) -> int:
    return c * c // 8 + c // 16 + c


def coord(c: int, h: int) -> int:
    return c * h + 3 * h + 2 * (h * c + c)


def gc(c: int, h: int) -> int:
    return 2 * h * c + 3 * h + c


def sk(c: int) -> int:
    """3 C d + 2 d beside two grouped convolutions with their norms."""
    d = max(c // 16, 32)
    return 3 * c * d + 2 * d + 2 * (9 * c * c // min(32, c) + 2 * c)


COUNTS: dict[str, Callable[[int], int]] = {
    "spem": lambda c: 4 * c + 2,
    "spem(form=code)": lambda c: 4 * c + 2,
    "spem(form=figure, pool=mix(0.5))": lambda c: 4 * c,
    "spem(pool=mix(parametrization=anchored))": lambda c: 4 * c + 2,
    "spem(pool=mix(parametrization=sigmoid))": lambda c: 4 * c + 1,
    "spem(reweight=unshared_sum)": lambda c: 6 * c + 2,
    "spem(reweight=none)": lambda c: 2 * c + 2,
    "spem(reweight=max_only)": lambda c: 4 * c + 2,
    "se": se,
    "se(bias=False)": lambda c: c * c // 8,
    "cbam": lambda c: se(c) + 100,
    "eca": lambda c: 3 if c == 64 else 5,
    "eca(kernel=3)": lambda c: 3,
    "srm": lambda c: 4 * c,
    "sge": lambda c: 128,
    "sge(groups=8)": lambda c: 16,
    "scale": lambda c: c,
    "dia": lambda c: 5 * c * c // 2 + 17 * c // 2,
    "ean": se,
    "ean(bias=False)": lambda c: c * c // 8,
    "iebn": lambda c: 4 * c,
    "bam": lambda c: {64: 1173, 128: 4457, 256: 17_361}[c],
    "bam(fusion=add, dilation=2)": lambda c: {64: 1173, 128: 4457, 256: 17_361}[c],
    "ge": lambda c: 0,
    "ge(bias=True, form=theta)": lambda c: c * (7 * 7 + 3),
    "ge(form=theta)": lambda c: c * (7 * 7 + 2),
    "ge(form=theta_plus)": lambda c: c * (7 * 7 + 2) + se(c),
    "fca": lambda c: c * c // 8,
    "fca(frequencies=4, reduction=8)": lambda c: c * c // 4,
    "gct": lambda c: 3 * c,
    "coord": lambda c: coord(c, max(8, c // 32)),
    "gc": lambda c: gc(c, c // 16) + c + 1,
    "gc(fusion=both)": lambda c: 2 * gc(c, c // 16) + c + 1,
    "gsop": lambda c: 641 * c + 66_688,
    "triplet": lambda c: 300,
    "nam": lambda c: 2 * c,
    "ese": lambda c: c * c + c,
    "simam": lambda c: 0,
    "sk": sk,
    "spa": lambda c: 22 * c * c // 16,
    "ela": lambda c: 9 * c,
    "ela(form=T)": lambda c: 7 * c,
    "ela(form=S)": lambda c: 42 * c,
    "ela(form=L)": lambda c: 58 * c,
}


@pytest.mark.parametrize("c", [64, 128, 256])
def test_parameter_counts(c: int) -> None:
    found = {spec: count(spem.create_attention(spec, c, size=7)) for spec in COUNTS}
    assert found == {spec: formula(c) for spec, formula in COUNTS.items()}
    assert {spec.partition("(")[0] for spec in COUNTS} == set(ALL)


RESNET164 = {
    "fca": 1_897_690,
    "gct": 1_728_346,
    "gct(mode=l1)": 1_728_346,
    "ge": 1_704_154,
    "ge(extent=4)": 1_704_154,
    "ge(form=theta)": 3_784_666,
    "ge(bias=True, form=theta)": 3_792_730,
    "ge(form=theta_plus)": 3_986_770,
    "simam": 1_704_154,
    "coord": 1_915_114,
    "gc": 1_915_384,
    "gc(fusion=mul)": 1_915_384,
    "gc(reduction=4)": 2_500_528,
    "gsop": 10_474_330,
    "triplet": 1_720_354,
    "nam": 1_720_282,
    "ese": 3_260_506,
    "spa": 3_833_050,
    "ela": 1_776_730,
    "ela(form=T)": 1_760_602,
    "gct(placement=conv)": 1_740_355,
    "dia": 1_923_002,
    "ean": 1_715_382,
    "iebn": 1_728_378,
    "bam(placement=tail)": 2_117_992,
    "bam(placement=stage)": 1_727_145,
    "bam": 1_709_784,
    "sk": 1_704_154 - 18 * 34_048,
    # stochastic region pooling has no parameters: those of its module
    "se(pool=srp)": 1_906_258,
    "srm(pool=srp)": 1_736_410,
}
"""Every row of the table of counts beside the paper's five, which `test_models` has."""


def test_parameters_of_resnet164() -> None:
    found: dict[str, int] = {}
    for spec in RESNET164:
        with torch.device("meta"):
            network = spem.ResNet(164, attention=spem.AttentionSpec.parse(spec))
            wider = spem.ResNet(164, 100, attention=spem.AttentionSpec.parse(spec))
        found[spec] = count(network)
        assert count(wider) == found[spec] + 23_130
    assert found == RESNET164
    five = {"spem", "scale", "se", "cbam", "eca", "srm", "sge"}
    assert {spec.partition("(")[0] for spec in RESNET164} | five == set(ALL)


# gate at initialisation of text (and of code) and of figure, as the facts print them
SPEM_START = {
    "shared_sum": (0.0320586, 0.4702345),
    "unshared_sum": (0.0320586, 0.4702345),
    "sum_of_sigmoids": (0.1446590, 0.3686802),
    "product_of_sigmoids": (0.0194524, 0.4819255),
    "sigmoid_of_product": (0.1966119, 0.3249625),
    "linear_sum": (-0.5378828, 0.8807971),
    "linear_product": (0.2689414, 0.2689414),
    "double_sigmoid": (0.1697880, 0.3472113),
    "max_only": (0.0723295, 0.4331670),
    "min_only": (0.0723295, 0.4331670),
    "none": (0.2689414, 0.2689414),
}
START = {
    **{f"spem(reweight={r})": text for r, (text, _) in SPEM_START.items()},
    **{f"spem(form=figure, reweight={r})": figure for r, (_, figure) in SPEM_START.items()},
    **{f"spem(form=text, pool={pool})": 0.0320586 for pool in POOLS},
    **{f"spem(form=code, pool={pool})": 0.0320586 for pool in POOLS},
    **{f"spem(form=figure, pool={pool})": 0.4702345 for pool in POOLS},
    "srm": 0.5,
    "sge": 0.7310586,
    "scale": 0.0320586,
    "scale(start=0.25)": 0.25,
    "iebn": 0.2689414,
    "gct": 1.0,
    "gct(mode=l1)": 1.0,
    "gc": 1.0,
    "gc(fusion=mul)": 0.5,
    "gc(fusion=both)": 0.5,
}


def test_start_exactly() -> None:
    assert set(SPEM_START) == set(REWEIGHTS)
    x = feature_map(3, C, 4, 5, key="start", dtype=torch.float32)
    for spec, start in START.items():
        block = nn.Sequential(spem.create_attention(spec, C))
        for scope in (None, "backbone", "all"):
            if scope is not None:
                spem.initialise(block, 3, scope=scope)
            for training in (True, False):
                module = block.train(training)[0]
                assert (module.gate(x) - start).abs().max() < PRINTED, spec
                if module.needs.replaces is None:
                    assert (module(x) - start * x).abs().max() < 10 * PRINTED, spec
        assert module.start_gate == pytest.approx(start, abs=PRINTED)


# mean, least and greatest gate on normal maps as the facts print them; they depend on the seed
ABOUT = {
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
    "dia": (0.25, 0.18, 0.33),
    "ean": (0.5, 0.36, 0.63),
    "bam": (1.5, 1.10, 1.87),
    "sk": (0.5, 0.0, 1.0),
}


def test_start_about() -> None:
    for spec in ABOUT:
        starts_about(spec, *ABOUT[spec])


def starts_about(spec: str, mean: float, least: float, greatest: float) -> None:
    block = nn.Sequential(spem.create_attention(spec, 64, size=16))
    spem.initialise(block, 0)
    assert block[0].start_gate is None
    x = torch.randn(32, 64, 16, 16, generator=torch.Generator().manual_seed(0))
    gate = block[0].gate(x)
    # DIA's first block starts from the state 0; the printed numbers are of a recurrent run
    assert gate.mean().item() == pytest.approx(mean, abs=0.06 if spec == "dia" else 0.03)
    spread = 0.5 * (greatest - least)
    assert least - spread < gate.min() < gate.max() < greatest + spread
    if spec == "simam":
        assert gate.min().item() >= 0.6224593 - PRINTED


def test_the_least_gate_of_simam() -> None:
    x = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    assert math.isclose(attention.SimAM(1).gate(x).max().item(), 1 / (1 + math.exp(-0.5)))


# derivative of the gate at initialisation: (constant, times which data) of the facts' table
DERIVATIVES = {
    "text": {"w_e": (0.0234367, "u"), "b_e": (0.0234367, "1")},
    "code": {"w_e": (-0.0234367, "1"), "b_e": (0.0234367, "1")},
    "figure": {"w_e": (0.0296951, "u"), "b_e": (0.0296951, "1")},
}
for _form, _slope in (("text", 0.0282371), ("code", 0.0282371), ("figure", -0.0261554)):
    DERIVATIVES[_form] |= {"w_r": (_slope, "sum"), "b_r": (2 * _slope, "1")}


@pytest.mark.parametrize("form", DERIVATIVES)
def test_derivatives_at_initialisation(form: str) -> None:
    module = spem.SPEM(6, form=form).double()
    x = feature_map(1, 6, 4, 5, key="derivatives")
    high, low = x.flatten(2).amax(-1)[0], x.flatten(2).amin(-1)[0]
    data = {"u": 0.5 * (high + low), "1": torch.ones(6, dtype=torch.float64), "sum": high + low}
    module.gate(x).sum().backward()
    for name, (constant, factor) in DERIVATIVES[form].items():
        # the printed constants have an error of 5e-8, the data a size of a few units
        error = (getattr(module, name).grad - constant * data[factor]).abs().max().item()
        assert error < PRINTED, name
    assert torch.equal(module.pool.p.grad, torch.zeros(2, dtype=torch.float64))


def test_forms_of_spem_that_are_equal() -> None:
    code = randomise(spem.SPEM(8, form="code").double(), "identity")
    with torch.no_grad():  # with an identity reweight map it has the excitation of text
        code.w_r.fill_(1.0)
        code.b_r.fill_(0.0)
    text = spem.SPEM(8).double()
    text.load_state_dict(code.state_dict())
    x = feature_map(3, 8, 4, 5)
    torch.testing.assert_close(code.gate(x), text.gate(x), **F64)
    explicit = spem.SPEM(8, form="text", reweight="shared_sum", pool=spem.Mix()).double()
    explicit.load_state_dict(text.state_dict())
    assert torch.equal(text(x), explicit(x))
    unshared = spem.SPEM(8, reweight="unshared_sum").double()
    state = dict(text.state_dict())
    unshared.load_state_dict({**state, "w_r2": state["w_r"], "b_r2": state["b_r"]})
    torch.testing.assert_close(unshared(x), text(x), **F64)
    for reweight in set(REWEIGHTS) - {"shared_sum"}:
        with pytest.raises(ValueError, match=r"code.*shared_sum"):
            spem.SPEM(8, form="code", reweight=reweight)


def test_initial_values() -> None:
    """Of norms, and of layers that start as torch's: U(+-1/sqrt(fan in)); see also the gates."""
    triplet, cbam, se, eca = attention.Triplet(8), spem.CBAM(64), spem.SE(64), spem.ECA(64)
    slow = [cbam.norm, triplet.cw.norm, triplet.hc.norm, triplet.hw.norm]
    assert all(norm.momentum == 0.01 for norm in slow)
    norms = [m for name in ALL for m in fresh(name).modules() if isinstance(m, nn.BatchNorm2d)]
    assert sum(norm.momentum == 0.01 for norm in norms) == len(slow)
    assert all(norm.eps == 1e-5 and norm.momentum in (0.01, 0.1) for norm in norms)
    for bias in (cbam.fc1.bias, cbam.fc2.bias, cbam.norm.bias, cbam.norm.weight):
        assert not bias.any()
    assert cbam.spatial.bias is None
    assert eca.conv.bias is None
    for weight, bound in ((se.fc1.weight, 1 / 8), (se.fc2.weight, 1 / 2), (se.fc1.bias, 1 / 8)):
        assert 0.0 < weight.abs().max() <= bound
    assert eca.conv.weight.abs().max() <= 3**-0.5


def test_reset_parameters_restores_what_is_constant_in_a_new_module() -> None:
    for spec in (*ALL, "ge(form=theta_plus)", "gc(fusion=both)", "spem(reweight=unshared_sum)"):
        new, used = fresh(spec), randomise(fresh(spec), "used")
        used.reset_parameters()
        after = dict(used.named_parameters())
        for key, value in new.named_parameters():
            if value.unique().numel() == 1 and value.numel() > 1:
                assert torch.equal(after[key], value), (spec, key)


@EVERY
def test_a_seed_draws_every_random_part_anew(name: str) -> None:
    """By name: equal for a seed, different for another; constants are those of a new module."""
    spec = {"ge": "ge(form=theta_plus)", "gc": "gc(fusion=both)"}.get(name, name)
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed + 5)
        model = spem.resnet(20, attention=spec)
        spem.initialise(model, seed)
        states.append(dict(model.named_parameters()))
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key
        if value.unique().numel() > 1:
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
    """GE: MSRA over the map's positions and 0.01; GC: Kaiming over the channels; CBAM, SK: out."""
    torch.manual_seed(0)
    ge = spem.create_attention("ge(form=theta_plus, reduction=4)", 64, size=(6, 8))
    gc, sk = spem.create_attention("gc", 2048), spem.create_attention("sk", 256)
    cbams = [spem.CBAM(16, kernel=kernel) for kernel in (3, 7) for _ in range(200)]
    if keyed:
        spem.initialise(nn.Sequential(ge, gc, sk, *cbams), 7)
    for layer, variance in (
        (ge.gather, 2 / 48),
        (ge.fc1, 1e-4),
        (ge.fc2, 1e-4),
        (gc.mask, 2 / 2048),
        (sk.near, 2 / (9 * 256)),
        (sk.far, 2 / (9 * 256)),
    ):
        assert layer.weight.var().item() == pytest.approx(variance, rel=0.2)
    for zero in (ge.fc1.bias, ge.fc2.bias, gc.mask.bias, gc.add.fc2.weight, gc.add.fc2.bias):
        assert not zero.any()
    assert gc.add.fc1.bias.any()
    for kernel, own in ((3, cbams[:200]), (7, cbams[200:])):
        weights = torch.cat([module.spatial.weight.detach().flatten() for module in own])
        assert weights.var().item() == pytest.approx(2 / kernel**2, rel=0.1)


def test_the_rules_of_eca_and_gsop() -> None:
    kernels = {16: 3, 32: 3, 64: 3, 128: 5, 256: 5, 512: 5, 1024: 5, 2048: 7}
    assert {c: spem.ECA(c).conv.weight.shape[2] for c in kernels} == kernels
    # t = int(|log2(256) + 3| / 1) = 11
    assert spem.ECA(256, gamma=1, b=3).conv.weight.shape == (1, 1, 11)
    for channels, stride in ((64, 2), (256, 2), (257, 1), (512, 1)):
        assert attention.GSoP(channels, dims=4).reduce.stride == (stride, stride)
