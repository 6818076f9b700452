"""The further modules: what their definitions make easy to get wrong."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from attention import oracles
from attention.cases import sampled
from attention.drawing import arrays, feature_map, randomise
from tolerance import TOLERANCE
from torch import nn
from torch.nn import functional as F

import spem
from spem import attention
from spem.attention.fca import TOP
from spem.attention.spa import averaging

NEEDING = ["fca", "ge(form=theta)", "ge(form=theta_plus)"]


def refuses(spec: str, message: str, channels: int = 64, **hint: object) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        spem.create_attention(spec, channels, **hint)


# ---- the size of the map


@pytest.mark.parametrize("spec", NEEDING)
def test_without_a_size_the_message_names_the_option(spec: str) -> None:
    refuses(spec, r"(FCA|GE): needs the size .*option size.*size=32")
    assert spem.create_attention(spec, 64, size=8).needs.size
    for wrong in (0, -3, 7.5, True, (7,), (7, 7, 7), (7, 0), "8"):
        refuses(spec, r"size=.*(positive integer|pair)", size=wrong)


@pytest.mark.parametrize("spec", NEEDING)
def test_a_size_in_the_spec_wins_over_the_hint(spec: str) -> None:
    own = f"{spec.removesuffix(')')}{',' if '(' in spec else '('} size=9)"
    assert spem.create_attention(own, 64, size=32).size == (9, 9)
    assert spem.create_attention(spec, 64, size=(8, 12)).size == (8, 12)
    parsed = spem.AttentionSpec.parse(spec)
    assert parsed.build(64, size=11).size == (11, 11)
    assert spem.AttentionSpec.parse(own.replace("9", "(9, 10)")).build(64).size == (9, 10)


def test_the_others_do_not_care_about_a_hint() -> None:
    for name in spem.list_attention():
        if name != "fca":
            built = spem.create_attention(name, 64, size=3)
            assert not built.needs.size
            assert built.state_dict().keys() == spem.create_attention(name, 64).state_dict().keys()


@pytest.mark.parametrize("spec", NEEDING)
@pytest.mark.parametrize(("depth", "block"), [(11, "bottleneck"), (8, "basic")])
def test_networks_pass_the_sizes_of_their_stages(spec: str, depth: int, block: str) -> None:
    model = spem.resnet(depth, attention=spec, block=block)
    sizes = [stage[0].attention.size for stage in (model.layer1, model.layer2, model.layer3)]
    assert sizes == [(32, 32), (16, 16), (8, 8)]
    x = feature_map(2, 3, 32, 32, dtype=torch.float32)
    assert model(x).shape == (2, 10)
    if spec == "fca":
        assert model(x[..., :24]).shape == (2, 10)
    else:
        with pytest.raises(ValueError, match=r"GE: form='theta.*size=\(32, 32\).*24"):
            model(x[..., :24])


# ---- FcaNet


@pytest.mark.parametrize("size", [6, (6, 32), (32, 4)])
def test_fca_refuses_a_size_that_has_no_frequencies(size: object) -> None:
    refuses("fca", r"FCA: size=.*7 x 7 grid.*average", size=size)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("frequencies=0", "frequencies=0.*1 to 16"),
        ("frequencies=17", "frequencies=17.*1 to 16"),
        ("frequencies=3", "frequencies=3 does not divide channels=64"),
        ("reduction=65", "reduction=65 leaves no hidden unit for channels=64"),
    ],
)
def test_fca_refuses_options(option: str, message: str) -> None:
    refuses(f"fca({option})", message, size=7)


@pytest.mark.parametrize("size", [(7, 7), (8, 16), (14, 7)])
def test_fca_on_maps_of_its_size(size: tuple[int, int]) -> None:
    """No pooling to the size here; the frequencies are scaled by the sides over 7."""
    module = randomise(attention.FCA(32, size=size, reduction=4).double(), "fca")
    x = feature_map(2, 32, *size)
    expected = oracles.fca(arrays(module), x.numpy(), size=size, frequencies=16)
    np.testing.assert_allclose(
        module.gate(x).detach().numpy(), expected, **TOLERANCE[torch.float64]
    )


def test_fca_filters_are_orthonormal_and_the_first_is_the_scaled_average() -> None:
    module = attention.FCA(16, size=32, reduction=2)
    bases = [
        module._cosines(torch.zeros(1, 16, 32, 32, dtype=torch.float64), axis) for axis in (0, 1)
    ]
    filters = (bases[0][:, :, None] * bases[1][:, None, :]).flatten(1)
    torch.testing.assert_close(
        filters @ filters.T, torch.eye(16, dtype=torch.float64), **TOLERANCE[torch.float64]
    )
    torch.testing.assert_close(
        filters[0], torch.full_like(filters[0], 1 / 32), **TOLERANCE[torch.float64]
    )
    assert [f"{u}{v}" for u, v in TOP] == list(oracles.FREQUENCIES)


def test_fca_keeps_no_filters() -> None:
    """So nothing is left without values on the way over the meta device."""
    module = randomise(attention.FCA(64, size=32), "fca")
    assert set(module.state_dict()) == {"fc1.weight", "fc2.weight"}
    assert not list(module.buffers())
    x = feature_map(2, 64, 9, 9, dtype=torch.float32)
    for assign in (False, True):
        empty = attention.FCA(64, size=32, device="meta")
        empty.load_state_dict(module.state_dict(), assign=True) if assign else empty.to_empty(
            device="cpu"
        ).load_state_dict(module.state_dict())
        assert torch.equal(empty(x), module(x))


@pytest.mark.parametrize(("regions", "extent"), [(7, 5), (7, 7), (4, 1), (4, 9), (2, 5), (1, 6)])
def test_averaging_is_adaptive_pooling(regions: int, extent: int) -> None:
    matrix = averaging(regions, extent, device=torch.device("cpu"), dtype=torch.float64)
    x = feature_map(2, 3, extent)
    torch.testing.assert_close(
        x @ matrix.T, F.adaptive_avg_pool1d(x, regions), **TOLERANCE[torch.float64]
    )


def test_spa_pools_like_the_official_layer() -> None:
    module = randomise(attention.SPA(16, reduction=4).double(), "spa")
    for shape in ((3, 16, 8, 8), (3, 16, 7, 3), (3, 16, 1, 2)):
        x = feature_map(*shape)
        z = torch.cat([F.adaptive_avg_pool2d(x, n).flatten(1) for n in (1, 2, 4)], dim=1)
        expected = torch.sigmoid(module.fc2(module.fc1(z).relu()))[..., None, None]
        torch.testing.assert_close(module.gate(x), expected, **TOLERANCE[torch.float64])


# ---- gather-excite


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("ge(form=theta_star)", "form='theta_star'.*theta_minus, theta, theta_plus"),
        ("ge(extent=1)", "extent=1"),
        ("ge(extent=local)", "extent='local'.*global"),
        ("ge(extent=True)", "extent=True"),
        ("ge(form=theta, extent=2)", "'theta'.*global.*extent=2"),
        ("ge(form=theta, pool=max)", "pool='max'.*theta_minus"),
        ("ge(extent=2, pool=max)", "pool='max'.*global"),
        ("ge(form=theta_plus, reduction=65)", "reduction=65 leaves no hidden unit"),
        ("gct(mode=l3)", "mode='l3'.*l2.*l1"),
        ("simam(lam=0)", "lam=0"),
        ("simam(lam=many)", "lam='many'"),
        ("coord(reduction=0)", "reduction=0"),
        ("gc(fusion=sum)", "fusion='sum'.*add.*mul.*both"),
        ("gc(reduction=64)", "reduction=64 leaves only 1 hidden unit.*reduction <= 32"),
        ("gc(reduction=65)", "reduction=65 leaves no hidden unit"),
        ("triplet(kernel=4)", "kernel=4.*odd"),
        ("ela(form=X)", "form='X'.*T, B, S, L"),
        ("ela(norm_groups=0)", "norm_groups=0"),
        ("ela(norm_groups=5)", "norm_groups=5.*channels=64"),
        ("spa(reduction=65)", "reduction=65 leaves no hidden unit"),
        ("gsop(dims=0)", "dims=0"),
        ("gsop(stride=0)", "stride=0"),
    ],
)
def test_wrong_values_are_refused_when_the_module_is_made(spec: str, message: str) -> None:
    refuses(spec, message, size=8)


def test_fewer_channels_than_the_definition_needs() -> None:
    for spec, name in (("fca", "FCA"), ("gc", "GC"), ("spa", "SPA"), ("ela", "ELA")):
        refuses(spec, rf"{name}: .*channels=8", channels=8, size=8)
    refuses("ela(form=S, norm_groups=4)", "ELA: channels a group=8.*channels=12", channels=12)
    assert spem.create_attention("coord", 8).conv.weight.shape == (8, 8, 1, 1)  # at least 8


@pytest.mark.parametrize("form", ["theta", "theta_plus"])
def test_ge_with_parameters_declares_what_it_needs(form: str) -> None:
    module = attention.GE(32, form=form, size=(4, 5))
    assert (module.needs.batch, module.needs.fixed_size) == (2, True)
    assert module.needs.batch_statistics
    with pytest.raises(ValueError, match=r"GE: form='theta.*size=\(4, 5\).*\[2, 32, 5, 4\]"):
        module(feature_map(2, 32, 5, 4, dtype=torch.float32))
    with pytest.raises(ValueError, match="GE: training needs a batch of at least 2 images"):
        module(feature_map(1, 32, 4, 5, dtype=torch.float32))
    assert module.eval()(feature_map(1, 32, 4, 5, dtype=torch.float32)).shape == (1, 32, 4, 5)
    assert not attention.GE(32).needs.fixed_size
    assert attention.GE(32).needs.batch == 1
    assert copy.deepcopy(module).needs == module.needs


def free_of_decay(module: nn.Module) -> set[str]:
    groups = spem.param_groups(nn.Sequential(nn.Linear(2, 2), module), 0.1, 1e-4)
    names = {id(p): name for name, p in module.named_parameters()}
    return {
        names.get(id(p), "outside")
        for group in groups
        if group["weight_decay"] == 0.0
        for p in group["params"]
    }


def test_optimiser_rules() -> None:
    assert free_of_decay(attention.GCT(8)) == {"beta"}
    assert free_of_decay(attention.GCT(8, mode="l1")) == {"beta"}
    norm = {"norm.weight", "norm.bias"}
    assert free_of_decay(attention.GE(32, form="theta", size=4)) == norm
    plus = attention.GE(32, form="theta_plus", size=4)
    assert free_of_decay(plus) == {*norm, "fc1.bias", "fc2.bias"}
    for name in ("coord", "ela", "ese", "fca", "gc", "gsop", "nam", "spa", "triplet"):
        assert not free_of_decay(spem.create_attention(name, 64, size=8)), name


# ---- fused or composed


def test_which_forms_are_functions_of_plane_statistics() -> None:
    for spec in ("gct", "ese", "ese(pool=mix())", "ge", "ge(pool=max)"):
        module = spem.create_attention(spec, 32)
        assert module.why_composed() is None, spec
        assert module.takes_any_rank()
    for spec in ("gct(mode=l1)", "ge(extent=2)", "ge(form=theta)", "nam", "simam", "gc"):
        module = spem.create_attention(spec, 32, size=(4, 5))
        assert not module.takes_any_rank()
        assert "no function of plane statistics" in str(module.why_composed()), spec
        with pytest.raises(ValueError, match=type(module).__name__):
            module(feature_map(2, 32, 9, dtype=torch.float32))
        with pytest.raises(NotImplementedError, match=type(module).__name__):
            module.gate_from(spem.ops.plane_stats(feature_map(2, 32, 4, 5)))
    assert attention.GCT(4).statistics == ("mean", "var")
    assert attention.ESE(4, pool="max").statistics == ("max",)
    assert attention.GE(4, pool=spem.Mix()).statistics == ("max", "min")
    assert attention.GE(4, extent=2).statistics == ()


OTHER_FORMS = (
    "gct(mode=l1)",
    "ge(form=theta)",
    "ge(form=theta_plus)",
    "ge(extent=2)",
    "ge(pool=mix())",
    "ese(pool=mix(0.3))",
    "gc(fusion=mul)",
    "gc(fusion=both)",
    "ela(form=S)",
)


@pytest.mark.parametrize(("spec", "training"), sampled(OTHER_FORMS, (True, False), each=1))
def test_tail_and_autocast_of_other_forms(spec: str, training: bool) -> None:
    module = randomise(spem.create_attention(spec, 32, size=(4, 5)), spec).train(training)
    norm = randomise(nn.BatchNorm2d(32), "norm").train(training)
    z, residual = (feature_map(3, 32, 4, 5, key=k, dtype=torch.float32) for k in "zr")
    other, other_norm = copy.deepcopy(module), copy.deepcopy(norm)
    expected = torch.relu(other(other_norm(z)) + residual)
    torch.testing.assert_close(module.tail(z, residual, norm), expected, **TOLERANCE[torch.float32])
    wanted = copy.deepcopy(module)(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(z)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, wanted, **TOLERANCE[torch.float32])


@pytest.mark.parametrize(
    ("spec", "training"),
    sampled(["gct", "ese", "ese(pool=mix())", "ge", "ge(pool=mix())"], (True, False), each=1),
)
def test_gradients_of_the_fused_tail(spec: str, training: bool) -> None:
    """In the fused operation they are those of the modules one after the other."""
    results = []
    for fused in (True, False):
        module = randomise(spem.create_attention(spec, 16).double(), spec).train(training)
        norm = randomise(nn.BatchNorm2d(16).double(), "norm").train(training)
        z, residual = (feature_map(3, 16, 4, 5, key=k).requires_grad_() for k in "zr")
        out = module.tail(z, residual, norm) if fused else (module(norm(z)) + residual).relu()
        (out * feature_map(3, 16, 4, 5, key="weights")).sum().backward()
        leaves = [z, residual, *module.parameters(), *norm.parameters()]
        results.append([out, *(leaf.grad for leaf in leaves)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, **TOLERANCE[torch.float64])


@pytest.mark.parametrize("spec", ["ge(form=theta_plus)", "gc", "fca", "triplet"])
def test_whole_modules_can_be_saved(spec: str, tmp_path: Path) -> None:
    module = spem.create_attention(spec, 64, size=8)
    torch.save(module, tmp_path / "module.pt")
    again = torch.load(tmp_path / "module.pt", weights_only=False)
    x = feature_map(2, 64, 8, 8, dtype=torch.float32)
    assert torch.equal(again.eval()(x), module.eval()(x))
    assert again.needs == module.needs


# ---- the rest


def test_nam_takes_its_weights_as_constants() -> None:
    """The gradient of gamma leaves out what gamma does through w = |gamma| / sum |gamma|."""
    module = randomise(attention.NAM(8).double(), "nam").eval()
    x, weights = feature_map(2, 8, 3, 4), feature_map(2, 8, 3, 4, key="weights")
    (module(x) * weights).sum().backward()
    norm = copy.deepcopy(module.norm)
    norm.weight.grad = None
    share = (norm.weight.abs() / norm.weight.abs().sum()).reshape(8, 1, 1)
    (x * torch.sigmoid(share.detach() * norm(x)) * weights).sum().backward()
    torch.testing.assert_close(
        module.norm.weight.grad, norm.weight.grad, **TOLERANCE[torch.float64]
    )
    full = copy.deepcopy(module.norm)
    full.weight.grad = None
    share = (full.weight.abs() / full.weight.abs().sum()).reshape(8, 1, 1)
    (x * torch.sigmoid(share * full(x)) * weights).sum().backward()
    assert not torch.allclose(full.weight.grad, norm.weight.grad)
    assert module.needs.stops_gradients == ("norm.weight",)


def test_gc_weighs_positions_by_a_softmax() -> None:
    """With a mask of zeros all positions count the same; the scores' level does not matter."""
    module = randomise(attention.GC(8, reduction=2).double(), "gc")
    x = feature_map(2, 8, 3, 4)
    before = module(x)
    with torch.no_grad():
        module.mask.bias.add_(5.0)
    torch.testing.assert_close(module(x), before, **TOLERANCE[torch.float64])
    with torch.no_grad():
        module.mask.weight.zero_()
    torch.testing.assert_close(module._context(x), x.mean((2, 3)), **TOLERANCE[torch.float64])


