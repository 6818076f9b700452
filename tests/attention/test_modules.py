"""What the definitions of single modules make easy to get wrong."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from attention import oracles
from attention.cases import sampled
from attention.drawing import arrays, feature_map, randomise
from tolerance import TOLERANCE
from torch import Tensor, nn
from torch.nn import functional as F

import spem
from spem import attention
from spem.attention import dia, eca
from spem.attention.fca import TOP
from spem.attention.spa import averaging

F64, F32 = TOLERANCE[torch.float64], TOLERANCE[torch.float32]

# ---- the size of the map


@pytest.mark.parametrize("spec", ["fca", "ge(form=theta)", "ge(form=theta_plus)"])
def test_modules_built_for_a_size(spec: str) -> None:
    """The spec's own wins over the hint; networks pass those of their stages; none is refused."""
    message = r"(FCA|GE): needs the size .*option size.*size=32"
    with pytest.raises(ValueError, match=message):
        spem.create_attention(spec, 64)
    for wrong in (0, -3, 7.5, True, (7,), (7, 7, 7), (7, 0), "8"):
        with pytest.raises(ValueError, match=r"size=.*(positive integer|pair)"):
            spem.create_attention(spec, 64, size=wrong)
    assert spem.create_attention(spec, 64, size=(8, 12)).size == (8, 12)
    own = f"{spec.removesuffix(')')}{',' if '(' in spec else '('} size=(9, 10))"
    assert spem.create_attention(own, 64, size=32).size == (9, 10)
    model = spem.resnet(8, attention=spec, block="basic")
    sizes = [stage[0].attention.size for stage in (model.layer1, model.layer2, model.layer3)]
    assert sizes == [(32, 32), (16, 16), (8, 8)]
    x = feature_map(2, 3, 32, 32, dtype=torch.float32)
    assert model(x).shape == (2, 10)
    if spec == "fca":
        assert model(x[..., :24]).shape == (2, 10)
    else:
        with pytest.raises(ValueError, match=r"GE: form='theta.*size=\(32, 32\).*24"):
            model(x[..., :24])
        module = spem.create_attention(spec, 64, size=8)
        assert (module.needs.batch, module.needs.batch_statistics) == (2, True)
        assert module.needs.fixed_size
        assert copy.deepcopy(module).needs == module.needs
        with pytest.raises(ValueError, match="GE: training needs a batch of at least 2 images"):
            module(x.new_ones(1, 64, 8, 8))
        assert module.eval()(x.new_ones(1, 64, 8, 8)).shape == (1, 64, 8, 8)
    assert not attention.GE(32).needs.fixed_size
    for name in set(spem.list_attention()) - {"fca"}:
        assert not spem.create_attention(name, 64, size=3).needs.size


# ---- FcaNet and SPA


@pytest.mark.parametrize("size", [(7, 7), (8, 16), (14, 7)])
def test_fca_on_maps_of_its_size(size: tuple[int, int]) -> None:
    """No pooling to the size here; the frequencies are scaled by the sides over 7."""
    module = randomise(attention.FCA(32, size=list(size), reduction=4).double(), "fca")
    x = feature_map(2, 32, *size)
    expected = oracles.fca(arrays(module), x.numpy(), size=size, frequencies=16)
    np.testing.assert_allclose(module.gate(x).detach().numpy(), expected, **F64)


def test_fca_filters() -> None:
    """Orthonormal, the first the scaled average; none is kept, so none is lost on meta."""
    module = randomise(attention.FCA(16, size=32, reduction=2), "fca")
    x = torch.zeros(1, 16, 32, 32, dtype=torch.float64)
    rows, columns = module._cosines(x, 0), module._cosines(x, 1)
    filters = (rows[:, :, None] * columns[:, None, :]).flatten(1)
    torch.testing.assert_close(filters @ filters.T, torch.eye(16, dtype=torch.float64), **F64)
    torch.testing.assert_close(filters[0], torch.full_like(filters[0], 1 / 32), **F64)
    assert tuple(f"{u}{v}" for u, v in TOP) == oracles.FREQUENCIES
    assert set(module.state_dict()) == {"fc1.weight", "fc2.weight"}
    assert not list(module.buffers())
    x = feature_map(2, 16, 9, 9, dtype=torch.float32)
    for assign in (False, True):
        empty = attention.FCA(16, size=32, reduction=2, device="meta")
        empty = empty if assign else empty.to_empty(device="cpu")
        empty.load_state_dict(module.state_dict(), assign=assign)
        assert torch.equal(empty(x), module(x))


