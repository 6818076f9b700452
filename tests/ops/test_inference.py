"""The tail without gradients: one kernel for statistics, gate and result, against float64."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from ops.tails import GATES, Tail, error, tail
from torch import Tensor, nn

pytest.importorskip("numba")

import spem
from spem.insert import IdentityStart
from spem.ops import PlaneStats, bn_gate_tail, cpu, gate_tail
from spem.ops.cpu import inference as kernel
from spem.ops.inference import CompiledGate

COMPILED = (
    *("spem", "spem(form=code)", "spem(form=figure)", "spem(pool=mix(0.3))"),
    *("spem(pool=mix(parametrization=sigmoid))", "se(reduction=4)", "se(reduction=4,bias=False)"),
    *("eca", "eca(kernel=9)"),
    *("identity spem", "identity se(reduction=4)", "identity eca"),
)
IN_TORCH = (
    *("spem(reweight=linear_sum)", "spem(pool=avg)", "se(reduction=4,pool=mix())"),
    *("eca(pool=max)", "srm", "gct", "scale", "none", "wavy"),
)
# Whole vectors and parts, one position, several chunks, every rank, one image for all threads.
SHAPES = (
    *((2, 67, 3, 3), (1, 256, 5, 5), (5, 16, 4, 7), (3, 200, 1, 2), (1, 9, 40, 40)),
    *((17, 130, 2, 2), (2, 64, 30, 31), (4, 33, 7), (2, 40, 2, 3, 4)),
)
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float64: 1e-13}
LAYOUTS = (torch.contiguous_format, torch.channels_last)
both_layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])


def made(gate: str, channels: int) -> spem.ChannelAttention:
    attention = spem.create_attention(gate.removeprefix("identity "), channels)
    return IdentityStart(attention) if gate.startswith("identity ") else attention


def drawn(gate: str, shape: tuple[int, ...], norm: str = "eval", **options: Any) -> Tail:
    GATES.setdefault(gate, lambda c: made(gate, c))
    return tail(gate, shape, norm, **options)


@pytest.fixture
def gates(monkeypatch: pytest.MonkeyPatch) -> list[CompiledGate | None]:
    """The compiled gates that the kernel was given, None for one of torch."""
    given: list[CompiledGate | None] = []

    def spy(z: Tensor, r: Tensor, norm: Any, gate: Any, *rest: Any) -> Tensor:
        given.append(gate)
        return kernel.fused_tail(z, r, norm, gate, *rest)

    monkeypatch.setattr(cpu, "fused_tail", spy)
    return given


@pytest.mark.parametrize("dtype", BOUNDS, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("gate", [*COMPILED, *IN_TORCH])
def test_equals_the_reference_in_float64(
    gate: str, dtype: torch.dtype, gates: list[CompiledGate | None]
) -> None:
    cases = [
        (shape, norm, layout)
        for k, shape in enumerate(SHAPES)
        for norm in ("eval", "none")
        for layout in LAYOUTS
        if (len(shape) == 4 or norm == "none") and (k + len(gate)) % 3 == 0
    ]
    for shape, norm, layout in cases:
        t = drawn(gate, shape, norm, dtype=dtype, memory_format=layout)
        exact = copy.deepcopy(t)
        for module in (exact.norm, exact.gate):
            if module is not None:
                module.double().eval()
        exact.z.data, exact.residual.data = exact.z.data.double(), exact.residual.data.double()
        if t.gate is not None:
            t.gate.eval()
        with torch.no_grad():
            expected, found, again = exact.forward("reference"), t.forward("numba"), t.forward(None)
        assert found.dtype == dtype
        assert found.stride() == t.z.stride()
        assert error(found, expected) < BOUNDS[dtype], (shape, norm, layout)
        if gate != "none":
            assert torch.equal(found, again)
    assert all((g is None) == (gate in IN_TORCH) for g in gates)
    assert gates


@both_layouts
@pytest.mark.parametrize("gate", ["spem", "eca(kernel=5)", "se(reduction=4)", "srm", "none"])
def test_what_is_not_finite_or_large(gate: str, layout: torch.memory_format) -> None:
    t = drawn(gate, (6, 67, 3, 3), dtype=torch.float32, memory_format=layout)
    large = copy.deepcopy(t)
    with torch.no_grad():
        t.z[1, 5, 1, 1], t.z[2, 6, 0, 2], t.z[3, 7, 2, 2] = torch.nan, torch.inf, -torch.inf
        t.z[4, 8] = torch.nan  # where gamma is zero
        expected, found = t.forward("reference"), t.forward("numba")
        torch.testing.assert_close(found, expected, equal_nan=True, rtol=1e-4, atol=1e-5)
        if gate != "srm":  # whose own norm is of squares
            for _ in range(3):
                large.z.mul_(1e10)
                expected = large.forward("reference")
                assert expected.isfinite().all()
                assert error(large.forward("numba"), expected) < 1e-5


@both_layouts
@pytest.mark.parametrize("gate", ["spem", "se(reduction=2)", "eca", "srm"])
def test_the_number_of_threads_changes_nothing(gate: str, layout: torch.memory_format) -> None:
    """One image is cut for several threads; large matrices of SE run on their own."""
    before = torch.get_num_threads()
    try:
        for batch in (1, 3):
            t = drawn(gate, (batch, 260, 3, 3), dtype=torch.float32, memory_format=layout)
            results: list[Tensor] = []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                with torch.no_grad():
                    results.append(t.forward("numba"))
            torch.set_num_threads(1)
            with torch.no_grad():
                assert error(results[0], t.forward("reference")) < 1e-5
            if gate != "srm":  # whose gate is torch's own
                assert all(torch.equal(r, results[0]) for r in results)
    finally:
        torch.set_num_threads(before)


@both_layouts
def test_callers_at_once_do_not_meet(layout: torch.memory_format) -> None:
    tails = [
        drawn(gate, shape, dtype=torch.float32, memory_format=layout)
        for gate in ("spem", "se(reduction=4)", "eca")
        for shape in ((2, 67, 9, 9), (1, 256, 5, 5))
    ]
    with torch.no_grad():
        expected = [t.forward("numba") for t in tails]
    wrong: list[int] = []

    def call(k: int) -> None:
        with torch.no_grad():
            results = [tails[k].forward("numba") for _ in range(100)]
            wrong.extend(k for y in results if not torch.equal(y, expected[k]))

    with ThreadPoolExecutor(len(tails)) as pool:
        list(pool.map(call, range(len(tails))))
    assert not wrong


@both_layouts
@pytest.mark.parametrize("channels", [64, 67])
def test_large_results_are_written_past_the_caches(
    channels: int, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    t = drawn("spem", (2, channels, 16, 16), dtype=torch.float32, memory_format=layout)
    with torch.no_grad():
        expected = t.forward("numba")
        monkeypatch.setattr(kernel, "_LARGE", 0)
        assert torch.equal(t.forward("numba"), expected)


@both_layouts
def test_nothing_but_the_result_is_written(
    layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result lies between guards."""
    t = drawn("se(reduction=4)", (3, 37, 3, 5), dtype=torch.float32, memory_format=layout)
    guarded = torch.full((64 + t.z.numel() + 64,), 7.0)
    inside = guarded[64:-64].as_strided(t.z.shape, t.z.stride())
    with torch.no_grad():
        expected = t.forward("numba")
        monkeypatch.setattr(torch, "empty_like", lambda *_: inside)
        y = t.forward("numba")
    assert y is inside
    assert torch.equal(y, expected)
    assert guarded[:64].eq(7).all()
    assert guarded[-64:].eq(7).all()


