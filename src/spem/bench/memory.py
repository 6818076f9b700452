"""Peak memory of a training step and of inference, every provider in a process of its own.

The process builds its network, makes one step on a small batch (so that code, kernels and caches
are loaded), and then two on the whole batch; what counts is by how much the peak lies above what
was held before those two. On a CPU that is resident memory as the system counts it, on a GPU what
torch allocated. The other number is the whole process's peak of resident memory.

glibc is told to map every larger tensor by itself: the holes that freed tensors leave in its heap
belong to nobody, and differ from process to process.

    python -m spem.bench.memory '{"attention": "spem", ...}'     # one process; prints two numbers
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from spem.bench.checks import BenchError
from spem.bench.facts import facts
from spem.bench.nets import DTYPES, NetProvider, checked, images
from spem.bench.ratios import bases
from spem.bench.settings import (
    Settings,
    Subject,
    full_precision,
    fused_impl,
    impl_of,
)
from spem.bench.step import Workload, build, subjects
from spem.bench.table import Row
from spem.bench.timing import Countdown

RATIOS = ("attention_cost", "to_plain", "to_official")
MIB = 1 << 20
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peak(NamedTuple):
    """MiB: of two steps above what was held before them, and of the whole process."""

    steps: float
    process: float


def run_memory(
    settings: Settings, work: Workload, *, repeats: int = 3, quiet: bool = False
) -> list[Row]:
    """Measures the peak memory of every subject, training and inference, several times each.

    Raises:
        BenchError: A subject deviates from the reference, or its process failed.
    """
    device = settings.where()
    if settings.quick:
        # Every process takes seconds to start.
        work, repeats = replace(work.quick(), attentions=("none", "spem")), 1
    rows: list[Row] = []
    with full_precision(settings.threads):
        run_facts = {"repeats": str(repeats), **facts(device)}
        fused, _ = fused_impl(settings, DTYPES[work.dtype])
        chosen = subjects(settings, work, compiled=False)
        for subject in chosen:
            checked(subject, fused, device, work.dtype, work.layout)
        countdown = Countdown(2, quiet=quiet)
        for training in (True, False):
            countdown.start("training" if training else "inference")
            peaks: dict[Subject, list[Peak]] = {subject: [] for subject in chosen}
            for turn in range(repeats):
                for i, subject in enumerate(chosen):
                    impl = impl_of(subject.way, fused)
                    peaks[subject].append(_ask(settings, work, subject, impl, training=training))
                    countdown.tell(turn * len(chosen) + i + 1, repeats * len(chosen))
            countdown.finish()
            mode = "training" if training else "inference"
            rows += [_row(mode, s, peaks, impl_of(s.way, fused), work, run_facts) for s in chosen]
    return rows


def _row(
    mode: str,
    subject: Subject,
    peaks: dict[Subject, list[Peak]],
    impl: str,
    work: Workload,
    run_facts: Row,
) -> Row:
    steps = {s: [peak.steps for peak in found] for s, found in peaks.items()}
    mine, whole = steps[subject], [peak.process for peak in peaks[subject]]
    middle = statistics.median(mine)
    columns: Row = {}
    for name in RATIOS:
        base = steps.get(bases(subject)[name]) if name in bases(subject) else None
        columns[name] = f"{middle / statistics.median(base):.3f}" if base else ""
    return {
        "mode": mode,
        "attention": subject.attention,
        "way": subject.way,
        "impl": impl,
        "peak_mib": f"{middle:.1f}",
        "peak_mib_least": f"{min(mine):.1f}",
        "peak_mib_most": f"{max(mine):.1f}",
        "process_peak_mib": f"{statistics.median(whole):.1f}",
        **columns,
        **work.columns,
        **run_facts,
    }


def _ask(
    settings: Settings, work: Workload, subject: Subject, impl: str, *, training: bool
) -> Peak:
    """The peak of a process of its own."""
    question = {
        "attention": subject.attention,
        "way": subject.way,
        "impl": impl,
        "training": training,
        "device": settings.where().type,
        "threads": torch.get_num_threads(),
        "work": {k: v for k, v in asdict(work).items() if k != "attentions"},
    }
    command = [sys.executable, "-m", "spem.bench.memory", json.dumps(question)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(MIB)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        reason = done.stderr.strip().rpartition("\n")[2]
        raise BenchError(f"bench: the process that measures {subject} failed: {reason}")
    steps, process = done.stdout.strip().rpartition("\n")[2].split()
    return Peak(float(steps), float(process))


def peak_of(question: dict[str, Any]) -> Peak:
    """Answers in this process."""
    work = Workload(**question["work"])
    subject = Subject(question["attention"], question["way"])
    device = torch.device(question["device"])
    with full_precision(question["threads"]):
        # No search among convolutions: its trials need memory of their own.
        torch.backends.cudnn.benchmark = False
        model = build(subject, work, device)
        held, process = 0, 0
        for size in (2, work.batch):
            here = replace(work, batch=size)
            found, labels = images(here.batch, here.layout)
            provider = NetProvider(
                subject,
                model,
                question["impl"],
                (found.to(device), labels.to(device)),
                training=question["training"],
                dtype=DTYPES[work.dtype],
            )
            process = max(process, _resident_peak())  # before it is forgotten
            held = _restart(device)
            for _ in range(2):
                provider.sample()
        return Peak((_peak(device) - held) / MIB, max(process, _resident_peak()) / MIB)


def _restart(device: torch.device) -> int:
    """Forgets the peak so far, where the system can, and returns the bytes held now."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    # Where it cannot, the peak of start-up remains; a whole batch needs more.
    with contextlib.suppress(OSError):
        _CLEAR.write_text("5")
    return _status("VmRSS") or _high_water()


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    return _resident_peak()


def _resident_peak() -> int:
    return _status("VmHWM") or _high_water()


def _status(name: str) -> int:
    """Bytes of an entry of /proc/self/status, 0 where there is none."""
    lines = _STATUS.read_text().splitlines() if _STATUS.exists() else []
    found = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return int(found[0]) * 1024 if found else 0


def _high_water() -> int:
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main(arguments: Sequence[str]) -> None:
    """Answers one question, given as JSON."""
    peak = peak_of(json.loads(arguments[0]))
    sys.stdout.write(f"{peak.steps:.3f} {peak.process:.3f}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
