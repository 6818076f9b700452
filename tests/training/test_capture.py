"""The captured step. On a CPU a stand-in for the recording shows that all around it is right; the
graph itself needs a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerance import TOLERANCE
from torch import Tensor
from training.test_resume import train_with_stops
from training.tiny import Begun, Stop, begun, differences, kept_checkpoint, outcome, tiny, trained

from spem.data import normalise
from spem.training import RunConfig, RuntimeConfig, loop, read_metrics, read_result
from spem.training.folder import load_checkpoint
from spem.training.step import (
    CapturedStep,
    StepOutput,
    execution,
)

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
quiet = pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lets the step be captured on the CPU: a replay runs it again and renews the results in their
    place. Grows by one with each recording."""
    recorded: list[int] = []

    def record(
        step: CapturedStep, run: Callable[[], StepOutput]
    ) -> tuple[StepOutput, Callable[[], None]]:
        for _ in range(3):
            run()
        recorded.append(1)
        output = run()

        def replay() -> None:
            for old, new in zip(output, run(), strict=True):
                old.copy_(new)

        return output, replay

    monkeypatch.setattr(CapturedStep, "_record", record)
    return recorded


def set_rate(training: Begun, value: float) -> None:
    for group in training.optimizer.param_groups:
        group["lr"] = value


def state(training: Begun) -> list[Tensor]:
    momenta = [s["momentum_buffer"] for s in training.optimizer.state.values() if s]
    kept = [*training.model.parameters(), *training.model.buffers(), *momenta]
    return [tensor.detach().clone() for tensor in kept]


