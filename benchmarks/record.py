"""What every table of a benchmark shares: what it was measured on, and how it is kept."""

from __future__ import annotations

import csv
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import pandas as pd
import torch

from spem.training.environment import commit, hardware, versions

Row = dict[str, str]
K = TypeVar("K")


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


def in_turns(
    calls: Mapping[K, Callable[[], object]], rounds: int, *, least: float = 0.004
) -> dict[K, list[float]]:
    """Milliseconds of one call in each round; all take turns, in an order drawn for each round.

    What else the machine does then strikes all alike, so ratios within a round mean more than the
    times. A call that takes less than `least` seconds is repeated until it does.
    """
    times: dict[K, list[float]] = {name: [] for name in calls}
    numbers: dict[K, int] = {}
    for name, call in calls.items():
        call()  # kernels are compiled, memory is there
        numbers[name] = max(1, math.ceil(least / _seconds(call, 1)))
    for _ in range(rounds):
        for name in random.sample(list(calls), len(calls)):
            times[name].append(1e3 * _seconds(calls[name], numbers[name]))
    return times


def _seconds(call: Callable[[], object], number: int) -> float:
    start = time.perf_counter()
    for _ in range(number):
        call()
    return (time.perf_counter() - start) / number
