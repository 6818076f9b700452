"""What every table of a benchmark shares: what it was measured on, and how it is kept."""

from __future__ import annotations

import csv
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import torch
from torch.utils.benchmark import Timer

from spem.training.environment import commit, hardware, versions

Row = dict[str, str]


def facts(device: torch.device) -> Row:
    """The columns in which every row ends."""
    found = versions()
    return {
        "device": device.type,
        "hardware": hardware(device, torch.get_num_threads()),
        "torch": found["torch"],
        "numba": found["numba"],
        "triton": found["triton"],
        "python": found["python"],
        "commit": commit() or "installed",
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def write(rows: Sequence[Row], path: Path) -> None:
    """Writes a table whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    pd.DataFrame(rows).to_csv(temporary, index=False, lineterminator="\n")
    temporary.replace(path)


def read(path: Path) -> list[Row]:
    """The rows of a table as they were written; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def in_turns(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of one call in each round; all take turns, in an order drawn anew.

    What else the machine does then strikes all alike, so ratios within a round mean more than the
    times.
    """
    threads = torch.get_num_threads()
    timers = {
        name: Timer("call()", globals={"call": call}, num_threads=threads)
        for name, call in calls.items()
    }
    times: dict[str, list[float]] = {name: [] for name in timers}
    for number in range(rounds + 2):
        for name in random.sample(list(timers), len(timers)):
            taken = 1e3 * timers[name].timeit(1).mean
            if number >= 2:  # kernels are compiled, memory is there
                times[name].append(taken)
    return times


def time_columns(times: Sequence[float], plain: Sequence[float]) -> Row:
    """Median and quantiles of milliseconds, and of the ratios to the plain network's of a round."""
    ratios = [own / base for own, base in zip(times, plain, strict=True)]
    return {
        "time_ms_median": f"{statistics.median(times):.4g}",
        "to_plain": f"{statistics.median(times) / statistics.median(plain):.3f}",
        "to_plain_rounds_median": f"{statistics.median(ratios):.3f}",
        "to_plain_rounds_low": f"{min(ratios):.3f}",
        "to_plain_rounds_high": f"{max(ratios):.3f}",
    }