def test_nothing_is_kept_from_call_to_call(gates: list[CompiledGate | None]) -> None:
    t = drawn("spem", (4, 67, 3, 3), dtype=torch.float32)
    module = t.gate
    assert isinstance(module, spem.SPEM)
    assert t.norm is not None
    for change in (
        lambda: module.get_parameter("pool.p")[0].mul_(3.0),
        lambda: module.w_e.data.add_(1.0),
        lambda: setattr(module, "b_e", nn.Parameter(module.b_e + 0.5)),
        lambda: setattr(module, "form", "code"),
        lambda: t.norm.running_mean.add_(1.0),
        lambda: setattr(t.norm, "eps", 0.5),
        lambda: setattr(t.norm, "weight", nn.Parameter(t.norm.weight * 2)),
    ):
        with torch.no_grad():
            before = t.forward("numba")
            change()
            found, expected = t.forward("numba"), t.forward("reference")
        assert not torch.equal(found, before)
        assert error(found, expected) < 1e-5
    assert None not in gates


class Wrapped(Tensor):
    """A subclass, whose memory may not hold its values."""


@pytest.mark.parametrize("change", ["a subclass", "a shape that broadcasts", "a hook"])
def test_what_no_kernel_knows_is_run_by_torch(
    change: str, gates: list[CompiledGate | None]
) -> None:
    t = drawn("spem", (4, 67, 3, 3), dtype=torch.float32)
    assert isinstance(t.gate, spem.SPEM)
    weight = t.gate.w_e.detach().clone()
    if change == "a hook":
        t.gate.pool.register_forward_hook(lambda *a: a[2] / 2)
    elif change == "a subclass":
        del t.gate.w_e
        t.gate.w_e = weight.as_subclass(Wrapped)
    else:
        t.gate.w_e = nn.Parameter(weight[:1])
    with torch.no_grad():
        expected = t.forward("reference")
        assert error(t.forward("numba").as_subclass(Tensor), expected.as_subclass(Tensor)) < 1e-5
    assert gates == [None]


