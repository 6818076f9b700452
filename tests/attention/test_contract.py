"""The contract every registered module keeps, each drawn at random in every test."""

from __future__ import annotations

import copy
import inspect
from itertools import product

import pytest
import torch
from attention.cases import (
    ALL,
    EVERY,
    MODES,
    PRECISE,
    REPLACES,
    SIZE,
    C,
    drawn,
    fresh,
    maps,
    said,
    sampled,
)
from attention.drawing import randomise
from tolerance import TOLERANCE
from torch import Tensor, nn

import spem
from spem.attention import Needs

LAYOUTS = (torch.contiguous_format, torch.channels_last)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)
F64 = TOLERANCE[torch.float64]
ALTERNATING = pytest.mark.parametrize(("name", "training"), sampled(ALL, (True, False)), ids=said)


def run(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, all gradients of a weighted sum, and buffers."""
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = module(leaf)
    (out * maps(out.dtype, *out.shape, key="weights")).sum().backward()
    return [out, leaf.grad, *(p.grad for p in module.parameters()), *module.buffers()]


def composed(module: spem.ChannelAttention, x: Tensor) -> Tensor:
    """What forward must be, in the precision of the gate."""
    if module.needs.replaces is not None:
        return module(x)
    y = x * module.gate(x)
    return y + module.shift(x) if module.needs.adds else y


def test_the_registry_and_its_exceptions() -> None:
    """Only these three are no gate times the map, or no gate in the dtype of the statistics."""
    published = (
        "spem se cbam eca srm sge scale bam coord dia ean ela ese fca gc gct ge gsop iebn nam"
    )
    assert {*published.split(), "simam", "sk", "spa", "triplet"} <= set(ALL)
    assert {k: v for k, v in REPLACES.items() if v} == {"iebn": "norm", "sk": "conv"}
    assert [name for name in ALL if fresh(name).needs.adds] == ["gc"]
    assert [name for name in ALL if fresh(name).takes_any_rank()] == (
        ["dia", "ean", "eca", "ese", "gct", "ge", "iebn", "scale", "se", "spem", "srm"]
    )


def test_class_facts() -> None:
    for name in ALL:
        class_facts(name)


def class_facts(name: str) -> None:
    module = fresh(name, dtype=torch.float64)
    assert isinstance(module, spem.ChannelAttention)
    assert module.name == name
    assert isinstance(module.needs, Needs)
    assert module.paper
    assert module.__doc__
    parameters = list(inspect.signature(type(module)).parameters.values())
    assert parameters[0].name == "channels"
    assert {p.kind for p in parameters[1:]} == {inspect.Parameter.KEYWORD_ONLY}
    assert all(p.default is not p.empty for p in parameters[1:])
    assert {"device", "dtype"} <= {p.name for p in parameters}
    assert all(p.dtype == torch.float64 for p in module.parameters())
    empty = fresh(name, device="meta")
    assert all(t.is_meta for t in [*empty.parameters(), *empty.buffers()])
    assert str(module).startswith(f"{type(module).__name__}(")


@pytest.mark.parametrize(
    ("name", "dtype", "layout", "training"), sampled(ALL, DTYPES, LAYOUTS, (True, False)), ids=said
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


@ALTERNATING
def test_layouts_views_and_copies_are_equal(name: str, training: bool) -> None:
    x = maps(torch.float64)
    found = []
    for layout in LAYOUTS:
        module = drawn(name, torch.float64, training=training)
        found.append(run(module, x.clone(memory_format=layout)))
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, **F64)
    module, base = drawn(name, torch.float64, training=False), maps(torch.float64, 4, C, 10, 14)
    for view in (base[:, :, ::2, 1::2], base[:1].expand(3, -1, -1, -1)):
        torch.testing.assert_close(module(view), module(view.contiguous()), **F64)


@ALTERNATING
def test_forward_and_tail_are_made_of_the_gate(name: str, training: bool) -> None:
    """y = x * gate (+ shift); tail(z, residual, norm) = relu(module(norm(z)) + residual)."""
    module = drawn(name, torch.float64, training=training)
    x, residual = maps(torch.float64), maps(torch.float64, key="residual")
    if REPLACES[name] is None:
        torch.testing.assert_close(module(x), composed(module, x), **F64)
        if not module.needs.adds:
            with pytest.raises(NotImplementedError, match=type(module).__name__):
                module.shift(x)
    norm = randomise(nn.BatchNorm2d(C).double(), "tail").train(training)
    other, other_norm = copy.deepcopy(module), copy.deepcopy(norm)
    expected = torch.relu(other(other_norm(x)) + residual)
    torch.testing.assert_close(module.tail(x, residual, norm), expected, **F64)
    pairs = zip(
        [*module.buffers(), *norm.buffers()], [*other.buffers(), *other_norm.buffers()], strict=True
    )
    for actual, wanted in pairs:
        torch.testing.assert_close(actual, wanted, **F64)
    without_norm = torch.relu(copy.deepcopy(module)(x) + residual)
    torch.testing.assert_close(module.tail(x, residual), without_norm, **F64)
    if module.takes_any_rank():
        gate = module.gate_from(spem.ops.plane_stats(x)) if name != "iebn" else None
        if gate is not None:
            torch.testing.assert_close(gate[..., None, None], module.gate(x), **F64)


@pytest.mark.parametrize(
    ("name", "dtype", "training"), sampled(PRECISE, HALVES, (True, False)), ids=said
)
def test_pure_half(name: str, dtype: torch.dtype, training: bool) -> None:
    """Parameters and map in half precision: the gate is the float32 gate of the rounded numbers."""
    half = drawn(name, dtype, training=training)
    full = copy.deepcopy(half).float()
    x = maps(dtype).requires_grad_()
    wide = x.detach().float().requires_grad_()
    gate = half.gate(x)
    assert gate.dtype == torch.float32
    torch.testing.assert_close(gate, full.gate(wide), **TOLERANCE[torch.float32])
    out, expected = half(x), full(wide)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, **TOLERANCE[dtype])
    for statistic, wanted in zip(half.buffers(), full.buffers(), strict=True):
        torch.testing.assert_close(statistic.float(), wanted.float(), **TOLERANCE[dtype])
    out.float().square().mean().backward()
    expected.square().mean().backward()
    leaves = zip([x, *half.parameters()], [wide, *full.parameters()], strict=True)
    for actual, wanted in ((a.grad, b.grad) for a, b in leaves):
        assert torch.isfinite(actual).all()
        assert (actual.float() - wanted).abs().max() < 0.05 * wanted.abs().max().clamp_min(1e-6)


@pytest.mark.parametrize(
    ("name", "dtype", "training"),
    sampled(PRECISE, (torch.float32, torch.bfloat16), (True, False)),
    ids=said,
)
def test_autocast_and_large_numbers(name: str, dtype: torch.dtype, training: bool) -> None:
    """Under autocast the gate is still computed in float32, and the map keeps its dtype."""
    module = drawn(name, training=training)
    x = maps(dtype).requires_grad_()
    expected = copy.deepcopy(module).gate(x.float())
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
        assert parameter.grad.dtype == torch.float32
        assert torch.isfinite(parameter.grad).all()
    half = drawn(name, torch.float16, training=False)
    assert torch.isfinite(half((maps().clamp(-3, 3) * 6e3).half())).all()


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


@pytest.mark.parametrize(
    ("name", "layout", "training"), sampled(ALL, LAYOUTS, (True, False)), ids=said
)
@pytest.mark.usefixtures("deterministic")
def test_two_calls_and_a_loaded_copy_are_the_same_bits(
    name: str, layout: torch.memory_format, training: bool
) -> None:
    x = maps().clone(memory_format=layout)
    found = [run(drawn(name, training=training), x) for _ in range(2)]
    assert all(torch.isfinite(part).all() for part in found[0])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    module, other = drawn(name, training=training), fresh(name).train(training)
    other.load_state_dict(module.state_dict(), strict=True)
    out = other(x)
    assert torch.equal(out, copy.deepcopy(module)(x))
    assert torch.equal(out, module(x))
    if module.state_dict():
        assert not torch.equal(out, fresh(name).train(training)(x))


def compiled_equals_eager(module: nn.Module, x: Tensor, backend: str) -> None:
    other = copy.deepcopy(module)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    found = run(compiled, x)
    for actual, expected in zip(found, run(other, x), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@ALTERNATING
def test_compiles_without_a_graph_break(name: str, training: bool) -> None:
    compiled_equals_eager(drawn(name, training=training), maps(), "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["spem", "se"])
def test_compiles_to_code(name: str) -> None:
    x = maps().contiguous(memory_format=torch.channels_last)
    compiled_equals_eager(drawn(name), x, "inductor")


# ---- what is refused, and the edges


@EVERY
def test_what_is_no_map_of_its_channels_is_refused_in_one_sentence(name: str) -> None:
    """The message names the module and what was found; nothing foreign comes from inside torch."""
    module = drawn(name)
    label = type(module).__name__
    ranks = [] if module.takes_any_rank() else [(2, C, 9), (2, C, 2, 3, 4)]
    for shape in ((4, C), (C,), (4, C, 2, 2, 2, 2), *ranks):
        with pytest.raises(ValueError, match=rf"{label}.*[(\[]{', '.join(map(str, shape))}"):
            module(torch.zeros(shape))
    for channels in (C // 2, C + 1, 1):
        found = rf"{label}.*\b({C}\b.*\b{channels}|{channels}\b.*\b{C})\b"
        with pytest.raises(ValueError, match=found):
            module(torch.zeros(4, channels, 5, 7))
    for dtype in (torch.int64, torch.bool, torch.complex64):
        with pytest.raises(TypeError, match=rf"{label}.*{dtype}"):
            module(torch.zeros(4, C, 5, 7, dtype=dtype))
    for size in ((0, 4), (4, 0)):
        with pytest.raises(ValueError, match=r"at least (1 position|2 positions), got \[.*\]\.$"):
            module(torch.zeros(4, C, *size))
    x = maps()
    for other in (None, x.tolist(), x.numpy(), 3.0, "map"):
        with pytest.raises(TypeError, match=rf"{label}: needs a map .*{type(other).__name__}"):
            module(other)
    if list(module.parameters()):
        with pytest.raises(ValueError, match=rf"{label}: the map is on the meta device"):
            module(x.to("meta"))
    assert fresh(name, device="meta")(x.to("meta")).shape == x.shape
    for channels in (0, -4, True, 2.0):
        with pytest.raises(ValueError, match=rf"channels={channels}"):
            spem.create_attention(name, channels, size=SIZE)


def refused(name: str, *, batch: int, pixels: int, training: bool) -> bool:
    """Whether the module declares that it cannot work on such a map."""
    declared = fresh(name).needs
    few = batch < declared.batch or batch * pixels < declared.values
    return pixels < declared.pixels or (training and few)


@ALTERNATING
def test_small_maps_single_samples_and_none(name: str, training: bool) -> None:
    """They work, or are refused with the need that the module declares."""
    for batch, size in product((1, 4), ((1, 1), (1, 5), (4, 1), (5, 7))):
        module = drawn(name, training=training)
        x = maps(torch.float32, batch, C, *size)
        if refused(name, batch=batch, pixels=size[0] * size[1], training=training):
            with pytest.raises(ValueError, match=rf"{type(module).__name__}.*[{batch}1]"):
                module(x)
        else:
            assert all(torch.isfinite(part).all() for part in run(module, x)[:2])
    module = drawn(name, training=training)
    before = [b.clone() for b in module.buffers()]
    out, gradient, *_ = run(module, torch.zeros(0, C, 5, 7))
    assert out.shape == gradient.shape == (0, C, 5, 7)
    for buffer, old in zip(module.buffers(), before, strict=True):
        assert torch.equal(buffer, old) or not buffer.is_floating_point(), "a statistic moved"


def test_only_these_refuse_small_input() -> None:
    needs = {name: fresh(name).needs for name in ALL}
    assert {k: n.pixels for k, n in needs.items() if n.pixels > 1} == {
        "sge": 2,
        "simam": 2,
        "srm": 2,
    }
    assert {k: n.batch for k, n in needs.items() if n.batch > 1} == {"bam": 2, "sk": 2, "srm": 2}
    values = {"cbam": 2, "gsop": 2, "iebn": 2, "nam": 2, "triplet": 2}  # one has no variance
    assert {k: n.values for k, n in needs.items() if n.values > 1} == values
    with pytest.raises(ValueError, match="SRM: training needs a batch of at least 2 images"):
        drawn("srm")(torch.zeros(1, C, 5, 7))


def test_param_groups_hold_every_parameter_once_and_spare_what_is_declared() -> None:
    """The authors' parameters without weight decay, and those of learned mixes."""
    norm = {"norm.weight", "norm.bias"}
    declared: dict[str, set[str]] = {
        "srm": {"a", "d", *norm},
        "gct": {"beta"},
        "gct(mode=l1)": {"beta"},
        "ge(form=theta)": norm,
        "ge(bias=True, form=theta)": {*norm, "gather.bias"},
        "ge(form=theta_plus)": {*norm, "fc1.bias", "fc2.bias"},
        "spem": {"pool.p"},
        "se(pool=mix(parametrization=sigmoid))": {"pool.logit"},
        "srm(pool=mix(parametrization=anchored))": {"a", "d", "pool.p", *norm},
    }
    for spec in (*ALL, *declared):
        module = spem.create_attention(spec, C, size=8)
        model = nn.ModuleDict({"host": nn.Linear(2, 2), "one": module, "again": module})
        found: dict[str, tuple[float, float]] = {}
        names = {id(p): name for name, p in model.named_parameters()}
        for group in spem.param_groups(model, 0.1, 1e-4, mix_lr=0.003):
            for parameter in group["params"]:
                name = names.pop(id(parameter))
                found[name.removeprefix("one.")] = (group["lr"], group["weight_decay"])
        assert not names
        spared = declared.get(spec, set())
        for name, (rate, decay) in found.items():
            assert decay == (0.0 if name in spared else 1e-4), (spec, name)
            assert rate == (0.003 if name.startswith("pool.") else 0.1), (spec, name)
    module.requires_grad_(False)
    assert sum(len(g["params"]) for g in spem.param_groups(model, 0.1, 1e-4)) == 2


def test_param_groups_know_what_was_parametrised() -> None:
    module = spem.GCT(8)
    torch.nn.utils.parametrize.register_parametrization(module, "beta", nn.Tanh())
    [_, free] = spem.param_groups(module, 0.1, 1e-4)
    assert free["weight_decay"] == 0.0
    assert [id(p) for p in free["params"]] == [id(module.parametrizations.beta.original)]
