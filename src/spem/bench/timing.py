"""Taking turns with a clock: every provider once a round, so a busy moment hits them alike."""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Protocol

import torch

Sample = dict[str, float]
"""Milliseconds of one call, by mode: ``forward``, ``backward``, ``both`` or ``step``."""

L2_BYTES = 256 << 20
"""More than any GPU's second-level cache holds."""


class Provider(Protocol):
    """Something that can be timed."""

    def sample(self) -> Sample:
        """Runs once and returns the milliseconds of its parts."""
        ...


def timed(device: torch.device, *parts: Callable[[], object]) -> list[float]:
    """The milliseconds of calls that follow one another, on the device's own clock."""
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for part in parts:
            part()
            marks.append(time.perf_counter())
        return [1e3 * (b - a) for a, b in pairwise(marks)]
    events: list[Any] = [torch.cuda.Event(enable_timing=True) for _ in range(len(parts) + 1)]
    torch.cuda.synchronize(device)
    events[0].record()
    for part, event in zip(parts, events[1:], strict=True):
        part()
        event.record()
    torch.cuda.synchronize(device)
    return [a.elapsed_time(b) for a, b in pairwise(events)]


def captured(
    device: torch.device, call: Callable[[], object], free: Callable[[], object]
) -> tuple[float, Callable[[], object]]:
    """Records a call as a CUDA graph, after three that leave nothing to compile or to choose.

    All of them on one side stream: autograd ties the leaves of a graph to a stream, and work for
    another one, as the default stream, cannot be recorded.

    Args:
        device: The GPU.
        call: Must not have been made before.
        free: Called before the recording; drops what the calls have left, graphs above all.

    Returns:
        Seconds of the first call, and what replays the recording.
    """
    with torch.cuda.device(device):
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream(device)
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            (first,) = timed(device, call)
            for _ in range(2):
                call()
        here.wait_stream(aside)
        free()
        graph: Any = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=aside):
            call()
    return first / 1e3, graph.replay


def round_robin(
    providers: Mapping[str, Provider],
    rounds: int,
    warm_up: int,
    *,
    before: Callable[[], object] | None = None,
    tell: Callable[[int, int], None] | None = None,
) -> dict[str, list[Sample]]:
    """One call of each provider per round, in an order drawn anew (seeded) for every round.

    Args:
        providers: Who takes part, by name.
        rounds: Rounds that count.
        warm_up: Rounds before those.
        before: Called before every single call, outside of its time.
        tell: Told (calls done, calls in all).
    """
    names = list(providers)
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    done, total = 0, len(names) * (rounds + warm_up)
    order = random.Random(0)
    for turn in range(-warm_up, rounds):
        # In a rotation everybody would always follow the same neighbour.
        for name in order.sample(names, len(names)):
            if before is not None:
                before()
            sample = providers[name].sample()
            if turn >= 0:
                samples[name].append(sample)
            done += 1
            if tell is not None:
                tell(done, total)
    return samples


def flusher(device: torch.device) -> Callable[[], object] | None:
    """Empties a GPU's second-level cache; None on a CPU."""
    if device.type != "cuda":
        return None
    filler = torch.empty(L2_BYTES // 4, dtype=torch.int32, device=device)
    return filler.zero_


def copy_bandwidth(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> float:
    """GB/s of copying a map of this size, bytes read and written counted; the median of nine."""
    source = torch.randn(tuple(shape), device=device).to(dtype)
    target = torch.empty_like(source)
    flush = flusher(device)
    times: list[float] = []
    for turn in range(12):
        if flush is not None:
            flush()
        (elapsed,) = timed(device, lambda: target.copy_(source))
        if turn >= 3:
            times.append(elapsed)
    return 2 * source.numel() * source.element_size() / statistics.median(times) / 1e6


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The 20, 50 and 80 % quantiles."""
    q20, _, _, q80 = statistics.quantiles(values, n=5, method="inclusive")
    return q20, statistics.median(values), q80


class Countdown:
    """A line on standard error: what is measured, and the time left for it and for the rest.

    Args:
        parts: How many parts the whole measurement has, each about equally long.
        quiet: Say nothing.
    """

    def __init__(self, parts: int, *, quiet: bool = False) -> None:
        self._parts, self._done, self._quiet = max(parts, 1), 0, quiet
        self._label = ""
        self._started = self._part_started = self._told = time.monotonic()
        self._live = sys.stderr.isatty()

    def start(self, label: str) -> None:
        """A part begins: its providers are compiled and compared first."""
        self._label, self._part_started = label, time.monotonic()
        self._say(f"{label}: comparing with the reference", force=True)

    def check(self, name: str) -> None:
        """A provider is being built and compared."""
        self._say(f"{self._label}: comparing {name}")

    def tell(self, done: int, total: int) -> None:
        """So many calls of this part are done."""
        now = time.monotonic()
        left = (now - self._part_started) * (total - done) / done
        whole = (now - self._started + left) / (self._done + 1)
        left += whole * (self._parts - self._done - 1)
        self._say(f"{self._label}: {done} of {total} calls, {_duration(left)} left")

    def finish(self) -> None:
        """The part is done."""
        self._done += 1
        if self._done == self._parts and self._live and not self._quiet:
            sys.stderr.write("\n")

    def _say(self, text: str, *, force: bool = False) -> None:
        now = time.monotonic()
        if self._quiet or not (force or now - self._told >= (0.2 if self._live else 30.0)):
            return
        self._told = now
        sys.stderr.write(f"\r\x1b[K{text}" if self._live else f"{text}\n")
        sys.stderr.flush()


def _duration(seconds: float) -> str:
    from spem.training.progress import duration

    return duration(seconds)
