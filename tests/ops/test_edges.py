"""Tails at the edges: gradients of odd strides, NaN and infinity, empty batches, repeated calls."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from ops.tails import error, home, pairwise, tail
from ops.test_tail import needs
from tolerance import TAIL
from torch import Tensor, nn

import spem
from spem.ops import PlaneStats, bn_gate_tail, gate_tail

SHAPE = (4, 5, 3, 6)
KINDS = {"formula": torch.float64, "numba": torch.float32, "triton": torch.float32}
IMPLS = pytest.mark.parametrize(("impl", "dtype"), KINDS.items(), ids=KINDS)
SOME = ("none", "spem", "se(reduction=1)")


def gradients(y: Tensor, grad: Tensor, *inputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(y, inputs, grad))


@IMPLS
@pytest.mark.parametrize("kind", ["sum", "expanded", "permuted", "channels_last", "sliced"])
def test_incoming_gradients_of_any_strides(impl: str, dtype: torch.dtype, kind: str) -> None:
    needs(impl, dtype, home(impl))
    t = tail("spem", SHAPE, dtype=dtype, device=home(impl))
    rng = torch.Generator().manual_seed(3)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=rng, dtype=torch.float64).to(home(impl), dtype)

    grad = {
        "sum": lambda: torch.ones((), dtype=dtype).to(home(impl)).expand(SHAPE),
        "expanded": lambda: draw(SHAPE[0], 1, SHAPE[2], 1).expand(SHAPE),
        "permuted": lambda: draw(*SHAPE[::-1]).permute(3, 2, 1, 0),
        "channels_last": lambda: draw(*SHAPE).contiguous(memory_format=torch.channels_last),
        "sliced": lambda: draw(SHAPE[0], SHAPE[1], SHAPE[2], 2 * SHAPE[3])[..., ::2],
    }[kind]()
    inputs = list(t.parameters().values())
    found = gradients(t.forward(impl), grad, *inputs)
    expected = gradients(t.forward(impl), grad.contiguous(), *inputs)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@IMPLS
@pytest.mark.parametrize("kind", ["expanded", "channels_last", "sliced"])
def test_residuals_of_any_strides(impl: str, dtype: torch.dtype, kind: str) -> None:
    needs(impl, dtype, home(impl))
    t = tail("spem", SHAPE, dtype=dtype, device=home(impl))
    plain = t.residual.detach()
    wide = torch.cat([plain, plain], 3)
    residual = {
        "expanded": plain[:, :1, :, :1].expand(SHAPE),
        "channels_last": plain.contiguous(memory_format=torch.channels_last),
        "sliced": wide[..., : SHAPE[3]],
    }[kind].requires_grad_()
    t.residual = residual
    y = t.forward(impl)
    t.residual = residual.detach().contiguous()
    torch.testing.assert_close(y, t.forward(impl), rtol=0, atol=0)
    assert y.stride() == t.z.stride()
    (grad,) = gradients(y, torch.ones_like(y), residual)
    assert grad.shape == residual.shape
    torch.testing.assert_close(grad, (y.detach() > 0).to(dtype), rtol=0, atol=0)


@IMPLS
@pytest.mark.parametrize("gate", ["spem", "se(reduction=1,pool=mix())", "srm", "wavy"])
def test_identical_calls_give_identical_bits(impl: str, dtype: torch.dtype, gate: str) -> None:
    needs(impl, dtype, home(impl))
    first = tail(gate, (4, 5, 7, 9), dtype=dtype, device=home(impl)).results(impl)
    again = tail(gate, (4, 5, 7, 9), dtype=dtype, device=home(impl)).results(impl)
    assert first.keys() == again.keys()
    for name, value in first.items():
        assert torch.equal(value, again[name]), name


@pairwise(impl=KINDS, gate=SOME)
def test_parameters_changed_in_place_between_calls(impl: str, gate: str) -> None:
    dtype = KINDS[impl]
    needs(impl, dtype, home(impl))
    t = tail(gate, SHAPE, dtype=dtype, device=home(impl))
    t.results(impl)
    torch.optim.SGD(t.parameters().values(), lr=0.05).step()
    expected, found = copy.deepcopy(t).results("reference"), t.results(impl)
    for name, value in expected.items():
        assert error(found[name], value) <= 10 * TAIL[dtype], name


@IMPLS
def test_parameters_may_change_between_forward_and_backward(impl: str, dtype: torch.dtype) -> None:
    """The norm's gradient is that of the forward pass it belongs to, whatever came after."""
    needs(impl, dtype, home(impl))
    t = tail("none", SHAPE, dtype=dtype, device=home(impl))
    expected = gradients(t.forward(impl), t.weights, t.z)[0]
    y = t.forward(impl)
    with torch.no_grad():
        t.norm.weight.mul_(-3)
        t.norm.bias.add_(1)
    torch.testing.assert_close(gradients(y, t.weights, t.z)[0], expected, rtol=0, atol=0)


