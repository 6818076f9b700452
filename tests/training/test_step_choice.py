"""What a run leaves open (implementation, step) is settled once, written down, kept, and told."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training.tiny import Stop, begun, differences, outcome, shortened, tiny, trained

from spem.models import ResNet
from spem.ops import dispatch, use_impl
from spem.training import Interrupted, RuntimeConfig, Silent, read_run, train
from spem.training.folder import build_network
from spem.training.loop import resolved
from spem.training.step import (
    choose_impl,
    execution,
    lambdas,
    stored_impl,
    tails_of,
)

NUMBA = dispatch.unsupported("numba", "cpu", torch.float32)
needs_numba = pytest.mark.skipif(NUMBA is not None, reason=f"numba {NUMBA}")


@pytest.fixture
def proven(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_objection", lambda _: None)
    monkeypatch.setattr(dispatch, "_TORCH", (2, 11))
    monkeypatch.setitem(dispatch._INSTALLED, "triton", True)


# ---- implementation


def test_on_cuda_a_proven_triton_is_chosen_for_graphs_and_the_formula_where_it_is_compiled(
    proven: None, monkeypatch: pytest.MonkeyPatch
):
    def chosen(**how: Any) -> list[str]:
        runtimes = [RuntimeConfig(step=step, **how) for step in ("eager", "compile", "graph")]
        return [choose_impl(runtime, "cuda") for runtime in runtimes]

    assert chosen(precision="bf16") == ["reference", "formula", "triton"]
    assert chosen(impl="reference") == ["reference"] * 3
    graph = RuntimeConfig(step="graph")
    assert choose_impl(graph, "cuda", attention=False) == "reference"
    assert choose_impl(replace(graph, impl="triton"), "cuda", attention=False) == "triton"
    monkeypatch.setattr(dispatch, "_objection", lambda _: "kernels differ")
    assert chosen() == ["reference", "formula", "reference"]


@pytest.mark.parametrize(
    ("runtime", "message"),
    [
        ({"impl": "triton"}, r"train: impl='triton' needs a CUDA tensor, got device 'cpu'"),
        ({"step": "graph"}, r"step='graph' captures .* which 'cpu' does not have. Use 'auto'"),
    ],
)
def test_a_wish_that_cannot_be_met_is_refused_at_planning(
    runtime: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setitem(dispatch._INSTALLED, "numba", True)
    monkeypatch.setattr(dispatch, "_TORCH", (2, 11))
    with pytest.raises(ValueError, match=message):
        train(tiny(**runtime), tmp_path, progress=Silent())
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize("impl", ["formula", pytest.param("numba", marks=needs_numba)])
def test_training_and_evaluation_run_under_the_planned_implementation(
    impl: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    used: list[str | None] = []

    def forward(model: ResNet, x: Tensor) -> Tensor:
        used.append(dispatch.requested(None, "test"))
        return original(model, x)

    original = ResNet.forward
    monkeypatch.setattr(ResNet, "forward", forward)
    result = train(shortened(tiny(epochs=1, impl=impl), 40), tmp_path, progress=Silent())
    assert result.impl == impl == read_run(tmp_path).weights().impl
    taken, counted = used[:-1], used[-1]  # the last one counts FLOPs, module by module
    assert len(taken) >= 2
    # The formula is for compiled steps; evaluation is never compiled.
    assert set(taken) == {impl, "reference" if impl == "formula" else impl}
    assert counted == "reference"
    assert dispatch.requested(None, "test") is None


@needs_numba
def test_a_run_goes_on_as_it_was_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = replace(tiny(), optim=replace(tiny().optim, epochs=2, milestones=(1,)))
    with monkeypatch.context() as patch:
        patch.setitem(dispatch._INSTALLED, "numba", False)
        trained(config, tmp_path / "whole")
        with pytest.raises(Interrupted):
            train(config, tmp_path / "stopped", progress=Stop(3))
    assert read_run(tmp_path / "stopped").config.runtime.impl is None
    assert trained(config, tmp_path / "stopped").impl == "reference"
    assert differences(outcome(tmp_path / "stopped"), outcome(tmp_path / "whole")) == []
    with pytest.raises(Interrupted):
        train(config, tmp_path / "with numba", progress=Stop(3))
    monkeypatch.setitem(dispatch._INSTALLED, "numba", False)
    with pytest.raises(ValueError, match=r"impl='numba' is not installed.* was started this way"):
        train(config, tmp_path / "with numba", progress=Silent())


@needs_numba
def test_stored_weights_are_evaluated_as_they_were_trained_where_that_can_be(
    monkeypatch: pytest.MonkeyPatch,
):
    told: list[str] = []
    expected = {"reference": "reference", "formula": "reference", "numba": "numba", None: None}
    assert {impl: stored_impl(impl, "cpu", told.append) for impl in expected} == expected
    assert told == []
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert stored_impl("triton", "cpu", told.append) is None
    assert told == [
        "the run was trained with impl='triton', which needs a CUDA tensor, got device 'cpu'; "
        "evaluating with numba"
    ]
    with use_impl("formula"):
        assert stored_impl("numba", "cpu", told.append) == "formula"
    assert len(told) == 1


@needs_numba
def test_one_line_tells_what_runs_the_tails():
    for impl, text in {
        "numba": "3 block tails: numba (fused batch norm + spem + add + ReLU)",
        "reference": "3 block tails: reference (not fused: asked for)",
    }.items():
        config = tiny("spem", impl=impl)
        assert tails_of(build_network(config, 10), config.runtime) == text


# ---- step


def test_auto_is_by_the_device_and_not_measured(monkeypatch: pytest.MonkeyPatch, proven: None):
    assert resolved(RuntimeConfig(step="auto", device="cpu"), 1).step == "eager"
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: torch.ones(()))
    assert resolved(RuntimeConfig(step="auto", device="cuda"), 1).step == "graph"
    assert resolved(RuntimeConfig(step="auto", device="cuda"), 2).step == "eager"


@pytest.mark.parametrize(
    ("attention", "impl"),
    [
        *(("srm", "formula"), ("cbam", "formula")),
        pytest.param("spem", "numba", marks=needs_numba),
    ],
)
def test_every_tail_compiles_in_one_graph_and_follows_the_eager_step(
    attention: str, impl: str, monkeypatch: pytest.MonkeyPatch
):
    # Traces forward and backward as a compiler would, without the minutes of compiling.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    losses: list[list[float]] = []
    for kind in ("eager", "compile"):
        config = tiny(attention, impl=impl, step=kind)
        images = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        labels = torch.arange(16) % 10
        with execution(config.runtime):
            step = begun(config).step
            losses.append([float(step(images, labels).loss) for _ in range(3)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert len(set(losses[0])) == 3


def test_a_step_tells_the_lambdas_it_left():
    config = tiny()
    model, _, step = begun(config)
    told, rng = [lambdas(model)], torch.Generator().manual_seed(0)
    for _ in range(6):  # the first step leaves lambda: w = 0
        images = torch.randn(16, 3, 8, 8, generator=rng)
        told.append(step(images, torch.arange(16) % 10).lambdas)
        assert torch.equal(told[-1], lambdas(model))
    assert not torch.equal(told[-1], told[0])
