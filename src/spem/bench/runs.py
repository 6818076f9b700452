"""From a call to files: measure, write the table, draw it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from spem.bench import table
from spem.bench.facts import machine
from spem.bench.family import run_family
from spem.bench.infer import run_network
from spem.bench.memory import run_memory
from spem.bench.ops import run_ops
from spem.bench.settings import Settings
from spem.bench.step import Workload, run_step
from spem.bench.table import Row


def path_of(kind: str, out: Path, settings: Settings) -> Path:
    """Where a table lies in a folder: ``step_cpu.csv``, ``ops_nvidia-h200.csv``."""
    return out / f"{kind}_{machine(settings.where())}.csv"


def measure(
    kind: str,
    settings: Settings,
    work: Workload | None = None,
    *,
    path: Path | None = None,
    resume: bool = False,
    quiet: bool = False,
) -> list[Row]:
    """Measures one table and writes it.

    Args:
        kind: A key of `spem.bench.table.KINDS`.
        settings: How.
        work: The network, for all but ``"ops"``.
        path: The CSV file; None writes nothing. The tail's is written after every map.
        resume: Keep the maps that the file has, if they are of the same commit and machine.
        quiet: No progress line.

    Raises:
        BenchError: A provider deviates from the reference; nothing is written then.
    """
    if kind == "ops":
        save: Callable[[list[Row]], None] | None = None
        kept = table.read(path) if resume and path is not None else []
        if path is not None:
            save = _writer(path)
        return run_ops(settings, kept=kept, save=save, quiet=quiet)
    runs = {
        "step": run_step,
        "family": run_family,
        "network": run_network,
        "memory": run_memory,
    }
    rows = runs[kind](settings, work or Workload(), quiet=quiet)
    if path is not None:
        table.write(rows, path)
    return rows


def _writer(path: Path) -> Callable[[list[Row]], None]:
    def save(rows: list[Row]) -> None:
        table.write(rows, path)

    return save