def batches(count: int, device: str = "cpu") -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of 16 images, every third one of 6."""
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        size = 6 if i % 3 == 2 else 16
        images = torch.randn(size, 3, 8, 8, generator=generator)
        labels = torch.randint(0, 10, (size,), generator=generator)
        yield images.to(device), labels.to(device)


def graph(config: RunConfig) -> RunConfig:
    return replace(config, runtime=replace(config.runtime, step="graph"))


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(("attention", "rules"), [("spem", "host"), ("srm", "declared")])
def test_captured_steps_end_where_the_eager_ones_do(
    attention: str, rules: str, stand_in: list[int]
):
    config = tiny(attention)
    config = replace(config, optim=replace(config.optim, rules=rules))
    eager, captured = begun(config), begun(graph(config))
    for i, (images, labels) in enumerate(batches(10)):
        for training in (eager, captured):
            set_rate(training, 0.125 if i < 5 else 0.03125)  # the same number in float32
        a, b = eager.step(images, labels), captured.step(images, labels)
        assert equal(list(a), list(b))
    assert equal(state(eager), state(captured))
    assert len(stand_in) == 2  # one for each batch size


def test_preparing_takes_no_step(stand_in: list[int]):
    training = begun(graph(tiny()))
    before = state(training)
    for images, labels in batches(3):
        training.step.prepare(images, labels)
    after = state(training)
    assert equal(before, after[: len(before)])
    assert len(after) == len(before) + len(list(training.model.parameters()))
    assert not any(bool(momentum.any()) for momentum in after[len(before) :])


def test_rates_are_tensors_inside_and_numbers_outside(stand_in: list[int]):
    training = begun(graph(tiny()))
    seen: list[Tensor] = []
    group = training.optimizer.param_groups[0]
    training.optimizer.register_step_pre_hook(lambda *_: seen.append(group["lr"]))
    for i, (images, labels) in enumerate(batches(2)):
        set_rate(training, 0.1 / (i + 1))
        training.step(images, labels)
        assert group["lr"] == 0.1 / (i + 1)
    assert len({id(rate) for rate in seen[:4]}) == 1  # warm-up and recording; a replay has none
    assert isinstance(seen[0], Tensor)
    assert float(seen[0]) == pytest.approx(0.05)
    assert type(group["lr"]) is float


def test_the_graph_reads_buffers_of_its_own_and_its_results_are_the_callers(stand_in: list[int]):
    training = begun(graph(tiny()))
    inner, addresses = training.step._step, []

    def watched(images: Tensor, labels: Tensor) -> StepOutput:
        addresses.append((images.data_ptr(), labels.data_ptr()))
        return inner(images, labels)

    training.step._step = watched
    given = [pair for i, pair in enumerate(batches(8)) if i % 3 != 2]
    outputs = [training.step(*pair) for pair in given]
    assert len(set(addresses)) == 1
    assert addresses[0] not in {(i.data_ptr(), t.data_ptr()) for i, t in given}
    assert len({float(output.loss) for output in outputs}) == len(outputs)


def test_a_step_that_cannot_be_captured_names_the_ways_out(monkeypatch: pytest.MonkeyPatch):
    training = begun(graph(tiny()))

    def fail(*_: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(CapturedStep, "_record", fail)
    with pytest.raises(RuntimeError, match=r"16 images cannot .*capturing.*'compile' or 'eager'"):
        training.step(*next(batches(1)))
    assert type(training.optimizer.param_groups[0]["lr"]) is float


def test_a_captured_run_is_recorded_followed_and_resumed(
    stand_in: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plan = loop.resolved

    def resolved(runtime: RuntimeConfig, *how: Any, **more: Any) -> RuntimeConfig:
        settled = plan(replace(runtime, step="eager"), *how, **more)
        return replace(settled, step=runtime.step)

    monkeypatch.setattr(loop, "resolved", resolved)
    config = graph(tiny(epochs=2))
    told = Stop(-1)
    whole = trained(config, tmp_path / "whole", told)
    assert whole.step == "graph"
    _, tails, captured, *_ = told.messages
    assert tails.endswith("step: graph")
    assert "captured the step for 40 and 16 images in" in captured
    stored = load_checkpoint(kept_checkpoint(tmp_path / "whole"))
    assert all(type(g["lr"]) is float for g in stored["optimizer"]["param_groups"])
    train_with_stops(config, tmp_path / "stopped", [3, 5])
    assert differences(outcome(tmp_path / "stopped"), outcome(tmp_path / "whole")) == []
    eager = replace(config, runtime=replace(config.runtime, step="eager"))
    trained(eager, tmp_path / "eager")
    for a, b in zip(
        read_metrics(tmp_path / "whole"), read_metrics(tmp_path / "eager"), strict=True
    ):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)  # rates rounded to float32
        for name, mix in a["mixes"].items():
            assert mix["change"] == pytest.approx(b["mixes"][name]["change"], rel=0.05, abs=1e-7)


@gpu
@quiet
@pytest.mark.parametrize(
    ("impl", "precision"),
    [("reference", "fp32"), ("formula", "bf16"), ("triton", "fp32"), ("triton", "bf16")],
)
def test_ten_replays_follow_ten_eager_steps(impl: str, precision: str):
    config = tiny("spem", device="cuda", precision=precision, impl=impl, deterministic=True)
    losses: list[list[float]] = []
    for each in (config, graph(config)):
        with execution(each.runtime):
            training = begun(each)
            found = [training.step(*pair).loss for pair in batches(10, "cuda")]
            losses.append([float(loss) for loss in found])
    torch.testing.assert_close(
        torch.tensor(losses[1]), torch.tensor(losses[0]), **TOLERANCE[torch.bfloat16]
    )
    assert len(set(losses[1])) == 10


@gpu
@quiet
@pytest.mark.parametrize(
    ("kind", "attention"),
    [("eager", "cbam"), ("compile", "spem"), ("graph", "none"), ("graph", "spem")],
)
def test_ten_steps_do_not_wait_for_the_gpu(kind: str, attention: str):
    config = tiny(attention, device="cuda", step=kind)
    with execution(config.runtime):
        training = begun(config)
        given = list(batches(10, "cuda"))
        pixels = torch.zeros(16, 3, 8, 8, dtype=torch.uint8, device="cuda")
        for pair in given[:3]:
            training.step(*pair)
        total = torch.zeros((), dtype=torch.float64, device="cuda")
        torch.cuda.set_sync_debug_mode("error")
        try:
            for i, pair in enumerate(given):
                set_rate(training, 0.1 / (i + 1))
                normalise(pixels, (0.5,) * 3, (0.5,) * 3)
                total += training.step(*pair).loss * len(pair[0])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert bool(total.isfinite())


@gpu
@quiet
def test_on_a_gpu_auto_is_the_graph_and_a_stopped_run_ends_as_the_whole_one(tmp_path: Path):
    config = tiny(epochs=2, device="cuda", step="auto", deterministic=True)
    trained(config, tmp_path / "whole")
    result = read_result(tmp_path / "whole")
    assert result is not None
    assert result.step == "graph"
    train_with_stops(config, tmp_path / "stopped", [3])
    assert differences(outcome(tmp_path / "stopped"), outcome(tmp_path / "whole")) == []
