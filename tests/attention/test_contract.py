"""The contract every registered module keeps, each drawn at random in every test."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator

import pytest
import torch
from attention.drawing import randomise
from attention.registered import (
    ALL,
    EVERY,
    MODES,
    PRECISE,
    REPLACES,
    C,
    drawn,
    fresh,
    maps,
    sampled,
)
from tolerance import TOLERANCE
from torch import Tensor, nn

import spem

LAYOUTS = (torch.contiguous_format, torch.channels_last)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)
PRECISE_NAMES = [name for name in ALL if REPLACES[name] != "conv"]


ALTERNATING = sampled(ALL, (True, False), each=1)
ALTERNATING_GATES = [(name, training) for name, training in ALTERNATING if REPLACES[name] is None]


def said(value: object) -> str:
    """What a test is called."""
    modes = {True: "train", False: "eval"}
    return modes[value] if isinstance(value, bool) else str(value).removeprefix("torch.")


def test_the_registry_holds_the_published_modules() -> None:
    assert {"spem", "se", "cbam", "eca", "srm", "sge", "scale"} <= set(ALL)
    wide = "bam coord dia ean ela ese fca gc gct ge gsop iebn nam simam sk spa triplet"
    assert set(wide.split()) <= set(ALL)
    assert sorted(ALL) == list(ALL)


@EVERY
def test_class_facts(name: str) -> None:
    module = fresh(name)
    assert isinstance(module, spem.ChannelAttention)
    assert module.name == name
    assert isinstance(module.needs, spem.Needs)
    assert isinstance(module.paper, str)
    assert module.__doc__
    parameters = list(inspect.signature(type(module)).parameters.values())
    assert parameters[0].name == "channels"
    assert all(
        p.kind is inspect.Parameter.KEYWORD_ONLY and p.default is not p.empty
        for p in parameters[1:]
    )
    assert {"device", "dtype"} <= {p.name for p in parameters}
    float64_gate(name)
    dtype_and_device_are_honoured(name)
    views_and_expanded_maps_are_taken(name)


def composed(module: spem.ChannelAttention, x: Tensor) -> Tensor:
    """What forward must be, in the precision of the gate."""
    if module.needs.replaces is not None:
        return module(x)
    y = x * module.gate(x)
    return y + module.shift(x) if module.needs.adds else y


@pytest.mark.parametrize(
    ("name", "dtype", "layout", "training"),
    sampled(ALL, DTYPES, LAYOUTS, (True, False), each=2),
    ids=said,
)
def test_shape_dtype_and_memory_format(
    name: str, dtype: torch.dtype, layout: torch.memory_format, training: bool
) -> None:
    module = drawn(name, dtype, training=training)
    x = maps(dtype).clone(memory_format=layout).requires_grad_()
    before, version = x.detach().clone(), x._version
    out = module(x)
    assert out.shape == x.shape
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=layout)
    out.float().sum().backward()
    assert x.grad.dtype == dtype
    assert x._version == version
    assert torch.equal(x.detach(), before)


@pytest.mark.parametrize(("name", "training"), ALTERNATING, ids=said)
def test_channels_last_equals_contiguous(name: str, training: bool) -> None:
    x = maps(torch.float64)
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        module = drawn(name, torch.float64, training=training)
        leaf = x.clone(memory_format=layout).requires_grad_()
        out = module(leaf)
        (out * maps(torch.float64, key="weights")).sum().backward()
        results.append([out, leaf.grad, *(p.grad for p in module.parameters()), *module.buffers()])
    for actual, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual, expected, **TOLERANCE[torch.float64])


def views_and_expanded_maps_are_taken(name: str) -> None:
    module = drawn(name, torch.float64, training=False)
    base = maps(torch.float64, 4, C, 10, 14)
    strided = base[:, :, ::2, 1::2]
    torch.testing.assert_close(
        module(strided), module(strided.contiguous()), **TOLERANCE[torch.float64]
    )
    expanded = base[:1].expand(3, -1, -1, -1)
    torch.testing.assert_close(
        module(expanded), module(expanded.contiguous()), **TOLERANCE[torch.float64]
    )


@pytest.mark.parametrize(
    ("name", "dtype", "training"),
    sampled(PRECISE_NAMES, HALVES, (True, False), each=1),
    ids=said,
)
def test_pure_half(name: str, dtype: torch.dtype, training: bool) -> None:
    """Parameters and map in half precision: the gate is the float32 gate of the rounded numbers."""
    half = drawn(name, dtype, training=training)
    full = copy.deepcopy(half).float()
    x = maps(dtype)
    expected = full.gate(x.float())
    gate = half.gate(x)
    assert gate.dtype == torch.float32
    torch.testing.assert_close(gate, expected, **TOLERANCE[torch.float32])
    out = half(x)
    assert out.dtype == dtype
    assert torch.isfinite(out).all()
    torch.testing.assert_close(out.float(), full(x.float()), **TOLERANCE[dtype])
    for statistic, wanted in zip(half.buffers(), full.buffers(), strict=True):
        torch.testing.assert_close(statistic.float(), wanted.float(), **TOLERANCE[dtype])


@pytest.mark.parametrize(("name", "dtype"), sampled(PRECISE_NAMES, HALVES, each=1), ids=said)
def test_gradients_in_pure_half(name: str, dtype: torch.dtype) -> None:
    half = drawn(name, dtype)
    full = copy.deepcopy(half).float()
    gradients = []
    for module, x in ((half, maps(dtype)), (full, maps(dtype).float())):
        x.requires_grad_()
        module(x).float().square().mean().backward()
        gradients.append([x.grad, *(p.grad for p in module.parameters())])
    for actual, expected in zip(*gradients, strict=True):
        assert torch.isfinite(actual).all()
        size = expected.abs().max().clamp_min(1e-6)
        assert (actual.float() - expected).abs().max() / size < 0.05


@pytest.mark.parametrize(
    ("name", "dtype", "training"),
    sampled(PRECISE_NAMES, (torch.float32, torch.bfloat16), (True, False), each=1),
    ids=said,
)
def test_autocast(name: str, dtype: torch.dtype, training: bool) -> None:
    """Under autocast the gate is still computed in float32, and the map keeps its dtype."""
    module = drawn(name, training=training)
    reference = copy.deepcopy(module)
    x = maps(dtype).requires_grad_()
    expected = reference.gate(x.float())
    wanted = composed(copy.deepcopy(module), x.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gate = module.gate(x)
        out = module(x)
    assert gate.dtype == torch.float32
    torch.testing.assert_close(gate, expected, **TOLERANCE[torch.float32])
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), wanted, **TOLERANCE[dtype])
    out.float().sum().backward()
    for parameter in module.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert torch.isfinite(parameter.grad).all()


def half_map_through_a_float32_module(name: str) -> None:
    module = drawn(name, training=False)
    x = maps(torch.bfloat16)
    out = module(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), module(x.float()), **TOLERANCE[torch.bfloat16])


@PRECISE
def test_large_float16_values_do_not_overflow(name: str) -> None:
    module = drawn(name, torch.float16, training=False)
    x = (maps().clamp(-3, 3) * 6e3).half()
    assert torch.isfinite(module(x)).all()
    half_map_through_a_float32_module(name)


def float64_gate(name: str) -> None:
    assert drawn(name, torch.float64).gate(maps(torch.float64)).dtype == torch.float64


@pytest.mark.parametrize(("name", "training"), ALTERNATING_GATES, ids=said)
def test_forward_is_the_map_times_the_gate(name: str, training: bool) -> None:
    """And plus the shift, for a module that declares one."""
    module = drawn(name, torch.float64, training=training)
    x = maps(torch.float64)
    torch.testing.assert_close(module(x), composed(module, x), **TOLERANCE[torch.float64])
    if not module.needs.adds:
        with pytest.raises(NotImplementedError, match=type(module).__name__):
            module.shift(x)


def test_the_declared_parts_of_the_contract() -> None:
    """Only these three are no gate times the map, or no gate in the dtype of the statistics."""
    assert {k: v for k, v in REPLACES.items() if v} == {"iebn": "norm", "sk": "conv"}
    assert [name for name in ALL if fresh(name).needs.adds] == ["gc"]


@MODES
def test_a_convolution_in_half_precision(training: bool) -> None:
    """Its branches are computed as any convolution of the network is, its gate in float32."""
    full = drawn("sk", training=training)
    half, x = copy.deepcopy(full).bfloat16(), maps()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = copy.deepcopy(full)(x)
    assert out.dtype == torch.bfloat16
    expected = copy.deepcopy(full)(x)
    for actual in (out, half(x.bfloat16())):
        assert (actual.float() - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize(("name", "training"), ALTERNATING, ids=said)
def test_tail(name: str, training: bool) -> None:
    """tail(z, residual, norm) = relu(module(norm(z)) + residual)."""
    module = drawn(name, torch.float64, training=training)
    norm = randomise(nn.BatchNorm2d(C).double(), "tail").train(training)
    z, residual = maps(torch.float64), maps(torch.float64, key="residual")
    other, other_norm = copy.deepcopy(module), copy.deepcopy(norm)
    expected = torch.relu(other(other_norm(z)) + residual)
    torch.testing.assert_close(module.tail(z, residual, norm), expected, **TOLERANCE[torch.float64])
    for actual, wanted in zip(
        [*module.buffers(), *norm.buffers()], [*other.buffers(), *other_norm.buffers()], strict=True
    ):
        torch.testing.assert_close(actual, wanted, **TOLERANCE[torch.float64])
    without_norm = torch.relu(copy.deepcopy(module)(z) + residual)
    torch.testing.assert_close(module.tail(z, residual), without_norm, **TOLERANCE[torch.float64])


@pytest.mark.parametrize(("name", "training"), ALTERNATING, ids=said)
def test_state_dict_round_trip(name: str, training: bool) -> None:
    module = drawn(name, training=training)
    other = fresh(name).train(training)
    x = maps()
    result = other.load_state_dict(module.state_dict(), strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    out = other(x)
    assert torch.equal(out, module(x))
    assert torch.equal(copy.deepcopy(module)(x), module(x))
    if module.state_dict():
        assert not torch.equal(out, fresh(name).train(training)(x))


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Deterministic algorithms on; uninitialised memory is then filled with NaN as well."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("name", "layout", "training"), sampled(ALL, LAYOUTS, (True, False), each=1), ids=said
)
@pytest.mark.usefixtures("deterministic")
def test_two_calls_are_the_same_bits(
    name: str, layout: torch.memory_format, training: bool
) -> None:
    results = []
    for _ in range(2):
        module = drawn(name, training=training)
        x = maps().clone(memory_format=layout).requires_grad_()
        out = module(x)
        out.square().sum().backward()
        assert torch.isfinite(out).all()
        assert torch.isfinite(x.grad).all()
        results.append([out, x.grad, *(p.grad for p in module.parameters()), *module.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def compiled_equals_eager(module: nn.Module, x: Tensor, backend: str) -> None:
    other = copy.deepcopy(module)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    results = []
    for function, owner in ((compiled, module), (other, other)):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        out = function(leaf)
        (out * maps(key="weights", dtype=x.dtype)).sum().backward()
        results.append([out, leaf.grad, *(p.grad for p in owner.parameters()), *owner.buffers()])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "training"), ALTERNATING, ids=said)
def test_compiles_without_a_graph_break(name: str, training: bool) -> None:
    compiled_equals_eager(drawn(name, training=training), maps(), "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["spem", "se"])
def test_compiles_to_code(name: str) -> None:
    compiled_equals_eager(
        drawn(name), maps().contiguous(memory_format=torch.channels_last), "inductor"
    )


def dtype_and_device_are_honoured(name: str) -> None:
    module = fresh(name, dtype=torch.float64)
    assert all(p.dtype == torch.float64 for p in module.parameters())
    empty = fresh(name, device="meta")
    assert all(t.is_meta for t in [*empty.parameters(), *empty.buffers()])
