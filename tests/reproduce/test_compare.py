"""Planning a comparison and running what is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from reproduce.runs import config, result, run, write

from spem.reproduce import compare
from spem.training import Result, RunConfig, Silent


class Recorder(Silent):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def start(self, name: str) -> None:
        self.seen.append(f"start {name}")

    def finish(self, text: str) -> None:
        self.seen.append(f"finish {text}")


def test_plan_pairs_every_seed() -> None:
    base = config("cbam", 9)
    plan = compare.plan(base, ["none", "se(reduction = 8)"], [4, 2])
    assert [(c.model.attention, c.seed) for c in plan] == [
        ("none", 4),
        ("se(reduction=8)", 4),
        ("none", 2),
        ("se(reduction=8)", 2),
    ]
    assert all((c.data, c.optim, c.runtime) == (base.data, base.optim, base.runtime) for c in plan)


@pytest.mark.parametrize(
    ("attentions", "seeds", "message"),
    [
        ([], [0], "no attention"),
        (["none"], [], "no seed"),
        (["se", "se()"], [0], "attention se is named twice"),
        (["none", "se"], [3, 1, 3], "seed 3 is named twice"),
        (["spme"], [0], "unknown attention 'spme'"),
    ],
)
def test_plan_refuses(attentions: list[str], seeds: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare.plan(config("none", 0), attentions, seeds)


def test_only_what_is_missing_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finished run is skipped, and one that diverges does not keep the others from running."""
    write(run("none", 0, 90.0), tmp_path)
    trained: list[RunConfig] = []

    def train(asked: RunConfig, folder: Path, *, progress: Any) -> Result:
        assert folder == asked.folder(tmp_path)
        assert progress is recorder
        trained.append(asked)
        if asked.model.attention == "se":
            raise FloatingPointError("the loss became nan")
        return result(asked, 91.25)

    monkeypatch.setattr(compare, "train", train)
    recorder = Recorder()
    plan = compare.plan(config("none", 0), ["none", "se", "spem"], [0])
    diverged = compare.run_missing(plan, tmp_path, recorder)
    assert trained == plan[1:]
    assert diverged == ["se, seed 0: the loss became nan"]
    assert recorder.seen == [
        "start se, seed 0",
        "finish diverged",
        "start spem, seed 0",
        "finish 91.25 %",
    ]