def test_spa_pools_like_the_official_layer() -> None:
    for regions, extent in ((7, 5), (7, 7), (4, 1), (4, 9), (2, 5), (1, 6)):
        matrix = averaging(regions, extent, device=torch.device("cpu"), dtype=torch.float64)
        x = feature_map(2, 3, extent)
        torch.testing.assert_close(x @ matrix.T, F.adaptive_avg_pool1d(x, regions), **F64)
    module = randomise(attention.SPA(16, reduction=4).double(), "spa")
    for shape in ((3, 16, 8, 8), (3, 16, 7, 3), (3, 16, 1, 2)):
        x = feature_map(*shape)
        z = torch.cat([F.adaptive_avg_pool2d(x, n).flatten(1) for n in (1, 2, 4)], dim=1)
        expected = torch.sigmoid(module.fc2(module.fc1(z).relu()))[..., None, None]
        torch.testing.assert_close(module.gate(x), expected, **F64)


# ---- fused or composed


def test_which_forms_are_functions_of_plane_statistics() -> None:
    for spec in ("gct", "ese(pool=mix())", "ge", "ge(pool=max)"):
        module = spem.create_attention(spec, 32)
        assert module.why_composed() is None, spec
        assert module.takes_any_rank()
    for spec in ("gct(mode=l1)", "ge(extent=2)", "ge(form=theta)", "nam", "simam", "gc"):
        module = spem.create_attention(spec, 32, size=(4, 5))
        assert not module.takes_any_rank()
        assert "not a function of plane statistics" in str(module.why_composed()), spec
        with pytest.raises(ValueError, match=type(module).__name__):
            module(feature_map(2, 32, 9, dtype=torch.float32))
        with pytest.raises(NotImplementedError, match=type(module).__name__):
            module.gate_from(spem.ops.plane_stats(feature_map(2, 32, 4, 5)))
    assert attention.GCT(4).statistics == ("mean", "var")
    assert attention.ESE(4, pool="max").statistics == ("max",)
    assert attention.GE(4, pool=spem.Mix()).statistics == ("max", "min")
    assert attention.GE(4, extent=2).statistics == ()


def test_a_gate_of_its_own_is_not_left_out_of_the_tail() -> None:
    """A subclass that overrides `gate` alone is composed, though it inherits `gate_from`."""

    class Doubled(spem.SE):
        def gate(self, x: Tensor) -> Tensor:
            return 2 * super().gate(x)

    module = randomise(Doubled(32).double(), "doubled")
    z = feature_map(3, 32, 4, 5)
    torch.testing.assert_close(module.tail(z, z), torch.relu(module(z) + z), **F64)
    assert "forward of its own" in str(module.why_composed())


def test_nor_is_a_forward_of_a_module_that_carries_a_state() -> None:
    class Doubled(spem.DIA):
        def forward(self, x: Tensor, state: dia.State | None = None) -> Tensor | dia.Step:
            y, after = super().forward(x, state or ())
            return 2 * y if state is None else (2 * y, after)

    module = randomise(Doubled(32).double(), "doubled")
    z = feature_map(3, 32, 4, 5)
    torch.testing.assert_close(module.tail(z, z), torch.relu(module(z) + z), **F64)
    first, state = module(z, ())
    one, two = module.begin(2)
    torch.testing.assert_close(one(z, z), torch.relu(first + z), **F64)
    torch.testing.assert_close(two(z, z), torch.relu(module(z, state)[0] + z), **F64)
    assert "forward of its own" in str(module.why_composed())


OTHER_FORMS = (
    "gct(mode=l1)",
    "ge(form=theta)",
    "ge(form=theta_plus)",
    "ge(extent=2)",
    "gc(fusion=mul)",
    "gc(fusion=both)",
    "ela(form=S)",
)