@pytest.mark.parametrize("gate", ["se(reduction=4)", "eca"])
def test_hooks_of_inner_layers_are_called_and_change_no_bit(
    gate: str, gates: list[CompiledGate | None]
) -> None:
    t = drawn(gate, (4, 67, 3, 3), dtype=torch.float32)
    seen: list[type] = []
    assert t.gate is not None
    with torch.no_grad():
        expected = t.forward("numba")
    layer = t.gate.get_submodule("conv" if gate == "eca" else "fc2")
    layer.register_forward_hook(lambda _, __, y: seen.append(type(y)))
    with torch.no_grad():
        assert torch.equal(t.forward("numba"), expected)
    assert seen == [Tensor]
    assert None not in gates


@both_layouts
@pytest.mark.parametrize("gate", ["spem", "se(reduction=4)", "eca", "srm", "identity spem"])
def test_observers_see_the_gate_and_change_no_bit(gate: str, layout: torch.memory_format) -> None:
    t = drawn(gate, (4, 67, 3, 3), dtype=torch.float32, memory_format=layout)
    assert isinstance(t.gate, spem.ChannelAttention)
    t.gate.eval()
    seen: list[tuple[Tensor, int]] = []
    with torch.no_grad():
        expected = t.forward("numba")
        handle = t.gate.observe_gates(lambda v, n: seen.append((v, n)))
        found = t.forward("numba")
        handle.remove()
        assert torch.equal(t.forward("numba"), expected)
        v = t.gate.gate_from(spem.ops.plane_stats(t.norm(t.z)))
    assert torch.equal(found, expected)
    assert len(seen) == 1
    assert seen[0][1] == 4
    torch.testing.assert_close(seen[0][0], v, rtol=1e-4, atol=1e-5)


def test_autocast_changes_nothing(gates: list[CompiledGate | None]) -> None:
    t = drawn("se(reduction=4)", (4, 67, 3, 3), dtype=torch.float32)
    with torch.no_grad():
        expected = t.forward("reference")
        with torch.autocast("cpu", torch.bfloat16):
            assert error(t.forward("numba"), expected) < 1e-5


