"""What the modules are when they are new: gates, derivatives, initial values, parameter counts."""

from __future__ import annotations

import math

import pytest
import torch
from attention.cases import POOLS, REWEIGHTS
from attention.drawing import feature_map, randomise
from tolerance import PRINTED, TOLERANCE
from torch import nn

import spem

# gate at initialisation of text (and of code) and of figure, as the facts print them
START = {
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


def assert_start(module: nn.Module, expected: float) -> None:
    for training in (True, False):
        gate = module.train(training).gate(
            feature_map(3, 8, 4, 5, key="start", dtype=torch.float32)
        )
        assert (gate - expected).abs().max().item() < PRINTED
    assert module.start_gate == pytest.approx(expected, abs=PRINTED)


@pytest.mark.parametrize("form", ["text", "figure"])
def test_start_of_every_reweight(form: str) -> None:
    for reweight in REWEIGHTS:
        assert_start(spem.SPEM(8, form=form, reweight=reweight), START[reweight][form == "figure"])


@pytest.mark.parametrize("form", ["text", "figure", "code"])
def test_start_does_not_depend_on_the_pool(form: str) -> None:
    for make_pool, _ in POOLS.values():
        module = spem.SPEM(8, form=form, pool=make_pool())
        assert_start(module, START["shared_sum"][form == "figure"])


def test_default_form_is_text() -> None:
    module = randomise(spem.SPEM(8).double(), "default")
    explicit = spem.SPEM(8, form="text", reweight="shared_sum", pool=spem.Mix()).double()
    explicit.load_state_dict(module.state_dict())
    x = feature_map(2, 8, 3, 3)
    assert torch.equal(module(x), explicit(x))


def test_start_of_the_others() -> None:
    assert_start(spem.SRM(8), 0.5)
    assert_start(spem.SGE(8, groups=4), 0.7310586)
    assert_start(spem.Scale(8), 0.0320586)
    assert_start(spem.Scale(8, start=0.25), 0.25)
    for module in (spem.SE(64), spem.CBAM(64), spem.ECA(64)):
        assert module.start_gate is None


def test_code_has_the_shared_sum_only() -> None:
    for reweight in set(REWEIGHTS) - {"shared_sum"}:
        with pytest.raises(ValueError, match=r"code.*shared_sum"):
            spem.SPEM(8, form="code", reweight=reweight)


# derivative of the gate at initialisation: (constant, times which data) of the facts' table
DERIVATIVES = {
    "text": {
        "w_e": (0.0234367, "u"),
        "b_e": (0.0234367, "1"),
        "w_r": (0.0282371, "sum"),
        "b_r": (0.0564742, "1"),
    },
    "code": {
        "w_e": (-0.0234367, "1"),
        "b_e": (0.0234367, "1"),
        "w_r": (0.0282371, "sum"),
        "b_r": (0.0564742, "1"),
    },
    "figure": {
        "w_e": (0.0296951, "u"),
        "b_e": (0.0296951, "1"),
        "w_r": (-0.0261554, "sum"),
        "b_r": (-0.0523107, "1"),
    },
}


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


def test_code_with_an_identity_reweight_map_has_the_excitation_of_text() -> None:
    code = randomise(spem.SPEM(8, form="code").double(), "identity")
    with torch.no_grad():
        code.w_r.fill_(1.0)
        code.b_r.fill_(0.0)
    text = spem.SPEM(8, form="text").double()
    text.load_state_dict(code.state_dict())
    x = feature_map(3, 8, 4, 5)
    torch.testing.assert_close(code.gate(x), text.gate(x), **TOLERANCE[torch.float64])


def test_shared_equals_unshared_when_both_maps_are_equal() -> None:
    shared = randomise(spem.SPEM(8).double(), "shared")
    unshared = spem.SPEM(8, reweight="unshared_sum").double()
    state = dict(shared.state_dict())
    unshared.load_state_dict({**state, "w_r2": state["w_r"], "b_r2": state["b_r"]})
    x = feature_map(3, 8, 4, 5)
    torch.testing.assert_close(unshared(x), shared(x), **TOLERANCE[torch.float64])
    with torch.no_grad():  # the second map is the one of the minimum
        unshared.w_r2.zero_()
    x[:, :, 0, 0] += 10.0
    lowered = x.clone()
    lowered[:, :, 1, 1] = x.flatten(2).amin(-1) - 1.0
    only_excitation = spem.SPEM(8, reweight="unshared_sum", pool="max").double()
    only_excitation.load_state_dict(
        {k: v for k, v in unshared.state_dict().items() if k != "pool.p"}
    )
    assert torch.equal(only_excitation.gate(x), only_excitation.gate(lowered))


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("channels", [64, 128, 256])
def test_parameter_counts(channels: int) -> None:
    c = channels
    se = c * c // 8 + c // 16 + c
    assert count(spem.SE(c)) == se
    assert count(spem.SE(c, bias=False)) == c * c // 8
    assert count(spem.CBAM(c)) == se + 100
    assert count(spem.ECA(c)) == (3 if c == 64 else 5)
    assert count(spem.ECA(c, kernel=3)) == 3
    assert count(spem.SRM(c)) == 4 * c
    assert count(spem.SGE(c)) == 128
    assert count(spem.SGE(c, groups=8)) == 16
    assert count(spem.Scale(c)) == c
    for form in ("text", "figure", "code"):
        assert count(spem.SPEM(c, form=form)) == 4 * c + 2
        assert count(spem.SPEM(c, form=form, pool=spem.Mix(0.5))) == 4 * c
        assert (
            count(spem.SPEM(c, form=form, pool=spem.Mix(parametrization="anchored"))) == 4 * c + 2
        )
        assert count(spem.SPEM(c, form=form, pool=spem.Mix(parametrization="sigmoid"))) == 4 * c + 1


def test_parameter_counts_of_the_reweight_variants() -> None:
    for reweight in REWEIGHTS:
        expected = {"unshared_sum": 6 * 64 + 2, "none": 2 * 64 + 2}.get(reweight, 4 * 64 + 2)
        for form in ("text", "figure"):
            assert count(spem.SPEM(64, form=form, reweight=reweight)) == expected


def test_initial_values_of_spem() -> None:
    module = spem.SPEM(5, reweight="unshared_sum")
    for name, value in (
        ("w_e", 0.0),
        ("b_e", -1.0),
        ("w_r", 0.0),
        ("b_r", -1.0),
        ("w_r2", 0.0),
        ("b_r2", -1.0),
    ):
        assert torch.equal(getattr(module, name).detach(), torch.full((5,), value)), name


def test_initial_values_of_the_others() -> None:
    srm = spem.SRM(8)
    assert not srm.a.any()
    assert not srm.d.any()
    assert (srm.norm.weight == 1).all()
    assert not srm.norm.bias.any()
    assert srm.norm.eps == 1e-5
    sge = spem.SGE(8, groups=4)
    assert sge.w.shape == sge.b.shape == (4,)
    assert not sge.w.any()
    assert (sge.b == 1).all()
    se = spem.SE(64)
    assert se.fc1.weight.abs().max() <= 1 / 8  # PyTorch's Linear: U(+-1/sqrt(fan in))
    assert se.fc2.weight.abs().max() <= 1 / 2
    assert se.fc1.bias.any()
    eca = spem.ECA(64)
    assert eca.conv.weight.abs().max() <= 3**-0.5
    assert eca.conv.bias is None


def test_initial_values_of_cbam() -> None:
    cbam = spem.CBAM(64)
    for bias in (cbam.fc1.bias, cbam.fc2.bias, cbam.norm.bias, cbam.norm.weight):
        assert not bias.any()
    assert cbam.fc1.weight.any()
    assert cbam.spatial.bias is None
    assert cbam.spatial.weight.shape == (1, 2, 7, 7)
    assert (cbam.norm.momentum, cbam.norm.eps) == (0.01, 1e-5)
    x = feature_map(3, 64, 4, 5, dtype=torch.float32)
    channel = torch.sigmoid(
        sum(cbam.fc2(cbam.fc1(v).relu()) for v in (x.mean((2, 3)), x.amax((2, 3))))
    )
    gate = cbam.gate(x)  # the spatial gate is exactly one half
    torch.testing.assert_close(
        gate, 0.5 * channel[..., None, None].expand_as(gate), **TOLERANCE[torch.float32]
    )


@pytest.mark.parametrize("kernel", [3, 7])
def test_cbam_convolution_is_drawn_with_variance_2_over_fan_out(kernel: int) -> None:
    weights = torch.cat(
        [spem.CBAM(16, kernel=kernel).spatial.weight.detach().flatten() for _ in range(200)]
    )
    assert weights.var().item() == pytest.approx(2 / kernel**2, rel=0.1)


@pytest.mark.parametrize("start", ["spem", "se", "cbam", "eca", "srm", "sge", "scale"])
def test_reset_parameters_restores_the_constants(start: str) -> None:
    """reset_parameters sets every parameter that is constant in a new module."""
    fresh = spem.create_attention(start, 64)
    used = randomise(spem.create_attention(start, 64), "used")
    used.reset_parameters()
    after = used.state_dict()
    for name, value in fresh.state_dict().items():
        if (
            name.endswith("running_mean")
            or name.endswith("running_var")
            or name.endswith("num_batches_tracked")
        ):
            continue
        if value.unique().numel() == 1 and value.numel() > 1:
            assert torch.equal(after[name], value), name


@pytest.mark.parametrize(
    ("channels", "kernel"),
    [(16, 3), (32, 3), (64, 3), (128, 5), (256, 5), (512, 5), (1024, 5), (2048, 7)],
)
def test_eca_kernel_rule(channels: int, kernel: int) -> None:
    t = int(abs(math.log2(channels) + 1) / 2)
    assert kernel == (t if t % 2 else t + 1)
    assert spem.ECA(channels).conv.weight.shape == (1, 1, kernel)


def test_eca_kernel_rule_with_other_constants() -> None:
    # t = int(|log2(256) + 3| / 1) = 11
    assert spem.ECA(256, gamma=1, b=3).conv.weight.shape == (1, 1, 11)
