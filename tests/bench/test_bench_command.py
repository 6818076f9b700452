"""The command: a summary on standard output, one sentence on failure."""

from __future__ import annotations

from pathlib import Path

import pytest

from spem.bench import checks, ops, table, tails
from spem.bench.tails import Case
from spem.cli import main

pytest.importorskip("tyro")
SMALL = [Case("bn_train", 2, 16, 4, 4)]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "cases", lambda device, quick: SMALL)


@pytest.mark.usefixtures("small")
def test_quick(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert main(["bench", "ops", "--quick", "--impl", "formula", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "bn_train, both, 2x16x4x4, float32, contiguous; copy" in out
    assert "attention cost = time / the same passes without attention" in out
    assert "fusion gain = fused / plain PyTorch" in out
    assert "Aims" not in out
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("small")
def test_table_and_picture(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    call = ["bench", "ops", "--impl", "formula", "--no-compile", "--rounds", "2", "--device", "cpu"]
    assert main([*call, "--out", str(tmp_path)]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ops_cpu.csv", "ops_cpu.svg"]
    assert "Aims:" in capsys.readouterr().out
    before = table.read(tmp_path / "ops_cpu.csv")
    assert main([*call, "--resume", "--out", str(tmp_path)]) == 0
    assert table.read(tmp_path / "ops_cpu.csv") == before
    assert main(["bench", "plot", str(tmp_path)]) == 0


@pytest.mark.usefixtures("small")
def test_a_wrong_provider(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tails, "MAPS", dict.fromkeys(checks.MAPS, 0.0))
    assert main(["bench", "ops", "--quick", "--impl", "formula"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.strip().splitlines()[-1].startswith("spem: bench: none, composed (bn_train")


def test_the_family(capsys: pytest.CaptureFixture[str]):
    """Modules of every place, with what they add: counts from the formulas of their papers."""
    who = ["eca", "bam", "dia", "sk", "ge(form=theta)"]
    assert main(["bench", "family", "--quick", "--impl", "formula", "--attention", *who]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    added = {(line[0], line[1]): line[-2] for line in lines if len(line) > 3 and line[0] in who}
    assert added[("eca", "composed")] == added[("eca", "fused")] == "13"  # 3 + 5 + 5
    assert added[("bam", "composed")] == "5630"  # after the first two stages
    assert added[("dia", "fused")] == str(10_784 + 42_048 + 166_016)
    assert ("sk", "fused") not in added
    assert int(added[("sk", "composed")]) < 0  # grouped convolutions in place of a full one
    assert added[("ge(form=theta)", "composed")] == str(65_664 + 33_024 + 16_896)


def test_mistakes(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert main(["bench", "step", "--quick", "--attention", "spam"]) == 2
    assert "spam" in capsys.readouterr().err
    assert main(["bench", "ops", "--quick", "--device", "cuda"]) == 2
    assert main(["bench", "plot", str(tmp_path)]) == 2
    assert "holds no table" in capsys.readouterr().err
