"""Peak memory: a process each, and what it answers."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from spem.bench import memory
from spem.bench.checks import BenchError
from spem.bench.settings import Settings, Subject
from spem.bench.step import Workload

QUESTION = {
    "attention": "se",
    "way": "composed",
    "impl": "reference",
    "training": True,
    "device": "cpu",
    "threads": 1,
    "work": {"depth": 11, "batch": 64, "dtype": "float32", "layout": "contiguous"},
}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_finds_the_memory_of_its_step():
    """Activations of three blocks on 64 images: tens of MiB, and not hundreds."""
    command = [sys.executable, "-m", "spem.bench.memory", json.dumps(QUESTION)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    steps, process = map(float, done.stdout.split())
    assert 50 < steps < 1000
    assert process > steps + 50  # torch alone is more


def test_rows(monkeypatch: pytest.MonkeyPatch):
    peaks = {"none": 100.0, "spem": 120.0, "spem(form=code)": 240.0}

    def ask(settings, work, subject, impl, *, training):
        return memory.Peak(peaks[subject.attention] * (1 if training else 0.5), 500.0)

    monkeypatch.setattr(memory, "_ask", ask)
    settings = Settings("cpu", impl="formula", compiled=False, quick=True)
    rows = memory.run_memory(settings, Workload(), quiet=True)
    assert len(rows) == 10
    (row,) = [
        r for r in rows if (r["attention"], r["way"], r["mode"]) == ("spem", "fused", "training")
    ]
    assert (row["peak_mib"], row["to_plain"], row["attention_cost"]) == ("120.0", "1.200", "1.200")
    assert row["to_official"] == "0.500"
    assert row["process_peak_mib"] == "500.0"


def test_a_process_that_fails_is_named():
    with pytest.raises(BenchError, match="measures nonsense, composed failed: ValueError"):
        memory._ask(
            Settings("cpu"),
            Workload(11, 2),
            Subject("nonsense", "composed"),
            "reference",
            training=True,
        )
    assert torch.get_num_threads() >= 1
