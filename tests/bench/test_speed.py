"""benchmarks/speed.py: ratios are to the fastest plain arm, rows of other pieces stay."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

pytest.importorskip("numba", reason="numba is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")

import record
import speed
from speed import Arm, Piece


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "speed.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "keep_freed_memory", lambda: True)  # of the whole process
    monkeypatch.setattr(speed, "TRAINED", ("2x16x4x4",))
    monkeypatch.setattr(speed, "INFERRED", ("16x4x4",))


def test_tails_of_one_piece_and_then_of_another(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    words = ("--rounds", "2", "--threads", "1", "--out", str(tmp_path), "--only")
    try:
        assert speed.main([*words, "tails", "bf16"]) == 0
        first = rows(tmp_path)
        assert [(r["attention"], r["way"]) for r in first] == [
            ("none", "plain"),
            *((name, "fused") for name in ("none", "se", "eca", "spem")),
        ]
        assert {r["to_plain"] for r in first if r["way"] == "plain"} == {"1.000"}
        assert all(r["hardware"] and r["torch"] and r["commit"] for r in first)
        assert speed.main([*words, "inference_tails", "8"]) == 0
        both = rows(tmp_path)
        assert both[:5] == first
        assert {(r["subject"], r["layout"]) for r in both[5:]} == {
            ("8x16x4x4", "contiguous"),
            ("8x16x4x4", "channels_last"),
        }
        assert (tmp_path / "speed.svg").read_text().count("Block tails in") == 2
    finally:
        torch.set_num_threads(threads)


def test_the_fastest_plain_network_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {("fp32", "contiguous"): 4.0, ("bf16", "channels_last"): 2.0}
    monkeypatch.setattr(
        speed, "in_turns", lambda calls, rounds: {a: [times[a[2:]]] * rounds for a in calls}
    )
    calls = {Arm("none", "plain", *kind): lambda: None for kind in times}
    plain = Piece("steps", "128 plain", "all", "all", 2)
    found = speed.rows_of(plain, "cifar:29", calls, None, 2, "128")
    assert [row["to_plain"] for row in found] == ["2.000", "1.000"]
    monkeypatch.setattr(speed, "facts", lambda _: {"hardware": found[0]["hardware"]})
    piece = Piece("steps", "128", "fp32", "contiguous", 2)
    assert speed.fastest(piece, "128", found, {"plain"}) == Arm(
        "none", "plain", "bf16", "channels_last"
    )
    with pytest.raises(SystemExit, match=r"First run .* --only steps 128 plain"):
        speed.fastest(piece, "128", [], {"plain"})


def test_calls_take_turns() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    times = record.in_turns(calls, 3, least=0.0)
    assert order[:4] == ["a", "a", "b", "b"]
    assert sorted(order[4:6]) == sorted(order[6:8]) == sorted(order[8:10]) == ["a", "b"]
    assert [len(own) for own in times.values()] == [3, 3]


@pytest.mark.slow
def test_steps_run() -> None:
    for way in ("composed", "fused"):
        speed.step_call(Arm("spem", way, "fp32", "channels_last"))()


@pytest.mark.slow
def test_inference_runs() -> None:
    pytest.importorskip("timm", reason="timm is not installed")
    for way in ("attached", "fused", "folded"):
        speed.inference_call(Arm("spem", way, "bf16", "channels_last"), 1)()
