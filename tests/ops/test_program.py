"""Tails in inference that run image by image, with the gate recorded as a program."""

from __future__ import annotations

import copy
import re
from typing import Any

import numpy as np
import pytest
import torch
from ops.tails import SPECS, Tail, error, tail
from torch import Tensor, nn
from torch.nn.functional import linear, pad

import spem
from spem.ops import PlaneStats, bn_gate_tail, gate_tail
from spem.ops.cpu import image_tail
from spem.ops.program import LARGEST, Program, record, recordable

RECORDED = (
    *(s for s in SPECS if s.startswith("spem")),
    *("se(reduction=8)", "se(reduction=4,bias=False)", "se(reduction=5,pool=mix())"),
    *("eca(kernel=5)", "eca(kernel=9,pool=min)", "eca(pool=mix())"),
    *("spem(pool=avg)", "spem(form=figure,reweight=sum_of_sigmoids)", "spem(pool=max)"),
    *("spem(reweight=product_of_sigmoids)", "spem(reweight=sigmoid_of_product)"),
    *("spem(reweight=linear_sum)", "spem(reweight=linear_product)", "spem(reweight=max_only)"),
    *("spem(reweight=double_sigmoid)", "spem(reweight=min_only)"),
)
# ECA takes products where there are values enough for them.
SHAPES = (
    *((64, 67, 3, 3), (16, 256, 2, 2), (128, 33, 1, 1), (17, 256, 4, 5), (512, 8, 2, 5)),
    *((4200, 1, 1, 2), (275, 15, 3, 1), (256, 16, 6, 6), (250, 17, 7), (128, 32, 2, 3, 4)),
)
BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 1e-2}
LAYOUTS = (torch.contiguous_format, torch.channels_last)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Program]:
    """The programs that the kernel was given."""
    given: list[Program] = []

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        given.append(args[5])
        return image_tail(*args, **kwargs)

    monkeypatch.setattr("spem.ops.cpu.image_tail", spy)
    return given


def drawn(gate: str, shape: tuple[int, ...], norm: str = "eval", **options: Any) -> Tail:
    from ops import tails

    if gate not in tails.GATES:
        tails.GATES[gate] = lambda c: spem.create_attention(gate, c)
    return tail(gate, shape, norm, **options)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("gate", RECORDED)
def test_equals_the_reference(gate: str, dtype: torch.dtype, runs: list[Program]):
    widths = {int(k) for k in re.findall(r"reduction=(\d+)", gate)}
    cases = [
        (shape, norm, layout)
        for shape in SHAPES
        for norm in ("eval", "none")
        for layout in LAYOUTS
        if shape[1] >= max(widths, default=1) and (len(shape) == 4 or norm == "none")
    ]
    for shape, norm, layout in cases:
        t = drawn(gate, shape, norm, dtype=dtype, memory_format=layout)
        wide = drawn(gate, shape, norm, dtype=torch.float64)
        if dtype == torch.bfloat16:  # the same problem
            wide.z.data, wide.residual.data = t.z.data.double(), t.residual.data.double()
            wide.gate, wide.norm = (copy.deepcopy(m) for m in (t.gate, t.norm))
            for module in (wide.gate, wide.norm):
                if module is not None:
                    module.double()
        with torch.no_grad():
            expected = wide.forward("reference")
            found = t.forward("numba")
            again = t.forward("numba")
        assert found.dtype == dtype
        assert found.stride() == t.z.stride()
        assert error(found, expected) < BOUNDS[dtype]
        assert torch.equal(found, again)
    assert len(runs) == 2 * len(cases)


