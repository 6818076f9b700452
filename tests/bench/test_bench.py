"""`spem bench`: the step that is timed is the one that trains, and what it says."""

from __future__ import annotations

import json
from typing import Any

import gpu
import pytest

from spem.cli import main
from spem.ops.dispatch import requested
from spem.training import loop, step


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """The implementations of which a training step is made."""
    found: list[str | None] = []
    make = step.make_step
    assert loop.make_step is make, "training has a step of its own"

    def noted(*arguments: Any) -> Any:
        found.append(requested(None, "train"))
        return make(*arguments)

    monkeypatch.setattr(step, "make_step", noted)
    return found


def test_the_step_that_is_timed_is_the_one_that_trains(
    made: list[str | None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("SPEM_IMPL", "reference")  # which is the one that is timed, too
    args = ["bench", "cifar:11", "--attention", "spem", "--size", "8", "--quick", "--threads", "1"]
    assert main([*args, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert made == ["reference", "reference"]  # the plain network is timed beside it
    assert [row["attention"] for row in told["rows"]] == ["none", "spem"]
    plain, other = told["rows"]
    for kind in ("training step", "inference"):
        assert plain[f"{kind}, ratio"] == 1
        assert other[f"{kind}, ratio"] > 0
        assert other[f"{kind}, ms"] > 0


def test_the_gpu_script_times_it_too(made: list[str | None]):
    kind = {"depth": "11", "batch": "4", "attention": "none"}
    gpu.training_step(kind, "reference", "eager", device="cpu")
    assert len(made) == 1


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--batch", "0"], "--batch"),
        (["--attention", "sse"], "Did you mean"),
        (["cifar:12"], "12"),
        (["--impl", "cuda"], "cuda"),
    ],
)
def test_a_mistake_is_one_sentence(args: list[str], says: str, capsys: pytest.CaptureFixture[str]):
    assert main(["bench", *args, "--quick"]) == 2
    told = capsys.readouterr()
    assert says in told.err
    assert "Traceback" not in told.err
    assert not told.out
