"""benchmarks/gpu.py: stages go on where they stopped, and end in time."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import gpu
import pytest
import torch

PYTHON = sys.executable


def reports(out: Path, outcome: str = "") -> list[str]:
    """A command that leaves a report with one test for each file."""
    names = (name.removesuffix(".py").replace("/", ".") for name in gpu.TESTS)
    cases = "".join(f'<testcase classname="{name}" name="t">{outcome}</testcase>' for name in names)
    text = f"<testsuites><testsuite>{cases}</testsuite></testsuites>"
    return [PYTHON, "-c", f"open({str(out / 'tests.xml')!r}, 'w').write({text!r})"]


def writes(path: Path) -> list[str]:
    return [PYTHON, "-c", f"open({str(path)!r}, 'a').write('x')"]


@pytest.mark.slow
def test_stages_go_on_where_they_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(gpu, "LEAST", 0.0)
    monkeypatch.setattr(gpu, "GRACE", 1.0)
    out, first, last = tmp_path / "out", tmp_path / "first", tmp_path / "last"
    sleeps = [PYTHON, "-c", "import time; time.sleep(600)"]
    commands = {"tests": reports(out), "first": writes(first), "tails": sleeps}
    commands["training"] = writes(last)
    began = time.monotonic()
    assert gpu.carry_on(commands, out, began + 6) == 3
    assert time.monotonic() - began < 60
    assert gpu.read_state(out) == {"tests": "done", "first": "done"}
    assert not last.exists()
    commands["tails"] = [PYTHON, "-c", "print('timed')"]
    assert gpu.carry_on(commands, out, time.monotonic() + 300) == 0
    assert first.read_text() == last.read_text() == "x"  # done once
    assert "timed" in (out / "log.txt").read_text()
    assert "tests: done before" in capsys.readouterr().out


def test_nothing_is_timed_where_the_tests_failed_or_were_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    fails = [PYTHON, "-c", "raise SystemExit(4)"]
    for name, tests in (("a", fails), ("b", reports(tmp_path / "b", "<skipped/>"))):
        commands = {"tests": tests, "tails": writes(tmp_path / "timed")}
        assert gpu.carry_on(commands, tmp_path / name, time.monotonic() + 300) == 1
        assert gpu.read_state(tmp_path / name) == {"tests": "failed"}
        assert not (tmp_path / "timed").exists()
    assert f"no test of {gpu.TESTS[0]}" in capsys.readouterr().out


def test_too_little_time_starts_nothing(tmp_path: Path):
    commands = {"tests": writes(tmp_path / "ran")}
    assert gpu.carry_on(commands, tmp_path, time.monotonic() + 5) == 3
    assert not (tmp_path / "ran").exists()


def test_without_a_gpu_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([str(tmp_path / "out")]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_commands_name_what_is_there(tmp_path: Path):
    """Files of tests exist, and `spem reproduce` knows the experiment and the recipe."""
    from spem.cli.reproduce import OWN, PAPER, SCALES

    found = gpu.stages(tmp_path, "scratch", "study", None)
    assert list(found) == ["tests", "tails", "steps", "training"]
    assert all((gpu.ROOT / name).exists() for name in gpu.TESTS)
    assert found["training"][3:7] == ["reproduce", "scratch", "--recipe", "study"]
    assert {"scratch", "table1"} <= {*OWN, *PAPER}
    assert {"study", "paper"} <= set(SCALES)


@pytest.mark.parametrize("attention", ["none", "spem"])
def test_what_is_timed_runs_and_is_not_timed_twice(
    attention: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """On the CPU, without graphs: a way that cannot run has a row that says why."""
    monkeypatch.setattr(gpu, "ROUNDS", 2)
    monkeypatch.setattr(gpu, "WAYS", (("reference", "eager"), ("triton", "eager")))
    monkeypatch.setattr("record.hardware", lambda *_: "a machine")
    made: list[str] = []

    def tail(kind: dict[str, str], impl: str, way: str) -> object:
        made.append(impl)
        if impl == "triton":
            raise ValueError("triton cannot run here.")
        return gpu.tail(kind, impl, way, device="cpu")

    kind = {"map": "2x8x4x4", "dtype": "float32", "attention": attention}
    for _ in range(2):
        gpu.time_table([kind], tail, tmp_path / "tails.csv")
    import record

    rows = record.read(tmp_path / "tails.csv")
    assert made == ["reference", "triton"]
    assert [row["impl"] for row in rows] == made
    assert float(rows[0]["to_plain"]) == 1
    assert rows[1]["note"] == "triton cannot run here."
    step = gpu.training_step(
        {"depth": "11", "batch": "4", "attention": attention}, "reference", "eager", device="cpu"
    )
    assert step().loss.isfinite()  # pyright: ignore[reportAttributeAccessIssue]