@pairwise(impl=KINDS, training=(True, False), gate=SOME)
def test_an_empty_batch(impl: str, training: bool, gate: str) -> None:
    needs(impl, torch.float32, home(impl))
    norm = "train" if training else "eval"
    t = tail(gate, (0, 3, 4, 4), norm, dtype=torch.float32, device=home(impl))
    found = t.results(impl)
    expected = tail(gate, (0, 3, 4, 4), norm).results("reference")
    assert found["y"].shape == (0, 3, 4, 4)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double().cpu(), value, rtol=1e-6, atol=1e-6)


@pairwise(
    impl=KINDS,
    gate=SOME,
    norm=("train", "eval", "none"),
    value=(float("nan"), float("inf"), float("-inf")),
    position=(0, 7),
    recorded=(True, False),
)
def test_nan_and_infinity(
    impl: str, gate: str, norm: str, value: float, position: int, recorded: bool
) -> None:
    """The output is NaN and infinite exactly where composed modules make it so."""
    dtype = KINDS[impl]
    needs(impl, dtype, home(impl))
    layout = torch.channels_last if position else torch.contiguous_format
    t = tail(gate, (3, 5, 4, 5), norm, dtype=dtype, memory_format=layout, device=home(impl))
    with torch.no_grad():
        t.z[1, 3, position // 5, position % 5] = value
        t.z[2, 4, position // 5, position % 5] = value
        if t.norm is not None:
            t.norm.weight[4] = 0.0  # 0 times what is not finite is NaN
    with torch.set_grad_enabled(recorded):
        found = copy.deepcopy(t).forward(impl).detach()
        expected = t.forward("reference").detach()
    torch.testing.assert_close(found.isnan(), expected.isnan())
    torch.testing.assert_close(found.isinf(), expected.isinf())
    clean = expected.isfinite()
    assert error(found[clean], expected[clean]) <= 10 * TAIL[dtype]


@pairwise(
    impl=KINDS,
    gate=(*SOME, "srm"),
    size=(1e18, 1e25, 1e30),
    layout=(torch.contiguous_format, torch.channels_last),
)
def test_large_numbers_stay_finite_in_training(
    impl: str, gate: str, size: float, layout: torch.memory_format
) -> None:
    """Their squares overflow: then torch's norm has a factor of 0, and so has the fused one."""
    needs(impl, torch.float32, home(impl))
    t = tail(gate, (4, 5, 8, 8), dtype=torch.float32, memory_format=layout, device=home(impl))
    with torch.no_grad():
        t.z.mul_(size)
    expected, found = copy.deepcopy(t).results("reference"), t.results(impl)
    for name, value in expected.items():
        if name == "var":
            assert not found[name].isnan().any()
            continue
        assert value.isfinite().all(), name
        assert found[name].isfinite().all(), name
    if size < 1e19:  # the variance itself does not overflow
        exact = tail(gate, (4, 5, 8, 8))
        with torch.no_grad():
            exact.z.copy_(t.z)
        expected = exact.results("reference")
        assert error(found["y"], expected["y"]) < 1e-5
        assert error(found["var"], expected["var"]) < 1e-5


@IMPLS
def test_nan_in_the_residual_stays(impl: str, dtype: torch.dtype) -> None:
    needs(impl, dtype, home(impl))
    t = tail("spem", SHAPE, dtype=dtype, device=home(impl))
    with torch.no_grad():
        t.residual[2, 1, 0, 3] = float("nan")
    y = t.forward(impl)
    assert y.isnan().nonzero().tolist() == [[2, 1, 0, 3]]
    (grad,) = gradients(y, torch.ones_like(y), t.residual)
    assert grad[2, 1, 0, 3] == 1  # as torch.relu: the gradient passes where y is not <= 0


@IMPLS
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_first_of_equal_extrema_gets_the_gradient(
    impl: str, dtype: torch.dtype, sign: float
) -> None:
    """Planes of two levels: max and min tie many times; -0.0 and 0.0 are equal."""
    needs(impl, dtype, home(impl))
    plane = torch.tensor([[0.0, 2, -0.0], [-1, 2, -1], [2, 0, -1]], dtype=dtype)
    zeros = torch.tensor([[-0.0, 0, 0], [0, -3, 0], [-0.0, 0, -3]], dtype=dtype)
    for layout in (torch.contiguous_format, torch.channels_last):
        z = torch.stack([plane, zeros])[None].expand(2, 2, 3, 3).to(home(impl))
        z = z.contiguous(memory_format=layout).requires_grad_()
        residual = torch.full_like(z, 10.0).contiguous(memory_format=layout)

        def gate(stats: PlaneStats) -> Tensor:
            assert stats.max is not None
            assert stats.min is not None
            return 2 * stats.max + sign * 0.5 * stats.min

        y = gate_tail(z, residual, gate, impl=impl)
        (found,) = gradients(y, torch.ones_like(y), z)
        expected = torch.zeros(2, 2, 9, dtype=dtype)
        for c, flat in enumerate((plane.flatten().tolist(), zeros.flatten().tolist())):
            high, low = max(flat), min(flat)
            expected[:, c] = 2 * high + sign * 0.5 * low
            expected[:, c, flat.index(high)] += 2 * sum(flat)
            expected[:, c, flat.index(low)] += sign * 0.5 * sum(flat)
        torch.testing.assert_close(found.flatten(2).cpu(), expected)


@pairwise(impl=KINDS, gate=SOME)
def test_a_second_derivative_is_refused(impl: str, gate: str) -> None:
    """Of every first one, also where it does not depend on the gate."""
    dtype = KINDS[impl]
    needs(impl, dtype, home(impl))
    for name in tail(gate, SHAPE, dtype=dtype, device=home(impl)).parameters():
        t = tail(gate, SHAPE, dtype=dtype, device=home(impl))
        wanted = t.parameters()[name]
        ones = torch.ones_like(t.z.detach())
        expected = gradients(t.forward(impl), ones, wanted)[0]
        (grad,) = torch.autograd.grad(t.forward(impl).sum(), wanted, create_graph=True)
        # With a graph SPEM's gate is differentiated operation by operation, without one by hand.
        torch.testing.assert_close(grad, expected)
        with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
            grad.sum().backward()


@IMPLS
def test_only_what_needs_a_gradient_gets_one(impl: str, dtype: torch.dtype) -> None:
    needs(impl, dtype, home(impl))
    for frozen in ("z", "residual", "gamma", "beta", "w_e", "pool.p"):
        t = tail("spem", SHAPE, dtype=dtype, device=home(impl))
        full = t.results(impl)
        t.parameters()[frozen].requires_grad_(False)
        part = t.results(impl)
        assert f"d {frozen}" not in part
        for name, value in part.items():
            if name.startswith("d "):
                torch.testing.assert_close(value, full[name], rtol=0, atol=0)


@IMPLS
def test_statistics_may_be_all_that_is_used(impl: str, dtype: torch.dtype) -> None:
    """A gate whose value is multiplied away still gives finite gradients."""
    needs(impl, dtype, home(impl))
    t = tail("none", SHAPE, dtype=dtype, device=home(impl))

    def nothing(stats: PlaneStats) -> Tensor:
        assert stats.max is not None
        return 0.0 * stats.max

    y = bn_gate_tail(t.z, t.residual, t.norm, nothing, impl=impl)
    torch.testing.assert_close(y, t.residual.relu(), rtol=0, atol=0)
    y.sum().backward()
    assert t.z.grad.isfinite().all()


@IMPLS
@pytest.mark.parametrize("shape", [(3, 4, 6), (2, 3, 2, 3, 4)], ids=["1d", "3d"])
def test_maps_of_other_rank(impl: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    needs(impl, dtype, home(impl))
    rng = torch.Generator().manual_seed(1)
    z = torch.randn(shape, generator=rng).to(home(impl), dtype).requires_grad_()
    residual = torch.randn(shape, generator=rng).to(home(impl), dtype)
    kind = nn.BatchNorm1d if len(shape) == 3 else nn.BatchNorm3d
    found, expected = [], []
    for out, how in ((found, impl), (expected, "reference")):
        norm = kind(shape[1], dtype=dtype, device=home(impl))
        module = spem.SPEM(shape[1], dtype=dtype, device=home(impl))
        nn.init.constant_(module.w_e, 0.7)
        y = bn_gate_tail(z, residual, norm, module.gate_from, impl=how)
        out += [y.detach(), *gradients(y, residual, z, norm.weight, module.w_e)]
    for a, b in zip(found, expected, strict=True):
        assert error(a, b) <= 10 * TAIL[dtype]


def test_devices_are_checked() -> None:
    z = torch.randn(2, 3, 4, 4)
    with pytest.raises(ValueError, match="the map is on cpu, the residual on meta"):
        gate_tail(z, z.to("meta"))
    with pytest.raises(ValueError, match="the map is on cpu, the norm on meta"):
        bn_gate_tail(z, z, nn.BatchNorm2d(3, device="meta"), impl="formula")
    with pytest.raises(ValueError, match="the gate's value on meta"):
        gate_tail(z, z, lambda _: torch.ones(2, 3, device="meta"), impl="formula")


def test_transforms_and_tracers_get_the_reference() -> None:
    """What follows tensors by other means than autograd is not handed to kernels."""
    model = spem.resnet(11, attention="spem").eval()
    plain = spem.resnet(11).eval()
    x = torch.randn(2, 3, 8, 8)
    state = dict(model.named_parameters())

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, weights, (x,)).square().sum()

    found = torch.func.grad(loss)(state)["layer1.0.bn3.weight"]
    model(x).square().sum().backward()
    torch.testing.assert_close(found, model.layer1[0].bn3.weight.grad, rtol=1e-3, atol=1e-4)
    traced = torch.fx.symbolic_trace(plain)
    torch.testing.assert_close(traced(x), plain(x), rtol=1e-4, atol=1e-5)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as fake:
        assert plain(fake.from_tensor(x)).shape == (2, 10)


def test_exports_get_the_reference() -> None:
    model = spem.resnet(11, attention="spem").eval()
    x = torch.randn(2, 3, 8, 8)
    graph = torch.export.export(model, (x,)).graph
    assert not any("spem" in str(node.target) for node in graph.nodes)


def keeping(
    gate: Callable[[PlaneStats], Tensor], kept: dict[str, tuple[Tensor, Tensor, int]]
) -> Callable[[PlaneStats], Tensor]:
    """The gate, whose value is written down."""

    def wrapped(stats: PlaneStats) -> Tensor:
        v = gate(stats)
        kept["v"] = (v, v.detach().clone(), v._version)
        return v

    return wrapped


@pairwise(
    impl=("reference", "formula", "numba", "triton"),
    layout=(torch.contiguous_format, torch.channels_last),
    norm=("eval", "train", "none"),
)
def test_nothing_that_was_given_is_written(
    impl: str, layout: torch.memory_format, norm: str
) -> None:
    """z, the residual and the gate keep values and versions, with gradients and without."""
    needs(impl, torch.float32, home(impl))
    for gate, grad in itertools.product(("none", "spem", "se(reduction=1)"), (False, True)):
        t = tail(gate, SHAPE, norm, dtype=torch.float32, memory_format=layout, device=home(impl))
        kept = {name: (x, x.detach().clone(), x._version) for name, x in t.parameters().items()}
        if t.gate is not None:
            t.gate.gate_from = keeping(t.gate.gate_from, kept)
        with torch.set_grad_enabled(grad):
            y = t.forward(impl)
        for name, (now, then, version) in kept.items():
            assert torch.equal(now, then), name
            assert now._version == version, name
            assert y.data_ptr() != now.data_ptr(), name


@pairwise(
    impl=("reference", "formula", None),
    attention=(None, "spem", "eca"),
    watched=("conv", "conv bn3"),
)
def test_what_hooks_hold_keeps_its_values(
    impl: str | None, attention: str | None, watched: str
) -> None:
    """Outputs of every convolution and last norm, as a feature extractor keeps them."""
    if impl == "formula" and "bn3" in watched:
        impl = "reference"  # the formula refuses norms with hooks
    model = spem.resnet(11, attention=attention).eval()
    held: list[tuple[str, Tensor, Tensor]] = []
    for name, module in model.named_modules():
        if any(kind in name.rpartition(".")[2] for kind in watched.split()):
            module.register_forward_hook(
                lambda _m, _i, y, name=name: held.append((name, y, y.clone()))
            )
    with torch.no_grad(), spem.ops.use_impl(impl):
        model(torch.randn(16, 3, 32, 32))
    assert len({name for name, *_ in held}) > 8
    assert [name for name, now, then in held if not torch.equal(now, then)] == []
