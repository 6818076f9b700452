"""benchmarks/resnet50.py: it runs, in little; ratios are to the plain network; it can refuse."""

from __future__ import annotations

import csv
import statistics
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("timm", reason="timm is not installed")
pytest.importorskip("numba", reason="numba is not installed")

import resnet50
from resnet50 import Subject

import spem


def test_quick(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = [s for s in resnet50.SUBJECTS if s.attention in ("none", "se")]
    assert [s.way for s in chosen] == ["composed", "timm", "attached", "fused"]
    monkeypatch.setattr(resnet50, "SUBJECTS", chosen)
    assert resnet50.main(["--quick", "--out", str(tmp_path)]) == 0
    with (tmp_path / "resnet50_cpu.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    told = [(row["mode"], row["attention"], row["way"]) for row in rows]
    assert told == [(mode, s.attention, s.way) for mode in resnet50.MODES for s in chosen]
    for row in rows:
        plain = next(r for r in rows if (r["mode"], r["attention"]) == (row["mode"], "none"))
        ratio = float(row["time_ms_median"]) / float(plain["time_ms_median"])
        assert float(row["to_plain"]) == pytest.approx(ratio, rel=1e-2)
        assert row["image"] == "64"
        assert row["commit"]
        assert row["timm"]
    counts = [int(row["parameters"]) for row in rows[:4]]
    assert counts[0] == 25_557_032
    assert counts[2] == counts[3] > counts[0]
    assert statistics.median(counts) > counts[0]
    assert "se fused training 2" in capsys.readouterr().out


def test_a_fused_network_that_is_another_is_refused() -> None:
    class Half(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / 2 if self.training else x

    subjects = [Subject("eca", way) for way in ("attached", "fused")]
    same = {subject: nn.Identity() for subject in subjects}
    resnet50.compare(same)
    with pytest.raises(SystemExit, match=r"eca, fused differs from attached by 0\.5"):
        resnet50.compare({subjects[0]: nn.Identity(), subjects[1]: Half()})


def test_networks_are_what_they_are_called() -> None:
    fused, theirs = (resnet50.network(Subject("eca", way)) for way in ("fused", "timm"))
    assert len([m for m in fused.modules() if isinstance(m, spem.ECA)]) == 16
    assert not [m for m in theirs.modules() if isinstance(m, spem.ECA)]
    assert len([m for m in theirs.modules() if type(m).__name__ == "EcaModule"]) == 16


def test_too_little_memory_is_said_before_anything_is_built() -> None:
    if not Path("/proc/meminfo").exists():
        pytest.skip("this system does not tell its memory")
    with pytest.raises(SystemExit, match=r"GiB are needed, .* Give smaller --batches"):
        resnet50.main(["--batches", "1000000"])
