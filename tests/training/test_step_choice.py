"""What a run leaves open (implementation, step) is settled once, written down, kept, and told."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from reproduce.runs import result
from torch import Tensor, nn
from training.test_resume import Stop
from training.tiny import differences, outcome, shortened, tiny

from spem import initialise
from spem.models import ResNet
from spem.ops import dispatch, use_impl
from spem.ops.dispatch import Choice
from spem.training import (
    Interrupted,
    Result,
    RunConfig,
    RuntimeConfig,
    Silent,
    read_config,
    recipes,
)
from spem.training import choose_step as choosing
from spem.training.checkpoint import build_model
from spem.training.choose_impl import choose_impl, stored_impl, tails_of
from spem.training.loop import train
from spem.training.runs import plan_run, save_config
from spem.training.step import execution, lambdas, make_optimizer, make_step

NUMBA = dispatch.unsupported("numba", "cpu", torch.float32)
needs_numba = pytest.mark.skipif(NUMBA is not None, reason=f"numba {NUMBA}")


@pytest.fixture
def no_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dispatch._INSTALLED, "numba", False)


@pytest.fixture
def proven(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "TRITON_PROVEN", True)
    monkeypatch.setattr(dispatch, "_TORCH", (2, 11))
    monkeypatch.setitem(dispatch._INSTALLED, "triton", True)


@pytest.fixture
def cheap_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


def asked(config: RunConfig, **runtime: object) -> RunConfig:
    return replace(config, runtime=replace(config.runtime, **runtime))


# ---- implementation


@needs_numba
@pytest.mark.parametrize(("precision", "impl"), [("fp32", "numba"), ("bf16", "numba")])
def test_the_choice_is_by_the_dtype_of_the_maps_and_written_down(
    precision: str, impl: str, tmp_path: Path
):
    plan_run(tiny(precision=precision), tmp_path, print)
    stored = read_config(tmp_path)
    assert stored is not None
    assert stored.runtime.impl == impl


def test_a_choice_has_to_serve_training_and_evaluation(monkeypatch: pytest.MonkeyPatch):
    def chosen(op: str, device: str, dtype: torch.dtype, **_: object) -> Choice:
        return Choice("reference", "why") if dtype == torch.float32 else Choice("numba", "")

    monkeypatch.setattr("spem.training.choose_impl.choose", chosen)
    assert choose_impl(RuntimeConfig(precision="bf16"), "cpu") == ("reference", "why")


@pytest.mark.parametrize(
    ("step", "impl"), [("eager", "reference"), ("compile", "formula"), ("graph", "formula")]
)
def test_on_cuda_what_is_compiled_gets_the_formula_until_triton_is_proven(
    step: str, impl: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(dispatch, "TRITON_PROVEN", False)
    assert choose_impl(RuntimeConfig(step=step), "cuda").impl == impl
    assert choose_impl(RuntimeConfig(step=step, impl="reference"), "cuda").impl == "reference"


@pytest.mark.parametrize("step", ["eager", "compile", "graph"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_on_cuda_a_proven_triton_is_chosen(step: str, precision: str, proven: None):
    runtime = RuntimeConfig(step=step, precision=precision)
    assert choose_impl(runtime, "cuda").impl == "triton"


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
        plan_run(tiny(impl="numba"), tmp_path, print)


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
    trained, counted = used[:-1], used[-1]  # the last one counts FLOPs, module by module
    assert len(trained) >= 2
    # The formula is for compiled steps; evaluation is never compiled.
    assert set(trained) == {impl, "reference" if impl == "formula" else impl}
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
        train(config, tmp_path / "whole", progress=Silent())
        stopped(config, tmp_path / "stopped")
    assert train(config, tmp_path / "stopped", progress=Silent()).impl == "reference"
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
def test_another_wish_does_not_change_a_run_that_has_begun(tmp_path: Path):
    stopped(tiny(epochs=1), tmp_path)
    told: list[str] = []
    planned = plan_run(tiny(epochs=1, impl="formula", step="compile"), tmp_path, told.append)
    assert (planned.runtime.impl, planned.runtime.step) == ("numba", "eager")
    assert "impl numba (asked: formula)" in told[0]
    assert "step eager (asked: compile)" in told[0]


def test_before_the_first_checkpoint_another_device_or_step_chooses_anew(
    tmp_path: Path, no_numba: None, proven: None
):
    elsewhere = tiny(device="cuda", impl="triton", step="graph")
    save_config(elsewhere, tmp_path)
    here = plan_run(tiny(device="cpu", step="auto"), tmp_path, print)
    assert (here.runtime.impl, here.runtime.step) == ("reference", "auto")
    save_config(tiny(impl="formula", step="compile"), tmp_path)
    same = plan_run(tiny(device="auto", step="compile"), tmp_path, print)
    assert same.runtime.impl == "formula"
    other = plan_run(tiny(device="auto", step="eager"), tmp_path, print)
    assert (other.runtime.impl, other.runtime.step) == ("reference", "eager")


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
    assert tails_of(build_model(config, 10), config.runtime) == text


def test_a_reference_asked_for_is_told_as_such(proven: None):
    config = tiny(impl="reference", device="cuda")
    assert tails_of(build_model(config, 10), config.runtime).endswith("(not fused: asked for)")


# ---- step


def test_auto_is_measured_once_written_down_and_kept(
    tmp_path: Path, cheap_compile: None, monkeypatch: pytest.MonkeyPatch
):
    # Whole batches only: another size is traced anew, in each of three trainings.
    config = shortened(tiny(epochs=2, step="auto"), 120)
    seconds = rigged(monkeypatch, eager=1.0, compiled=0.5)
    told = stopped(config, tmp_path / "a")
    assert len(seconds) == 2 + 2 * choosing.ROUNDS[0]
    assert told[0] == (
        "step: compile, measured on batches of 40 images "
        "(eager 1000.0 ms, compiled 500.0 ms after 0 s of compiling)"
    )
    assert told[1].endswith("step: compile")
    stored = read_config(tmp_path / "a")
    assert stored is not None
    assert stored.runtime.step == "compile"
    seconds.clear()
    assert train(config, tmp_path / "a", progress=Silent()).step == "compile"
    assert seconds == []
    # Measuring left no trace: the same run with the step named ends in the same bits.
    train(asked(config, step="compile"), tmp_path / "b", progress=Silent())
    assert differences(outcome(tmp_path / "a"), outcome(tmp_path / "b")) == []


def rigged(monkeypatch: pytest.MonkeyPatch, eager: float, compiled: float) -> list[float]:
    """Steps are taken, and these times told, in turns; returns those told."""
    told: list[float] = []
    timed = choosing._timed

    def tell(step: Callable[..., object], images: Tensor, labels: Tensor) -> float:
        timed(step, images, labels)
        first = len(told) == 1
        told.append(compiled if len(told) % 2 else eager)
        return 0.0 if first else told[-1]

    monkeypatch.setattr(choosing, "_timed", tell)
    monkeypatch.setattr(choosing, "SECONDS", 0.0)
    return told


def measured(
    config: RunConfig, message: Callable[[str], None]
) -> tuple[str, nn.Module, torch.optim.Optimizer]:
    model = build_model(config, classes=10)
    initialise(model, 0)
    optimizer = make_optimizer(model.train(), config.optim)
    images, labels = torch.randn(16, 3, 8, 8), torch.zeros(16, dtype=torch.int64)
    chosen, _ = choosing.choose_step(model, optimizer, config, images, labels, message)
    return chosen, model, optimizer


@pytest.mark.parametrize(("compiled", "expected"), [(0.94, "compile"), (0.96, "eager")])
def test_a_compiled_step_has_to_be_worth_it_and_measuring_changes_nothing(
    compiled: float, expected: str, cheap_compile: None, monkeypatch: pytest.MonkeyPatch
):
    rigged(monkeypatch, eager=1.0, compiled=compiled)
    config = tiny()
    told: list[str] = []
    chosen, model, optimizer = measured(config, told.append)
    assert chosen == expected
    fresh = build_model(config, classes=10)
    initialise(fresh, 0)
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in fresh.state_dict().items())
    assert not optimizer.state
    assert all(parameter.grad is None for parameter in model.parameters())
    assert len(told) == 1


def test_where_nothing_can_be_compiled_the_step_is_eager(monkeypatch: pytest.MonkeyPatch):
    def failing(graph: object, inputs: object) -> Callable[..., object]:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=failing))
    told: list[str] = []
    assert measured(tiny(), told.append)[0] == "eager"
    assert told[0].startswith("step: eager, since compiling failed (")
    assert "no C++ compiler" in told[0]


def test_an_unsettled_step_is_no_step():
    config = tiny(step="auto")
    model = build_model(config, 10)
    optimizer = make_optimizer(model, config.optim)
    with pytest.raises(ValueError, match="step='auto' is settled when a run is planned"):
        make_step(model, optimizer, config.optim, config.runtime)


def test_recipes_for_a_quick_look_do_not_measure():
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
        model = build_model(config, classes=10)
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
    model = build_model(config, classes=10)
    initialise(model, 0)
    step = make_step(model, make_optimizer(model, config.optim), config.optim, config.runtime)
    told, rng = [lambdas(model)], torch.Generator().manual_seed(0)
    for _ in range(6):  # the first step leaves lambda: w = 0
        images = torch.randn(16, 3, 8, 8, generator=rng)
        told.append(step(images, torch.arange(16) % 10).lambdas)
        assert torch.equal(told[-1], lambdas(model))
    assert not torch.equal(told[-1], told[0])


def test_results_from_before_the_fields_load():
    values = asdict(result(tiny(), 90.0))
    del values["impl"], values["step"]
    assert Result(**values).impl is None
