"""Two processes train one run as one process does, within rounding; each resumes the other's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tolerance import TOGETHER, TOLERANCE
from training.tiny import Stop, outcome, shortened, tiny, trained
from training.together import OPTIM, STEPS, run_together, step_case, two_steps

import spem
from spem.training import Interrupted, RunConfig, train
from spem.training.step import make_optimizer, make_step

# A dozen seconds on an idle core.
pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]


def config(attention: str, images: int, **runtime: Any) -> RunConfig:
    """Two epochs at a low rate, which keeps rounding small, with a penalty that weighs."""
    run = shortened(tiny(attention, epochs=2, **runtime), images)
    return replace(run, optim=replace(run.optim, lr=0.01, penalty=2.0))


# Batches of 40. The last one is divided unevenly (97: 8 and 9), or is too small to be divided and
# taken whole by both (81: 1 image; 83: 3, where SRM needs 2 in each process).
EQUAL = {
    "reference": config("spem", 97, impl="reference"),
    "numba": config("spem", 97, impl="numba"),
    "plain": config("none", 81, impl="reference"),
    "srm": config("srm", 83, impl="reference"),
}
STOPPED = config("spem", 97, impl="reference", checkpoint_minutes=0.0)
REFUSED = {"iebn": config("iebn", 41), "compiled": config("none", 41, step="compile")}


class Together(NamedTuple):
    folder: Path
    said: list[dict[str, Any]]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("one")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Together:
    """All that two processes do, in one go: starting them takes longer than the work."""
    folder = tmp_path_factory.mktemp("two")
    with pytest.raises(Interrupted):
        train(STOPPED, folder / "begun by one", progress=Stop(2))
    jobs = {name: (run, 0) for name, run in {**EQUAL, **REFUSED}.items()}
    if not has_numba():
        del jobs["numba"]
    jobs |= {"begun by two": (STOPPED, 4), "begun by one": (STOPPED, 0)}
    return Together(folder, run_together(folder, jobs))


def has_numba() -> bool:
    return spem.ops.choose("t", "cpu", torch.float32).impl == "numba"


def distance(a: dict[Any, torch.Tensor], b: dict[Any, torch.Tensor]) -> float:
    """Between all tensors together, relative to their length."""
    assert a.keys() == b.keys()
    mine, other = (torch.cat([x[k].double().flatten() for k in a]) for x in (a, b))
    return float((mine - other).norm() / mine.norm())


def require_equal(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Weights, running statistics and metrics of two runs, within rounding.

    Momentum is left out: a ReLU or an extremum that rounding turns over changes a gradient at once.
    """
    assert distance(a["weights"], b["weights"]) < TOGETHER["rtol"]
    assert len(a["metrics"]) == len(b["metrics"]) == 2
    for mine, other in zip(a["metrics"], b["metrics"], strict=True):
        assert mine["train_accuracy"] == other["train_accuracy"]
        for key in ("loss", "penalty", "test_loss", "lr"):
            assert mine[key] == pytest.approx(other[key], rel=TOGETHER["rtol"])
        torch.testing.assert_close(mine["mixes"], other["mixes"], **TOGETHER)


@pytest.mark.parametrize("attention", STEPS)
def test_steps_of_two_processes_are_those_of_one(attention: str, two: Together) -> None:
    """In float64 but for the logits, so that nothing turns over; the penalty counts once."""
    model = step_case(attention)
    steps = two_steps(make_step(model, make_optimizer(model, OPTIM), OPTIM, tiny().runtime))
    (first, told), (second, also_told) = (
        torch.load(two.folder / f"{attention}.{rank}.pt", weights_only=True) for rank in range(2)
    )
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close({name: first[name]}, {name: tensor}, **TOLERANCE[torch.float32])
        torch.testing.assert_close(second[name], first[name], **TOLERANCE[torch.float64])
    for whole, mine, other in zip(steps, told, also_told, strict=True):
        close = TOLERANCE[torch.float32]
        torch.testing.assert_close(mine[0] + other[0], whole.loss, **close)
        assert int(mine[2] + other[2]) == int(whole.correct)
        torch.testing.assert_close(mine[1], whole.penalty, **close)
        torch.testing.assert_close(mine[3], whole.lambdas, **close)


@pytest.mark.parametrize("name", EQUAL)
def test_two_processes_equal_one(name: str, one: Path, two: Together) -> None:
    if name == "numba" and not has_numba():
        pytest.skip("numba is not installed")
    result = trained(EQUAL[name], one / name)
    require_equal(outcome(two.folder / name), outcome(one / name))
    first, second = (said[name] for said in two.said)
    assert first == second
    assert first["hardware"] == f"2 x {result.hardware}"
    assert first["loss"] == pytest.approx(result.train_loss, rel=TOGETHER["rtol"])


def test_all_stop_after_the_same_step_and_one_goes_on(one: Path, two: Together) -> None:
    first, second = (said["begun by two"] for said in two.said)
    assert first == second
    assert first["code"] == 143
    assert "in epoch 2 after step 2 of 3" in first["stopped"]
    trained(STOPPED, two.folder / "begun by two")
    trained(STOPPED, one / "stopped")
    require_equal(outcome(two.folder / "begun by two"), outcome(one / "stopped"))


def test_two_go_on_with_what_one_began(one: Path, two: Together) -> None:
    trained(STOPPED, one / "stopped")
    require_equal(outcome(two.folder / "begun by one"), outcome(one / "stopped"))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("iebn", "takes statistics of the batch by itself, which several processes cannot share"),
        ("compiled", "step='compile' is for one process, and 2 train this run. Use 'eager'"),
    ],
)
def test_what_several_cannot_do_is_refused(name: str, reason: str, two: Together) -> None:
    first, second = (said[name]["error"] for said in two.said)
    assert first.startswith("ValueError")
    assert reason in first
    assert reason in second
