"""Every Triton kernel compiles for sm_80 and sm_90, spills nothing and reads wide vectors.

Triton's compiler and assembler come with its wheel and need no GPU.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

pytest.importorskip("triton", minversion="3.6", reason="no triton of 3.6 or later")

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "kernel_registers.py"
PASSES = {"plane_stats", "affine_tail", "affine_tail_backward", "stats_backward"}
# Three programs of four warps share the 65,536 registers of a multiprocessor.
MOST_REGISTERS = 168


def compiled(out: Path) -> list[dict[str, str]]:
    """The table of `benchmarks/kernel_registers.py`; bfloat16 represents float16."""
    # The interpreter, which this process may have switched on, is switched off there.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), "--dtypes", "float32", "bfloat16", "--out", str(out)]
    run = subprocess.run(
        command, check=False, env=environment, capture_output=True, text=True, timeout=270
    )
    assert out.exists(), run.stderr
    with out.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
# One test, so that parallel workers compile once.
def test_every_kernel_compiles_without_spills_and_with_wide_loads(tmp_path: Path) -> None:
    table = compiled(tmp_path / "table.csv")
    for layout, sm, dtype in product(
        ("contiguous", "channels_last"), ("80", "90"), ("float32", "bfloat16")
    ):
        rows = [r for r in table if (r["layout"], r["sm"], r["dtype"]) == (layout, sm, dtype)]
        assert {r["kernel"] for r in rows} == PASSES | {"merge_stats"}
        for name in PASSES:
            sizes = {p for r in rows if r["kernel"] == name for p in r["planes"].split()}
            assert sizes >= {"7x7", "8x8", "14x14", "16x16", "28x28", "32x32", "56x56"}
    assert [row for row in table if int(row["spilled_bytes"])] == []
    assert [row for row in table if int(row["registers"]) > MOST_REGISTERS] == []
    # 128 bits wherever rows are aligned to that; lost as soon as a mask hides a size's divisor.
    narrow = {
        (row["layout"], row["planes"])
        for row in table
        if row["kernel"] in PASSES and int(row["load_bits"]) < 128
    }
    assert narrow <= {("contiguous", "14x14"), ("contiguous", "7x7")}