@both_layouts
@pytest.mark.parametrize("gate", COMPILED)
def test_parameters_in_bfloat16_are_read_where_they_are(
    gate: str, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network in bfloat16 as a whole; equal to the same numbers in float32, which are copied."""
    t = drawn(gate, (4, 67, 3, 3), dtype=torch.bfloat16, memory_format=layout)
    assert isinstance(t.gate, nn.Module)
    assert t.norm is not None
    with torch.no_grad():
        t.gate.bfloat16()
        t.norm.bfloat16()
        expected = t.forward("reference")
        with monkeypatch.context() as patch:
            if "sigmoid" not in gate:  # whose lambda is torch's own
                patch.setattr(Tensor, "to", None)  # nothing is converted
            found = t.forward("numba")
        t.gate.float()
        assert torch.equal(found, t.forward("numba"))  # the norm's alone are narrow: copied
        t.norm.float()
        assert torch.equal(found, t.forward("numba"))
    assert error(found, expected) < 2e-2


def test_an_identity_start_begins_as_the_plain_tail() -> None:
    for gate in ("identity spem", "identity se(reduction=4)", "identity eca"):
        t = drawn(gate, (64, 67, 8, 8), dtype=torch.float32)
        assert isinstance(t.gate, IdentityStart)
        nn.init.zeros_(t.gate.alpha)
        with torch.no_grad():
            assert torch.equal(t.forward("numba"), bn_gate_tail(t.z, t.residual, t.norm))


def test_observers_of_what_an_identity_start_holds_see_its_own_gate() -> None:
    t = drawn("identity spem", (4, 67, 3, 3), dtype=torch.float32)
    start = t.gate
    assert isinstance(start, IdentityStart)
    seen: list[Tensor] = []
    with torch.no_grad():
        expected = t.forward("numba")
        for module in (start.inner, start):
            module.observe_gates(lambda v, _n: seen.append(v))
        assert torch.equal(t.forward("numba"), expected)
        own, whole = seen
        torch.testing.assert_close(whole, 1 + start.alpha * (own - 1))
        v = start.inner.gate_from(spem.ops.plane_stats(t.norm(t.z)))
    torch.testing.assert_close(own, v, rtol=1e-4, atol=1e-5)


def test_an_own_gate_is_given_tensors(gates: list[CompiledGate | None]) -> None:
    class Own(spem.SPEM):
        def gate_from(self, stats: PlaneStats) -> Tensor:
            assert isinstance(stats.max, Tensor)
            return torch.sigmoid(stats.max)

    x = torch.randn(64, 67, 3, 3)
    with torch.no_grad():
        Own(67).tail(x, x)
    assert gates == [None]


def test_wrong_input_is_refused_as_with_gradients() -> None:
    z, norm = torch.randn(2, 3, 4, 4), nn.BatchNorm2d(3).eval()
    for call, words in (
        (lambda: gate_tail(z, torch.randn(2, 3, 4, 5)), "residual's shape"),
        (lambda: bn_gate_tail(z, z, nn.BatchNorm2d(4).eval(), impl="numba"), "4 channels"),
        (lambda: bn_gate_tail(z, z, nn.BatchNorm1d(3).eval(), impl="numba"), "expected 2D or 3D"),
        (lambda: gate_tail(z, z, statistics=("median",), gate=lambda s: s.max), "'median'"),
        (lambda: bn_gate_tail(z, z, norm, lambda _: torch.ones(2, 3, device="meta")), "on meta"),
    ):
        with torch.no_grad(), pytest.raises(ValueError, match=words):
            call()


def test_residuals_of_another_layout_and_small_plain_tails() -> None:
    z = torch.randn(2, 16, 8, 8)
    r = torch.randn(2, 16, 8, 8).to(memory_format=torch.channels_last)
    norm = nn.BatchNorm2d(16).eval()
    with torch.no_grad():
        for gate in (None, spem.SE(16).gate_from):
            found = bn_gate_tail(z, r, norm, gate)
            expected = bn_gate_tail(z, r, norm, gate, impl="reference")
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            assert found.is_contiguous()