@pytest.mark.parametrize(("spec", "training"), sampled(OTHER_FORMS, (True, False)))
def test_tail_autocast_and_saving_of_other_forms(spec: str, training: bool, tmp_path: Path) -> None:
    module = randomise(spem.create_attention(spec, 32, size=(4, 5)), spec).train(training)
    norm = randomise(nn.BatchNorm2d(32), "norm").train(training)
    z, residual = (feature_map(3, 32, 4, 5, key=k, dtype=torch.float32) for k in "zr")
    other, other_norm = copy.deepcopy(module), copy.deepcopy(norm)
    expected = torch.relu(other(other_norm(z)) + residual)
    torch.testing.assert_close(module.tail(z, residual, norm), expected, **F32)
    torch.save(module, tmp_path / "module.pt")
    again = torch.load(tmp_path / "module.pt", weights_only=False)
    wanted = again(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(z)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, wanted, **F32)
    assert again.needs == module.needs


@pytest.mark.parametrize(
    ("spec", "training"),
    sampled(["gct", "ese", "ese(pool=mix())", "ge(pool=mix())"], (True, False)),
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
        torch.testing.assert_close(actual, expected, **F64)


# ---- single modules


def test_nam_takes_its_weights_as_constants() -> None:
    """The gradient of gamma leaves out what gamma does through w = |gamma| / sum |gamma|."""
    module = randomise(attention.NAM(8).double(), "nam").eval()
    x, weights = feature_map(2, 8, 3, 4), feature_map(2, 8, 3, 4, key="weights")
    (module(x) * weights).sum().backward()
    found = {}
    for whole in (False, True):
        norm = copy.deepcopy(module.norm)
        norm.weight.grad = None
        share = (norm.weight.abs() / norm.weight.abs().sum()).reshape(8, 1, 1)
        gate = torch.sigmoid((share if whole else share.detach()) * norm(x))
        (x * gate * weights).sum().backward()
        found[whole] = norm.weight.grad
    torch.testing.assert_close(module.norm.weight.grad, found[False], **F64)
    assert not torch.allclose(found[True], found[False])


def test_gc_weighs_positions_by_a_softmax() -> None:
    """With a mask of zeros all positions count the same; the scores' level does not matter."""
    module = randomise(attention.GC(8, reduction=2).double(), "gc")
    x = feature_map(2, 8, 3, 4)
    before = module(x)
    with torch.no_grad():
        module.mask.bias.add_(5.0)
    torch.testing.assert_close(module(x), before, **F64)
    with torch.no_grad():
        module.mask.weight.zero_()
    torch.testing.assert_close(module._context(x), x.mean((2, 3)), **F64)


def test_ela_shares_its_layers_between_the_axes() -> None:
    module = randomise(attention.ELA(32).double(), "ela")
    x = feature_map(2, 32, 5, 6)
    turned = module(x.transpose(2, 3)).transpose(2, 3)
    torch.testing.assert_close(module(x), turned, **F64)


@pytest.mark.parametrize("shape", [(1, 64, 1, 1), (1, 64, 2, 2)])
def test_gsop_refuses_to_train_on_one_value(shape: tuple[int, ...]) -> None:
    module = attention.GSoP(64, dims=4)
    with pytest.raises(ValueError, match=r"GSoP: training needs"):
        module(torch.ones(shape))
    assert torch.isfinite(module.eval()(torch.ones(shape))).all()


@pytest.mark.parametrize("training", [True, False])
def test_iebn_is_a_batch_norm_that_takes_its_weights(training: bool) -> None:
    module, norm = attention.IEBN(8).double(), nn.BatchNorm2d(8).double()
    for m in (module, norm):
        m.train(training)
    for key in range(3):
        x = feature_map(4, 8, 5, 7, key=key)
        expected = norm(x) * module.start_gate  # weight 1, bias 0
        torch.testing.assert_close(module(x), expected, **F64)
    for name, buffer in norm.named_buffers():
        torch.testing.assert_close(module.get_buffer(name), buffer, **F64)


@pytest.mark.parametrize("training", [True, False])
def test_sk_with_a_stride_is_the_oracle(training: bool) -> None:
    for shape in ((3, 8, 6, 6), (3, 8, 5, 8)):
        module = randomise(attention.SK(8, stride=2).double(), "stride").train(training)
        x, options = feature_map(*shape), {"groups": 8, "pool": "avg", "stride": 2}
        share, expected = oracles.sk_both(arrays(module), x.numpy(), training=training, **options)
        gate = copy.deepcopy(module).gate(x).detach()
        np.testing.assert_allclose(gate.numpy(), share, **F64)
        np.testing.assert_allclose(module(x).detach().numpy(), expected, **F64)
    module = randomise(attention.SK(64).double(), "softmax")
    assert module.fc.weight.shape == (32, 64)  # z is at least 32 wide
    assert attention.SK(1024).fc.weight.shape == (64, 1024)
    with torch.no_grad():  # with equal maps from z the branches count the same
        module.fc_near.weight.copy_(module.fc_far.weight)
    gate = module.gate(feature_map(2, 64, 4, 4))
    torch.testing.assert_close(gate, torch.full_like(gate, 0.5), **F64)


# ---- ECA's filter as shifted products


@pytest.mark.parametrize(("channels", "kernel"), [(1, 1), (2, 5), (64, 3), (64, 7), (300, 5)])
def test_products_are_the_convolution(
    kernel: int, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = spem.ECA(channels, kernel=kernel).double()
    x = torch.randn(30, channels, 2, 2, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(30, channels, 1, 1, dtype=torch.float64)
    found: list[tuple[Tensor, ...]] = []
    for few in (0, 1 << 30):
        monkeypatch.setattr(eca, "_FEW", few)
        gate = module.gate(x)
        assert _comes_from_a_convolution(gate) == (few > 0)
        gradients = torch.autograd.grad((gate * weights).sum(), [x, module.conv.weight])
        found.append((gate, *gradients))
    torch.testing.assert_close(found[0], found[1])
    filtered = F.conv1d(x.mean((2, 3))[:, None], module.conv.weight, padding=kernel // 2)
    torch.testing.assert_close(found[0][0][..., 0, 0], torch.sigmoid(filtered[:, 0]))


def _comes_from_a_convolution(t: Tensor) -> bool:
    rest = [t.grad_fn]
    while rest:
        node = rest.pop()
        if "Convolution" in type(node).__name__:
            return True
        rest += [n for n, _ in getattr(node, "next_functions", ())]
    return False


def test_large_descriptors_call_hooks_compile_export_and_map() -> None:
    module = spem.ECA(64).eval()
    x = torch.randn(128, 64, 3, 3)
    expected = module(x)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    program = torch.export.export(module, (x,), strict=False)
    torch.testing.assert_close(program.module()(x), expected)
    assert "conv1d" in str(program.graph)
    stacked = torch.stack([x, 2 * x])
    mapped = torch.stack([module(one) for one in stacked])
    torch.testing.assert_close(torch.vmap(module)(stacked), mapped)
    called: list[str] = []
    module.conv.register_forward_hook(lambda *_: called.append("after"))
    module.conv.register_forward_pre_hook(lambda *_: called.append("before"))
    module(x)
    assert called == ["before", "after"]


class _Doubled(nn.Conv1d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    "layer",
    [
        _Doubled(1, 1, 3, padding=1, bias=False),
        nn.Conv1d(1, 1, 3, padding=1, bias=True),
        nn.Conv1d(1, 1, 3, padding=2, dilation=2, bias=False),
        nn.Conv1d(1, 1, 3, padding=1, bias=False, padding_mode="circular"),
        nn.Conv1d(1, 1, 13, padding=6, bias=False),
    ],
    ids=["own forward", "bias", "dilation", "padding mode", "many taps"],
)
def test_another_layer_in_its_place_is_called(layer: nn.Conv1d) -> None:
    """So that the result does not depend on the size of the batch."""
    module = spem.ECA(64)
    module.conv = layer
    x = torch.randn(80, 64, 2, 2)
    torch.testing.assert_close(module(x), torch.cat([module(one[None]) for one in x]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_wide_in_batches_of_all_sizes(dtype: torch.dtype) -> None:
    module = spem.ECA(64).to(dtype)
    x = torch.randn(80, 64, 2, 2).to(dtype)
    alone = torch.cat([module(one[None]) for one in x])
    torch.testing.assert_close(module(x), alone)
    wide = spem.ECA(64)
    wide.load_state_dict(module.state_dict())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = wide(x)
    assert again.dtype == dtype
    torch.testing.assert_close(again, alone)
