"""The contract every registered module keeps, each drawn at random in every test."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator

import pytest
import torch
from attention.drawing import feature_map, randomise
from tolerance import TOLERANCE
from torch import Tensor, nn

import spem

C = 64
ALL = spem.list_attention()
EVERY = pytest.mark.parametrize("name", ALL)
MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
LAYOUTS = pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)
DTYPES = pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.bfloat16, torch.float16],
    ids=lambda d: str(d).split(".")[1],
)
HALVES = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d).split(".")[1]
)


def drawn(
    name: str, dtype: torch.dtype = torch.float32, *, training: bool = True
) -> spem.ChannelAttention:
    return randomise(spem.create_attention(name, C), "contract", name).to(dtype).train(training)


def maps(dtype: torch.dtype = torch.float32, *shape: int, key: object = "contract") -> Tensor:
    return feature_map(*(shape or (4, C, 5, 7)), key=key, dtype=dtype)


def needs(name: str) -> spem.Needs:
    return type(spem.create_attention(name, C)).needs


def refused(name: str, *, batch: int, pixels: int, training: bool) -> bool:
    """Whether the module declares that it cannot work on such a map."""
    declared = needs(name)
    return pixels < declared.pixels or (training and batch < declared.batch)


def test_the_registry_holds_the_published_modules() -> None:
    assert {"spem", "se", "cbam", "eca", "srm", "sge", "scale"} <= set(ALL)
    assert sorted(ALL) == list(ALL)


@EVERY
def test_class_facts(name: str) -> None:
    module = spem.create_attention(name, C)
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


@EVERY
@DTYPES
@LAYOUTS
@MODES
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


@EVERY
@MODES
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


@EVERY
def test_views_and_expanded_maps_are_taken(name: str) -> None:
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


@EVERY
@HALVES
@MODES
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


@EVERY
@HALVES
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


@EVERY
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16], ids=["float32 map", "bfloat16 map"]
)
@MODES
def test_autocast(name: str, dtype: torch.dtype, training: bool) -> None:
    """Under autocast the gate is still computed in float32, and the map keeps its dtype."""
    module = drawn(name, training=training)
    reference = copy.deepcopy(module)
    x = maps(dtype)
    expected = reference.gate(x.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gate = module.gate(x)
        out = module(x)
    assert gate.dtype == torch.float32
    torch.testing.assert_close(gate, expected, **TOLERANCE[torch.float32])
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), x.float() * expected, **TOLERANCE[dtype])
    out.float().sum().backward()
    for parameter in module.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert torch.isfinite(parameter.grad).all()


@EVERY
def test_half_map_through_a_float32_module(name: str) -> None:
    module = drawn(name, training=False)
    x = maps(torch.bfloat16)
    out = module(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), module(x.float()), **TOLERANCE[torch.bfloat16])


@EVERY
def test_large_float16_values_do_not_overflow(name: str) -> None:
    module = drawn(name, torch.float16, training=False)
    x = (maps().clamp(-3, 3) * 6e3).half()
    assert torch.isfinite(module(x)).all()


@EVERY
def test_float64_gate(name: str) -> None:
    assert drawn(name, torch.float64).gate(maps(torch.float64)).dtype == torch.float64


@EVERY
@MODES
def test_forward_is_the_map_times_the_gate(name: str, training: bool) -> None:
    module = drawn(name, torch.float64, training=training)
    x = maps(torch.float64)
    torch.testing.assert_close(module(x), x * module.gate(x), **TOLERANCE[torch.float64])


@EVERY
@MODES
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


@EVERY
@MODES
def test_state_dict_round_trip(name: str, training: bool) -> None:
    module = drawn(name, training=training)
    other = spem.create_attention(name, C).train(training)
    x = maps()
    result = other.load_state_dict(module.state_dict(), strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    out = other(x)
    assert torch.equal(out, module(x))
    assert torch.equal(copy.deepcopy(module)(x), module(x))
    assert not torch.equal(out, spem.create_attention(name, C).train(training)(x))


@EVERY
@MODES
def test_two_calls_are_bitwise_equal(name: str, training: bool) -> None:
    results = []
    for _ in range(2):
        module = drawn(name, training=training)
        x = maps().requires_grad_()
        out = module(x)
        out.square().sum().backward()
        results.append([out, x.grad, *(p.grad for p in module.parameters()), *module.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Deterministic algorithms on; uninitialised memory is then filled with NaN as well."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@EVERY
@MODES
@LAYOUTS
@pytest.mark.usefixtures("deterministic")
def test_deterministic_algorithms(name: str, layout: torch.memory_format, training: bool) -> None:
    module = drawn(name, training=training)
    x = maps().clone(memory_format=layout).requires_grad_()
    out = module(x)
    out.square().sum().backward()
    assert torch.isfinite(out).all()
    assert torch.isfinite(x.grad).all()


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


@EVERY
@MODES
def test_compiles_without_a_graph_break(name: str, training: bool) -> None:
    compiled_equals_eager(drawn(name, training=training), maps(), "aot_eager")


@pytest.mark.parametrize("name", ["spem", "se"])
def test_compiles_to_code(name: str) -> None:
    compiled_equals_eager(
        drawn(name), maps().contiguous(memory_format=torch.channels_last), "inductor"
    )


@EVERY
def test_dtype_and_device_are_honoured(name: str) -> None:
    module = spem.create_attention(name, C, dtype=torch.float64)
    assert all(p.dtype == torch.float64 for p in module.parameters())
    empty = spem.create_attention(name, C, device="meta")
    assert all(t.is_meta for t in [*empty.parameters(), *empty.buffers()])


@EVERY
@pytest.mark.parametrize("shape", [(4, C), (C,), (4, C, 2, 2, 2, 2)], ids=["2", "1", "6"])
def test_a_wrong_rank_is_refused(name: str, shape: tuple[int, ...]) -> None:
    module = drawn(name)
    with pytest.raises(
        ValueError, match=rf"{type(module).__name__}.*[(\[]{', '.join(map(str, shape))}"
    ):
        module(torch.zeros(shape))


@EVERY
@pytest.mark.parametrize("channels", [C // 2, C + 1, 1])
def test_a_wrong_channel_count_is_refused(name: str, channels: int) -> None:
    module = drawn(name)
    with pytest.raises(
        ValueError, match=rf"{type(module).__name__}.*\b({C}\b.*\b{channels}|{channels}\b.*\b{C})\b"
    ):
        module(torch.zeros(4, channels, 5, 7))


@EVERY
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_a_wrong_dtype_is_refused(name: str, dtype: torch.dtype) -> None:
    module = drawn(name)
    with pytest.raises((TypeError, ValueError), match=rf"{type(module).__name__}.*{dtype}"):
        module(torch.zeros(4, C, 5, 7, dtype=dtype))


@EVERY
@pytest.mark.parametrize("channels", [0, -4])
def test_a_wrong_number_of_channels_is_refused_at_construction(name: str, channels: int) -> None:
    with pytest.raises(ValueError, match=rf"{channels}"):
        spem.create_attention(name, channels)


@EVERY
@pytest.mark.parametrize("size", [(0, 4), (4, 0)], ids=str)
def test_a_map_without_pixels_is_refused(name: str, size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"empty|at least"):
        drawn(name)(torch.zeros(4, C, *size))


@EVERY
@MODES
def test_empty_batch(name: str, training: bool) -> None:
    module = drawn(name, training=training)
    before = [b.clone() for b in module.buffers()]
    x = torch.zeros(0, C, 5, 7, requires_grad=True)
    out = module(x)
    assert out.shape == x.shape
    assert out.dtype == x.dtype
    out.sum().backward()
    assert x.grad.shape == x.shape
    for buffer, old in zip(module.buffers(), before, strict=True):
        assert torch.isfinite(buffer.double()).all()
        if buffer.is_floating_point():
            assert torch.equal(buffer, old), "no sample may move a running statistic"


@EVERY
@MODES
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (4, 1), (5, 7)], ids=str)
def test_small_maps_and_single_samples(
    name: str, batch: int, size: tuple[int, int], training: bool
) -> None:
    """They work, or are refused with the need that the module declares."""
    module = drawn(name, training=training)
    x = maps(torch.float32, batch, C, *size).requires_grad_()
    if refused(name, batch=batch, pixels=size[0] * size[1], training=training):
        with pytest.raises(ValueError, match=type(module).__name__):
            module(x)
        return
    if name == "cbam" and training and batch == 1 and size == (1, 1):
        with pytest.raises(ValueError, match="CBAM"):  # one value has no batch variance
            module(x)
        return
    out = module(x)
    assert out.shape == x.shape
    assert torch.isfinite(out).all()
    out.square().sum().backward()
    assert torch.isfinite(x.grad).all()


def test_only_the_declared_modules_refuse_small_input() -> None:
    """SGE needs two pixels, SRM two training samples; no other published module may refuse."""
    assert refused("sge", batch=4, pixels=1, training=False)
    assert not refused("sge", batch=1, pixels=2, training=True)
    assert refused("srm", batch=1, pixels=4, training=True)
    assert not refused("srm", batch=1, pixels=4, training=False)
    assert not refused("srm", batch=2, pixels=4, training=True)
    for name in ("spem", "se", "eca", "cbam", "scale"):
        assert not refused(name, batch=1, pixels=1, training=True)


def test_the_refusals_name_the_need() -> None:
    with pytest.raises(ValueError, match=r"SGE.*(2|two).*1"):
        drawn("sge")(torch.zeros(4, C, 1, 1))
    with pytest.raises(ValueError, match=r"SRM.*(2|two).*1"):
        drawn("srm")(torch.zeros(1, C, 5, 7))


@EVERY
def test_extra_ranks(name: str) -> None:
    """A module that writes gate_from takes lines and volumes; the others refuse by name."""
    module = drawn(name, training=False)
    takes = type(module).gate_from is not spem.ChannelAttention.gate_from
    for shape in ((2, C, 9), (2, C, 2, 3, 4)):
        x = maps(torch.float32, *shape)
        if takes or name == "scale":
            assert module(x).shape == shape
        else:
            with pytest.raises(ValueError, match=type(module).__name__):
                module(x)


def test_which_modules_are_functions_of_plane_statistics() -> None:
    for name in ("spem", "se", "eca", "srm"):
        cls = type(spem.create_attention(name, C))
        assert cls.gate_from is not spem.ChannelAttention.gate_from, name
        x = maps(torch.float64)
        module = drawn(name, torch.float64, training=False)
        stats = spem.ops.plane_stats(x)
        gate = module.gate_from(stats)
        assert gate.shape == x.shape[:2]
        torch.testing.assert_close(
            gate[..., None, None], module.gate(x), **TOLERANCE[torch.float64]
        )


@EVERY
def test_not_a_number_stays_in_its_sample_and_is_not_hidden(name: str) -> None:
    module = drawn(name, torch.float64, training=False)
    clean = maps(torch.float64)
    x = clean.clone()
    x[1, 3, 2, 2] = float("nan")
    out = module(x)
    assert torch.isnan(out[1, 3, 2, 2])
    keep = [0, 2, 3]
    torch.testing.assert_close(out[keep], module(clean)[keep], **TOLERANCE[torch.float64])
