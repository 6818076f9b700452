"""The norm inside a fused tail is the module's own; what cannot be fused says so."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from attention.drawing import feature_map, randomise
from ops.tails import home
from ops.test_tail import needs
from torch import nn
from torch.nn.utils import parametrizations

import spem
from spem.ops import bn_gate_tail, choose, gate_tail, use_impl, why_composed

IMPLS = pytest.mark.parametrize("impl", ["formula", "numba", "triton"])


@IMPLS
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": None},
        {"momentum": 0.3},
        {"affine": False},
        {"track_running_stats": False},
        {"eps": 0.1},
    ],
    ids=str,
)
def test_as_the_module(impl: str, options: dict[str, object]) -> None:
    """Outputs, gradients and running statistics over three steps, then in evaluation."""
    needs(impl, torch.float32, home(impl))
    composed = randomise(nn.BatchNorm2d(3, **options), "norm").to(home(impl)).train()
    fused = copy.deepcopy(composed)
    module = randomise(spem.SPEM(3), "norm").to(home(impl))
    for step in range(4):
        for norm in (composed, fused):
            norm.train(step < 3)
        z = feature_map(4, 3, 5, 6, key=step, dtype=torch.float32).to(home(impl)).requires_grad_()
        r = feature_map(4, 3, 5, 6, key=-step, dtype=torch.float32).to(home(impl))
        expected = bn_gate_tail(z, r, composed, module.gate_from, impl="reference")
        found = bn_gate_tail(z, r, fused, module.gate_from, impl=impl)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            torch.autograd.grad(found.square().sum(), z),
            torch.autograd.grad(expected.square().sum(), z),
            rtol=1e-3,
            atol=1e-4,
        )
        for name, value in composed.state_dict().items():
            torch.testing.assert_close(fused.state_dict()[name], value, rtol=1e-5, atol=1e-5)


@IMPLS
def test_frozen_statistics_stay(impl: str) -> None:
    """``track_running_stats = False`` on a norm that has buffers stops their updates."""
    needs(impl, torch.float32, home(impl))
    norms = [nn.BatchNorm2d(3, device=home(impl)) for _ in range(2)]
    z = feature_map(4, 3, 5, 6, dtype=torch.float32).to(home(impl))
    found = []
    for norm, how in zip(norms, (impl, "reference"), strict=True):
        norm.track_running_stats = False
        found.append(bn_gate_tail(z, z, norm, impl=how))
        assert norm.running_mean.tolist() == [0, 0, 0]
        assert norm.num_batches_tracked == 0
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_a_norm_for_other_maps_refuses() -> None:
    z = torch.randn(2, 3, 4, 4)
    for impl in ("formula", "reference"):
        with pytest.raises(ValueError, match="expected 2D or 3D input"):
            bn_gate_tail(z, z, nn.BatchNorm1d(3), impl=impl)


def test_global_hooks_are_called() -> None:
    seen: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, *_: seen.append(type(module).__name__)
    )
    try:
        z = torch.randn(2, 16, 4, 4)
        spem.SE(16).tail(z, z, nn.BatchNorm2d(16))
    finally:
        handle.remove()
    assert {"SE", "BatchNorm2d"} <= set(seen)


def test_a_numba_that_cannot_be_loaded_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from spem.ops import dispatch

    def broken(_: str) -> None:
        raise ImportError("Numba needs NumPy 2.3 or less")

    dispatch._load_error.cache_clear()
    monkeypatch.setattr(dispatch, "kernels_of", broken)
    try:
        if dispatch._INSTALLED["numba"]:
            found = choose("t", "cpu", torch.float32)
            assert found.impl == "reference"
            assert "cannot load numba: Numba needs NumPy" in found.reason
    finally:
        dispatch._load_error.cache_clear()


@IMPLS
def test_one_value_per_channel_is_refused_in_training(impl: str) -> None:
    needs(impl, torch.float32, home(impl))
    z, norm = torch.randn(1, 3, 1, 1).to(home(impl)), nn.BatchNorm2d(3, device=home(impl))
    with pytest.raises(ValueError, match="more than one value per channel"):
        bn_gate_tail(z, z, norm, impl=impl)
    bn_gate_tail(z, z, norm.eval(), impl=impl)


def test_what_is_composed() -> None:
    hooked = nn.BatchNorm2d(3)
    hooked.register_forward_hook(lambda *_: None)
    patched = nn.BatchNorm2d(3)
    patched.forward = lambda z: z
    assert why_composed(nn.BatchNorm2d(3)) is None
    assert why_composed(parametrizations.weight_norm(nn.BatchNorm2d(3))) is None
    assert why_composed(nn.SyncBatchNorm(3)) is None
    for norm, words in ((nn.GroupNorm(1, 3), "GroupNorm"), (hooked, "hooks"), (patched, "hooks")):
        assert words in str(why_composed(norm))
        z = torch.randn(2, 3, 4, 4)
        assert bn_gate_tail(z, z, norm).shape == z.shape
        with pytest.raises(ValueError, match=r"impl='formula' .*Use impl=None or 'reference'"):
            bn_gate_tail(z, z, norm, impl="formula")


def test_hooks_of_a_module_are_called() -> None:
    module, norm = spem.SE(16), nn.BatchNorm2d(16)
    seen: list[str] = []
    z = torch.randn(2, 16, 4, 4)
    module.tail(z, z, norm)
    handles = [
        module.register_forward_hook(lambda *_: seen.append("attention")),
        norm.register_forward_pre_hook(lambda *_: seen.append("norm")),
    ]
    composed = module.tail(z, z, norm)
    assert seen == ["norm", "attention"]
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(module.tail(z, z, norm), composed, rtol=1e-5, atol=1e-5)
    assert len(seen) == 2


def test_a_module_with_a_forward_of_its_own_is_composed() -> None:
    class Doubled(spem.SE):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    module = Doubled(16).eval()
    x = torch.rand(2, 16, 4, 4)
    assert "forward of its own" in str(module.why_composed())
    torch.testing.assert_close(module.tail(x, torch.zeros_like(x)), module(x))


def test_the_automatic_choice() -> None:
    expected = "numba" if choose("t", "cpu", torch.float32, impl=None).impl == "numba" else None
    if expected:
        assert choose("t", "cpu", torch.float64).impl == "numba"
    assert choose("t", "cpu", torch.float16).impl == "reference"
    small = choose("t", "cpu", torch.float32, values=2**18 - 1)
    assert small == ("reference", "a map of fewer than 262,144 values")
    assert choose("t", "cpu", torch.float32, values=10, impl="formula").impl == "formula"
    assert choose("t", "cpu", torch.float32, dense=False).impl == "reference"
    assert choose("t", "mps", torch.float32).impl == "reference"
    assert "only in CUDA graphs" in choose("t", "cuda", torch.float32).reason
    if not torch.cuda.is_available():
        unproven = choose("t", "cuda", torch.float32, graph=True)
        assert unproven.impl == "reference"
        assert "no CUDA device here" in unproven.reason


def test_a_compiler_that_loses_gradients_gets_the_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for version, impl in (((2, 12), "reference"), ((2, 13), "formula")):
        monkeypatch.setattr("spem.ops.dispatch._TORCH", version)
        assert choose("t", "cuda", torch.float32).impl == impl


def test_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose("t", "cpu", torch.float32, impl="formula").impl == "formula"
    with use_impl("reference"):
        assert choose("t", "cpu", torch.float32).impl == "reference"
        assert choose("t", "cpu", torch.float32, impl="formula").impl == "formula"
        with use_impl(None):
            assert choose("t", "mps", torch.float32).reason != "asked for"
        assert choose("t", "cpu", torch.float32).impl == "reference"
    monkeypatch.setenv("SPEM_IMPL", "formula")
    assert choose("t", "cpu", torch.float32).impl == "formula"
    with use_impl("reference"):
        assert choose("t", "cpu", torch.float32).impl == "reference"
    monkeypatch.setenv("SPEM_IMPL", "cuda")
    with pytest.raises(ValueError, match=r"impl='cuda' is unknown\. Use one of reference, formula"):
        choose("t", "cpu", torch.float32)


@pytest.mark.parametrize(
    ("impl", "device", "dtype", "dense", "words"),
    [
        ("numba", "cuda", torch.float32, True, "needs a CPU tensor, got device 'cuda'"),
        ("numba", "cpu", torch.float16, True, "takes float32"),
        ("numba", "cpu", torch.float32, False, "contiguous or channels_last"),
        ("triton", "mps", torch.float32, True, "needs a CUDA tensor, got device 'mps'"),
        ("triton", "cuda", torch.float64, True, "takes float32, bfloat16, float16"),
        ("fastest", "cpu", torch.float32, True, "unknown"),
    ],
)
def test_what_is_asked_for_and_cannot_be_met_raises(
    impl: str, device: str, dtype: torch.dtype, dense: bool, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        choose("op", device, dtype, dense=dense, impl=impl)


def test_triton_on_a_cpu_tensor_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    z = torch.randn(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"needs a CUDA tensor, got device 'cpu'\. Use impl=None"):
        gate_tail(z, z, impl="triton")


def test_shapes_are_checked() -> None:
    z = torch.randn(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"residual's shape \[2, 3, 4, 5\] is not the map's"):
        gate_tail(z, torch.randn(2, 3, 4, 5))
    with pytest.raises(ValueError, match="got 2 axes"):
        gate_tail(z[0, 0], z[0, 0])
    with pytest.raises(ValueError, match="the norm has 4 channels, the map 3"):
        bn_gate_tail(z, z, nn.BatchNorm2d(4), impl="formula")
    with pytest.raises(ValueError, match="unknown statistic 'median'"):
        gate_tail(z, z, statistics=("median",))


def test_the_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    from spem.ops import dispatch

    dispatch.log_once.cache_clear()
    z = torch.randn(2, 3, 4, 4)
    with caplog.at_level(logging.INFO, logger="spem.ops"):
        for _ in range(3):
            gate_tail(z, z, impl="formula")
            gate_tail(z.half(), z.half())
            gate_tail(z[..., ::2], z[..., ::2])
    lines = [record.message for record in caplog.records if "gate_tail" in record.message]
    assert lines == [
        "gate_tail on cpu, float32, contiguous: formula (asked for)",
        "gate_tail on cpu, float16, contiguous: reference (a map of fewer than 262,144 values)",
        "gate_tail on cpu, float32, strided: reference (a map of fewer than 262,144 values)",
    ]


def test_half_precision_maps_and_mixed_residuals() -> None:
    """Half maps on a CPU are composed or fused, a residual of another dtype is composed."""
    z = torch.randn(2, 16, 4, 4, dtype=torch.bfloat16)
    norm, module = nn.BatchNorm2d(16), spem.SE(16)
    assert module.tail(z, z, norm).dtype == torch.bfloat16
    assert module.tail(z, z.float(), norm).dtype == torch.float32
    with pytest.raises(ValueError, match="maps of one dtype"), use_impl("formula"):
        module.tail(z, z.float(), norm)


def test_a_hooked_norm_runs_once_where_the_tail_is_composed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Small maps without a gate, and dtypes that no kernel takes."""
    calls: list[torch.Tensor] = []
    own = torch.nn.functional.batch_norm

    def spy(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(x)
        return own(x, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "batch_norm", spy)
    seen: list[torch.Tensor] = []
    for dtype, gate in ((torch.float32, None), (torch.float16, spem.SE(16).gate_from)):
        norm = nn.BatchNorm2d(16).eval().to(dtype)
        z = torch.randn(2, 16, 4, 4, dtype=dtype)
        with torch.no_grad():
            plain = bn_gate_tail(z, z, norm, gate)
            norm.register_forward_hook(lambda _m, _a, out: seen.append(out))
            calls.clear()
            hooked = bn_gate_tail(z, z, norm, gate)
        assert torch.equal(hooked, plain)
        assert len(calls) == 1
    assert len(seen) == 2