def test_ela_shares_its_layers_between_the_axes() -> None:
    module = randomise(attention.ELA(32).double(), "ela")
    x = feature_map(2, 32, 5, 6)
    turned = module(x.transpose(2, 3)).transpose(2, 3)
    torch.testing.assert_close(module(x), turned, **TOLERANCE[torch.float64])


def test_gct_l2_and_l1_differ() -> None:
    l2 = randomise(attention.GCT(8).double(), "gct")
    l1 = attention.GCT(8, mode="l1").double()
    l1.load_state_dict(l2.state_dict())
    x = feature_map(2, 8, 3, 4)
    assert not torch.allclose(l1.gate(x), l2.gate(x))


@pytest.mark.parametrize("shape", [(1, 64, 1, 1), (1, 64, 2, 2), (1, 64, 1, 2)])
def test_gsop_refuses_to_train_on_one_value(shape: tuple[int, ...]) -> None:
    module = attention.GSoP(64, dims=4)
    with pytest.raises(ValueError, match=r"GSoP: training needs"):
        module(torch.ones(shape))
    assert torch.isfinite(module.eval()(torch.ones(shape))).all()


def test_specs_keep_their_text() -> None:
    for text in (
        "fca(frequencies=8, size=(32, 16))",
        "ge(form=theta_plus, size=16)",
        "ge(extent='global')",
        "gc(fusion=both, reduction=4)",
        "gct(mode=l1)",
        "simam(lam=0.1)",
        "ela(form=T)",
    ):
        assert str(spem.AttentionSpec.parse(text)) == text
        assert re.match(r"\w+", text)[0] in spem.list_attention()
