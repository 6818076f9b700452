"""What a run leaves open (implementation, step) is settled once, written down, kept, and told."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from training.tiny import Stop, differences, outcome, shortened, tiny, trained

from spem import initialise
from spem.models import ResNet
from spem.ops import dispatch, use_impl
from spem.ops.dispatch import Choice
from spem.training import Interrupted, RunConfig, RuntimeConfig, Silent, read_run, recipes, train
from spem.training.folder import build_network
from spem.training.loop import _resolved
from spem.training.step import (
    choose_impl,
    execution,
    lambdas,
    make_optimizer,
    make_step,
    stored_impl,
    tails_of,
)

NUMBA = dispatch.unsupported("numba", "cpu", torch.float32)
needs_numba = pytest.mark.skipif(NUMBA is not None, reason=f"numba {NUMBA}")


@pytest.fixture
def no_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dispatch._INSTALLED, "numba", False)


@pytest.fixture
def proven(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_objection", lambda _: None)
    monkeypatch.setattr(dispatch, "_TORCH", (2, 11))
    monkeypatch.setitem(dispatch._INSTALLED, "triton", True)


# ---- implementation


@needs_numba
@pytest.mark.parametrize(("precision", "impl"), [("fp32", "numba"), ("bf16", "numba")])
def test_the_choice_is_by_the_dtype_of_the_maps_and_written_down(
    precision: str, impl: str, tmp_path: Path
):
    train(shortened(tiny(precision=precision, epochs=1), 40), tmp_path, progress=Silent())
    run = read_run(tmp_path)
    assert run.config.runtime.impl is None
    assert run.runtime.impl == run.weights().impl == impl


def test_a_choice_has_to_serve_training_and_evaluation(monkeypatch: pytest.MonkeyPatch):
    def chosen(op: str, device: str, dtype: torch.dtype, **_: object) -> Choice:
        return Choice("reference", "why") if dtype == torch.float32 else Choice("numba", "")

    monkeypatch.setattr("spem.training.step.choose", chosen)
    assert choose_impl(RuntimeConfig(precision="bf16"), "cpu") == ("reference", "why")


@pytest.mark.parametrize(
    ("step", "impl"), [("eager", "reference"), ("compile", "formula"), ("graph", "reference")]
)
def test_on_cuda_what_is_compiled_gets_the_formula_until_triton_is_proven(
    step: str, impl: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(dispatch, "_objection", lambda _: "kernels differ")
    assert choose_impl(RuntimeConfig(step=step), "cuda").impl == impl
    assert choose_impl(RuntimeConfig(step=step, impl="reference"), "cuda").impl == "reference"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_on_cuda_a_proven_triton_is_chosen_for_graphs(precision: str, proven: None):
    chosen = {
        step: choose_impl(RuntimeConfig(step=step, precision=precision), "cuda").impl
        for step in ("eager", "compile", "graph")
    }
    assert chosen == {"eager": "reference", "compile": "formula", "graph": "triton"}
    graph = RuntimeConfig(step="graph", precision=precision)
    assert choose_impl(graph, "cuda", attention=False).impl == "reference"
    asked = replace(graph, impl="triton")
    assert choose_impl(asked, "cuda", attention=False).impl == "triton"


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


def test_numba_asked_for_where_it_is_missing_is_refused_with_its_extra(
    tmp_path: Path, no_numba: None
):
    with pytest.raises(ValueError, match=r"impl='numba' needs numba, .*pip install '\.\[cpu\]'"):
        train(tiny(impl="numba"), tmp_path, progress=Silent())


@pytest.mark.parametrize("impl", ["reference", "formula", pytest.param("numba", marks=needs_numba)])
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
    assert result.impl == impl
    taken, counted = used[:-1], used[-1]  # the last one counts FLOPs, module by module
    assert len(taken) >= 2
    # The formula is for compiled steps; evaluation is never compiled.
    assert set(taken) == {impl, "reference" if impl == "formula" else impl}
    assert counted == "reference"
    assert dispatch.requested(None, "test") is None


def stopped(config: RunConfig, folder: Path, after: int = 3) -> list[str]:
    """Trains some steps; what was told."""
    stop = Stop(after)
    with pytest.raises(Interrupted):
        train(config, folder, progress=stop)
    return stop.messages


@needs_numba
def test_a_run_begun_without_numba_goes_on_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = replace(tiny(), optim=replace(tiny().optim, epochs=2, milestones=(1,)))
    with monkeypatch.context() as patch:
        patch.setitem(dispatch._INSTALLED, "numba", False)
        trained(config, tmp_path / "whole")
        stopped(config, tmp_path / "stopped")
    assert trained(config, tmp_path / "stopped").impl == "reference"
    assert differences(outcome(tmp_path / "stopped"), outcome(tmp_path / "whole")) == []


@needs_numba
def test_a_run_begun_with_numba_needs_it_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = tiny(epochs=1)
    stopped(config, tmp_path)
    monkeypatch.setitem(dispatch._INSTALLED, "numba", False)
    with pytest.raises(ValueError, match=r"impl='numba' needs numba.* was begun this way"):
        train(config, tmp_path, progress=Silent())


@needs_numba
def test_stored_weights_are_evaluated_as_they_were_trained_where_that_can_be(
    monkeypatch: pytest.MonkeyPatch,
):
    told: list[str] = []
    for stored, expected in (("reference", "reference"), ("numba", "numba"), (None, None)):
        with stored_impl(RuntimeConfig(impl=stored), "cpu", told.append):
            assert dispatch.requested(None, "test") == expected
    assert told == []
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with stored_impl(RuntimeConfig(impl="triton"), "cpu", told.append):
        assert dispatch.requested(None, "test") is None
    assert told == [
        "the run was trained with impl='triton', which needs a CUDA tensor, got device 'cpu'; "
        "evaluating with numba"
    ]
    with use_impl("formula"), stored_impl(RuntimeConfig(impl="numba"), "cpu", told.append):
        assert dispatch.requested(None, "test") == "formula"
    assert len(told) == 1


def test_an_open_implementation_leaves_the_environment_its_say(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SPEM_IMPL", "formula")
    with execution(RuntimeConfig(threads=1, device="cpu")):
        assert dispatch.requested(None, "test") == "formula"
    assert choose_impl(RuntimeConfig(), "cpu").impl == "formula"


@pytest.mark.parametrize(
    ("attention", "precision", "impl", "text"),
    [
        pytest.param(
            *("spem", "fp32", "numba"),
            "3 block tails: numba (fused batch norm + spem + add + ReLU)",
            marks=needs_numba,
        ),
        pytest.param(
            *("none", "bf16", "numba"),
            "3 block tails: numba (fused batch norm + add + ReLU)",
            marks=needs_numba,
        ),
        (
            *("cbam", "fp32", "reference"),
            "3 block tails: reference (not fused: cbam is no function of plane statistics)",
        ),
    ],
)
def test_one_line_tells_what_runs_the_tails(attention: str, precision: str, impl: str, text: str):
    config = tiny(attention, precision=precision, impl=impl)
    assert tails_of(build_network(config, 10), config.runtime) == text


@needs_numba
def test_a_reference_asked_for_is_told_as_such():
    config = tiny(impl="reference", device="cpu")
    assert tails_of(build_network(config, 10), config.runtime).endswith("(not fused: asked for)")


# ---- step


def test_auto_is_by_the_device_and_not_measured(monkeypatch: pytest.MonkeyPatch, proven: None):
    assert _resolved(RuntimeConfig(step="auto", device="cpu"), 1).step == "eager"
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    assert _resolved(RuntimeConfig(step="auto", device="cuda"), 1).step == "graph"
    assert _resolved(RuntimeConfig(step="auto", device="cuda"), 2).step == "eager"


def test_only_the_fast_recipe_leaves_the_step_to_the_device():
    steps = {r.__name__: r().runtime.step for r in (recipes.smoke, recipes.short, recipes.paper)}
    assert steps == {"smoke": "eager", "short": "eager", "paper": "eager"}
    assert recipes.fast().runtime.step == "auto"


@pytest.mark.parametrize("attention", ["none", "spem", "srm", "cbam"])
@pytest.mark.parametrize("impl", ["formula", pytest.param("numba", marks=needs_numba)])
def test_every_tail_compiles_in_one_graph_and_follows_the_eager_step(
    attention: str, impl: str, monkeypatch: pytest.MonkeyPatch
):
    # Traces forward and backward as a compiler would, without the minutes of compiling.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    losses: list[list[float]] = []
    for kind in ("eager", "compile"):
        config = tiny(attention, impl=impl, step=kind)
        model = build_network(config, classes=10)
        initialise(model, 0)
        optimizer = make_optimizer(model.train(), config.optim)
        images = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        labels = torch.arange(16) % 10
        with execution(config.runtime):
            step = make_step(model, optimizer, config.optim, config.runtime)
            losses.append([float(step(images, labels).loss) for _ in range(3)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert len(set(losses[0])) == 3


def test_a_step_tells_the_lambdas_it_left():
    config = tiny()
    model = build_network(config, classes=10)
    initialise(model, 0)
    step = make_step(model, make_optimizer(model, config.optim), config.optim, config.runtime)
    told, rng = [lambdas(model)], torch.Generator().manual_seed(0)
    for _ in range(6):  # the first step leaves lambda: w = 0
        images = torch.randn(16, 3, 8, 8, generator=rng)
        told.append(step(images, torch.arange(16) % 10).lambdas)
        assert torch.equal(told[-1], lambdas(model))
    assert not torch.equal(told[-1], told[0])
