"""Two processes train one run as one process does, within rounding; each resumes the other's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tolerance import TOGETHER, TOLERANCE
from torch import distributed
from training.tiny import Stop, outcome, shortened, tiny, trained
from training.together import OPTIM, STEPS, run_together, step_case, two_steps

import spem
from spem.attention import AttentionSpec
from spem.models import resnet
from spem.training import (
    Interrupted,
    RunConfig,
    RuntimeConfig,
    Silent,
    process_group,
    read_metrics,
    read_result,
    read_run,
    train,
)
from spem.training.distributed import Team, share_norms
from spem.training.folder import load_checkpoint
from spem.training.loop import resolved
from spem.training.step import make_optimizer, make_step


def slow(test: Any) -> Any:
    """A dozen seconds on an idle core."""
    return pytest.mark.timeout(900)(pytest.mark.slow(test))


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


@slow
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


@slow
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


@slow
def test_all_stop_after_the_same_step_and_another_number_goes_on(one: Path, two: Together) -> None:
    first, second = (said["begun by two"] for said in two.said)
    assert first == second
    assert first["code"] == 143
    assert "in epoch 2 after step 2 of 3" in first["stopped"]
    trained(STOPPED, two.folder / "begun by two")
    trained(STOPPED, one / "stopped")
    require_equal(outcome(two.folder / "begun by two"), outcome(one / "stopped"))
    require_equal(outcome(two.folder / "begun by one"), outcome(one / "stopped"))


@slow
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("iebn", "computes batch statistics of its own, which several processes cannot share"),
        ("compiled", "step='compile' is for one process, and 2 train this run. Use 'eager'"),
    ],
)
def test_what_several_cannot_do_is_refused(name: str, reason: str, two: Together) -> None:
    first, second = (said[name]["error"] for said in two.said)
    assert first.startswith("ValueError")
    assert reason in first
    assert reason in second


def ranks(parent: int) -> dict[int, int]:
    """The process ids of torchrun's children, by rank."""
    found: dict[int, int] = {}
    listed = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    for child in map(int, listed):
        variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        found |= {int(v[5:]): child for v in variables if v.startswith(b"RANK=")}
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@slow
def test_a_killed_process_ends_the_run_with_a_sentence_and_another_number_goes_on(
    tmp_path: Path,
) -> None:
    folder, said = tmp_path / "run", tmp_path / "said"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "spem"),
        *("train", "smoke", "--epochs", "6", "--limit", "50", "--attention", "none"),
        *("--checkpoint-minutes", "0", "--runtime.impl", "reference", "--folder", str(folder)),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with said.open("w") as errors:
        running = subprocess.Popen(command, stderr=errors, stdout=errors, env=environment)
        try:
            while not read_metrics(folder) and running.poll() is None:
                time.sleep(0.02)
            os.kill(ranks(running.pid)[1], signal.SIGKILL)
            assert running.wait(120) != 0
        finally:
            running.kill()
    text = said.read_text()
    assert text.count("run the same command again") == 1
    assert "another of the 2 processes of this run is gone" in text
    assert "checkpoint.pt" in text
    assert read_result(folder) is None
    assert load_checkpoint(folder / "checkpoint.pt")["epoch"] >= 1
    result = train(read_run(folder).config, folder, progress=Silent())  # one process goes on
    assert result.epochs == len(read_metrics(folder)) == 6


# ---- parts of it


def test_without_torchrun_nothing_is_joined() -> None:
    with process_group() as first:
        assert first
        assert not distributed.is_initialized()


@pytest.mark.parametrize(("images", "size"), [(41, 2), (128, 5)])
def test_parts_cover_a_batch_once(images: int, size: int) -> None:
    parts = [Team(rank, size).part(images) for rank in range(size)]
    taken = [i for part in parts for i in range(images)[part]]
    assert taken == list(range(images))
    lengths = {part.stop - part.start for part in parts}
    assert max(lengths) - min(lengths) <= 1


def test_several_processes_step_eagerly_each_on_its_own_device() -> None:
    assert resolved(RuntimeConfig(device="cpu", step="auto"), 2).step == "eager"
    with pytest.raises(ValueError, match=r"step='compile' is for one process, and 2 train"):
        resolved(RuntimeConfig(device="cpu", step="compile"), 2)
    with pytest.raises(ValueError, match=r"device='cpu:0' cannot serve 2 processes"):
        resolved(RuntimeConfig(device="cpu:0"), 2)


def test_shared_norms_keep_names_and_tensors() -> None:
    for spec, reason in (("iebn", "computes batch statistics"), ("se(pool=srp)", "random numbers")):
        with pytest.raises(ValueError, match=reason):
            share_norms(resnet(11, attention=AttentionSpec.parse(spec)))
    model = resnet(11, attention=AttentionSpec.parse("srm")).train()
    before = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    norms = share_norms(model)
    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert len(norms) == 16  # of stem, blocks, shortcuts and attention
    assert all(norm.training for norm in norms)