def gated(gate: Any, x: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        return gate_tail(x, torch.zeros_like(x), gate, impl="numba", **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_logistic_sigmoid(dtype: torch.dtype, runs: list[Program]):
    """Planes of 1e4 and x, of which the smaller one is the argument."""
    edge = 87.5 if dtype == torch.float32 else 708.5
    values = np.concatenate([np.linspace(-edge, edge, 4000), np.linspace(-2, 2, 96)])
    x = torch.stack([torch.full((4096,), 1e4), torch.from_numpy(values)], 1).to(dtype)
    x = x.reshape(64, 64, 2)
    y = gated(recordable(lambda s: torch.sigmoid(s.min)), x, statistics=("min",))[..., 0] / 1e4
    expected = 1 / (1 + np.exp(-x[..., 1].double().numpy()))
    assert len(runs) == 1
    unit = torch.finfo(dtype).eps
    assert np.abs(y.double().numpy() / expected - 1).max() < 4 * unit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_logistic_sigmoid_at_its_ends(dtype: torch.dtype, runs: list[Program]):
    ends = torch.tensor([-torch.inf, -1e30, -750.0, 0.0, 750.0, 1e30, torch.inf, torch.nan])
    gate = recordable(lambda s: torch.sigmoid(s.mean))
    wide = gated(gate, torch.ones(64, 8, 1, dtype=dtype) * ends.to(dtype)[:, None])
    plain = (torch.sigmoid(ends) * ends).clamp(min=0)
    expected = torch.where(ends.isnan() | (ends == -torch.inf), torch.nan, plain)
    torch.testing.assert_close(wide[3, :, 0], expected.to(dtype), equal_nan=True)
    assert len(runs) == 1


@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("gate", ["spem", "eca(kernel=5)", "se(reduction=4)"])
def test_what_is_not_finite(gate: str, layout: torch.memory_format, runs: list[Program]):
    t = drawn(gate, (64, 67, 3, 3), dtype=torch.float32, memory_format=layout)
    with torch.no_grad():
        t.z[3, 5, 1, 1], t.z[4, 6, 0, 2], t.z[5, 7, 2, 2] = torch.nan, torch.inf, -torch.inf
        t.z[6, 8] = torch.nan  # where gamma is zero
        expected = t.forward("reference")
        found = t.forward("numba")
    assert runs
    assert torch.equal(found.isnan(), expected.isnan())
    torch.testing.assert_close(found, expected, equal_nan=True, rtol=1e-4, atol=1e-5)


def test_the_number_of_threads_changes_nothing(runs: list[Program]):
    t = drawn("spem", (64, 67, 3, 3), dtype=torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            with torch.no_grad():
                results.append(t.forward("numba"))
    finally:
        torch.set_num_threads(threads)
    assert len(runs) == 3
    assert all(torch.equal(r, results[0]) for r in results)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
def test_in_place(layout: torch.memory_format, runs: list[Program]):
    t = drawn("spem", (64, 67, 3, 3), dtype=torch.float32, memory_format=layout)
    assert t.gate is not None
    with torch.no_grad():
        expected, z = t.forward("numba"), t.z.clone()
        options: dict[str, Any] = {"statistics": t.gate.statistics, "impl": "numba"}
        y = bn_gate_tail(z, t.residual, t.norm, t.gate.gate_from, inplace=True, **options)
    assert len(runs) == 2
    assert y.data_ptr() == z.data_ptr()
    assert torch.equal(y, expected)


def test_nothing_is_kept_from_call_to_call(runs: list[Program]):
    t = drawn("spem", (64, 67, 3, 3), dtype=torch.float32)
    module = t.gate
    assert isinstance(module, spem.SPEM)
    for change in (
        lambda: module.get_parameter("pool.p")[0].mul_(3.0),
        lambda: module.w_e.data.add_(1.0),
        lambda: setattr(module, "b_e", nn.Parameter(module.b_e + 0.5)),
        lambda: setattr(module, "form", "code"),
        lambda: t.norm.running_mean.add_(1.0),
    ):
        with torch.no_grad():
            before = t.forward("numba")
            change()
            found, expected = t.forward("numba"), t.forward("reference")
        assert not torch.equal(found, before)
        assert error(found, expected) < 1e-5
    assert len(runs) == 10


class Wrapped(Tensor):
    """A subclass, whose memory may not hold its values."""


def test_weights_of_a_subclass_are_not_read_by_address(runs: list[Program]):
    t = drawn("spem", (64, 67, 3, 3), dtype=torch.float32)
    gate = t.gate
    assert isinstance(gate, spem.SPEM)
    with torch.no_grad():
        expected = t.forward("numba")
        weight = gate.w_e.detach().clone()
        del gate.w_e
        gate.w_e = weight.as_subclass(Wrapped)
        found = t.forward("numba")
    assert len(runs) == 1
    torch.testing.assert_close(found.as_subclass(Tensor), expected)


def test_autocast_takes_two_passes(runs: list[Program]):
    t = drawn("se(reduction=4)", (64, 67, 3, 3), dtype=torch.float32)
    with torch.no_grad():
        expected = t.forward("reference")
        with torch.autocast("cpu", torch.bfloat16):
            found = t.forward("numba")
    assert not runs
    assert error(found, expected) < 1e-5


@pytest.mark.parametrize("part", ["fc1", "fc2"])
def test_hooks_in_training(part: str):
    """They get the layer's own output, which is not changed behind their backs."""
    module = spem.create_attention("se(reduction=1)", 8)
    kept: list[Tensor] = []
    layer = module.get_submodule(part)
    layer.register_forward_hook(lambda _, __, y: kept.append(y))
    layer.register_full_backward_hook(lambda *_: None)
    x = torch.randn(4, 8, 3, 3, requires_grad=True)
    module(x).sum().backward()
    bottleneck = spem.ops.plane_stats(x, ("mean",)).mean
    assert bottleneck is not None
    if part == "fc2":
        bottleneck = torch.relu(module.get_submodule("fc1")(bottleneck))
    torch.testing.assert_close(kept[0], layer.forward(bottleneck))


@pytest.mark.parametrize("part", ["pool", "conv"])
def test_hooks_are_given_tensors(part: str, runs: list[Program]):
    t = drawn("eca(kernel=5)", (64, 67, 3, 3), dtype=torch.float32)
    seen: list[type] = []
    assert t.gate is not None
    t.gate.get_submodule(part).register_forward_hook(lambda _, __, y: seen.append(type(y)))
    with torch.no_grad():
        t.forward("numba")
    assert seen == [Tensor]
    assert not runs


def in_place(s: PlaneStats) -> Tensor:
    assert s.max is not None
    assert s.min is not None
    u = s.max.clone()
    u += s.min
    return u


def test_a_gate_with_other_operations_runs_between_two_passes(runs: list[Program]):
    x = torch.randn(64, 67, 3, 3)
    gates = (
        lambda s: torch.exp(s.min),
        lambda s: 1.0 * s.max - s.min,
        lambda s: s.max[:, :1].expand(-1, 67),
        lambda s: torch.addcmul(s.max, s.max, s.min, value=2.0),
        lambda s: torch.where(s.max == s.min, s.max, s.min),
        lambda s: pad(pad(s.max, (1, 1))[:, :67], (1, 1))[:, 2:69],
        lambda s: pad(s.max, (1, 1)).unfold(1, 67, 1)[:, 0],
        lambda s: s.max * len(s.min),
        in_place,
        lambda s: torch.sigmoid(s.max) + torch.randn(64, 67, generator=torch.Generator()),
        lambda s: torch.ones(64, 67),
        lambda s: linear(s.max, torch.ones(67, 67)[:4])[:, :1].expand(-1, 67),
    )
    for gate in gates:
        expected = gated(gate, x)
        assert torch.equal(gated(recordable(lambda s, gate=gate: gate(s)), x), expected)
    assert not runs


def test_who_writes_an_own_gate_is_called_with_tensors(runs: list[Program]):
    class Own(spem.SPEM):
        def gate_from(self, stats: PlaneStats) -> Tensor:
            assert isinstance(stats.max, Tensor)
            return torch.sigmoid(stats.max)

    x = torch.randn(64, 67, 3, 3)
    with torch.no_grad():
        Own(67).tail(x, x)
    assert not runs


def test_where_it_would_not_pay(runs: list[Program]):
    threads = torch.get_num_threads()
    with torch.no_grad():
        few = drawn("spem", (4 * threads - 1, 67, 3, 3), dtype=torch.float32)
        large = drawn("spem", (4 * threads, 2, 370, 370), dtype=torch.float32)
        matrix = drawn("se(reduction=1)", (64, 129, 2, 2), dtype=torch.float32)
        assert LARGEST < 129**2
        for t in (few, large, matrix):
            assert error(t.forward("numba"), t.forward("reference")) < 1e-5
    assert not runs


def test_gradients_and_training_take_the_passes(runs: list[Program]):
    drawn("spem", (64, 67, 3, 3), dtype=torch.float32).forward("numba")
    with torch.no_grad():
        drawn("spem", (64, 67, 3, 3), "train", dtype=torch.float32).forward("numba")
    assert not runs


def test_a_program_says_what_the_gate_does():
    like = torch.zeros(8, 5, 2, 2)
    gate = recordable(lambda s: torch.addcmul(torch.ones(5), torch.ones(5), s.max).sigmoid())
    program = record(gate, ("max",), like, torch.float32)
    assert program is not None
    assert len(program.tensors) == 2
    assert program.rows == 6
    assert program.result == program.place(5)
