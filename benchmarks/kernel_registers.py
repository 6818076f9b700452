"""Compiles every Triton kernel for GPUs that need not be there and reads what the cubin says.

A launch is recorded on tensors without data, for every plane size of the usual networks, layout and
dtype, and then taken through Triton's own compiler for sm_80 and sm_90: registers, spilled bytes,
shared memory, the widest load. Launches that compile to the same kernel are one row.

    python benchmarks/kernel_registers.py                    # about half a minute on 2 cores
    python benchmarks/kernel_registers.py --dtypes bfloat16 --out /tmp/registers.csv
"""

import argparse
import csv
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

# The interpreter's kernels cannot be compiled.
os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from spem.ops import cuda
from spem.ops.cuda import kernels

ARCHITECTURES = (80, 90)
DTYPES = ("float32", "float16", "bfloat16")
# Batch, channels, height: the stages of a CIFAR ResNet and of an ImageNet ResNet; channels that are
# no multiple of 16; one image, whose planes are split among programs; a map with int64 offsets.
MAPS = (
    (128, 64, 32),
    (128, 128, 16),
    (128, 256, 8),
    (128, 256, 56),
    (128, 512, 28),
    (128, 1024, 14),
    (128, 2048, 7),
    (128, 24, 56),
    (1, 64, 112),
    (1, 2048, 1024),
)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
}
DEFAULT_OUT = Path(__file__).parent / "results" / "kernel_registers.csv"


@dataclass(frozen=True)
class Launch:
    """What Triton compiles for one launch: types and alignments of the arguments, constants."""

    kernel: str
    signature: tuple[tuple[str, str], ...]
    aligned: tuple[int, ...]
    constants: tuple[tuple[str, bool | int], ...]
    warps: int


@dataclass(frozen=True)
class Job:
    """A launch to compile for an architecture, and what it came from."""

    launch: Launch
    architecture: int
    dtype: str
    layout: str
    planes: str


@dataclass
class Row:
    """A line of the table. ``planes`` are the sizes that this kernel serves."""

    kernel: str
    layout: str
    planes: str
    dtype: str
    sm: int
    tile: str
    warps: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    load_bits: int
    constants: str
    triton: str = field(default=triton.__version__)


def recorded(kernel: Any, _programs: int, *arguments: Any, **constants: Any) -> Launch:
    """The launch of a kernel, as Triton specialises it on its arguments."""
    warps = constants.pop("num_warps", 4)
    signature: list[tuple[str, str]] = []
    aligned: list[int] = []
    for number, name in enumerate(kernel.arg_names):
        if name in constants:
            signature.append((name, "constexpr"))
            continue
        value = arguments[number]
        if isinstance(value, Tensor):
            signature.append((name, POINTERS[value.dtype]))
            # Allocations are aligned; views of them only where their offset is.
            if value.storage_offset() * value.element_size() % 16 == 0:
                aligned.append(number)
        else:
            signature.append((name, "i32"))
    chosen = tuple(sorted(constants.items()))
    return Launch(kernel.__name__, tuple(signature), tuple(aligned), chosen, warps)


def launches(B: int, C: int, H: int, dtype: torch.dtype, last: bool) -> Iterator[Launch]:
    """The launches of all passes on a map, recorded on tensors without data."""
    found: list[Launch] = []

    def record(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        found.append(recorded(kernel, programs, *arguments, **constants))

    form = torch.channels_last if last else torch.contiguous_format
    z = torch.empty(B, C, H, H, dtype=dtype, device="meta", memory_format=form)
    mu = torch.empty(C, device="meta")
    s = torch.empty(B, C, device="meta")
    i = torch.empty(B, C, device="meta", dtype=torch.int32)
    # The passes take a tensor of any device when they believe in the interpreter.
    with patch.multiple(cuda, _launch=record, INTERPRETED=True):
        cuda.plane_stats(z, True, True)
        cuda.affine_tail(z, z, mu, s, mu, mu)
        cuda.affine_tail_backward(z, z, z, mu)
        cuda.stats_backward(z, z, mu, s, s, s, i, i, s, s)
    yield from found


def jobs(dtypes: Iterable[str]) -> list[Job]:
    """All different launches of the maps, for every architecture."""
    served: dict[tuple[Launch, str, str], list[str]] = {}
    for dtype in dtypes:
        for last in (False, True):
            layout = "channels_last" if last else "contiguous"
            for B, C, H in MAPS:
                for launch in launches(B, C, H, getattr(torch, dtype), last):
                    served.setdefault((launch, dtype, layout), []).append(f"{H}x{H}")
    return [
        Job(launch, architecture, dtype, layout, " ".join(dict.fromkeys(planes)))
        for (launch, dtype, layout), planes in served.items()
        for architecture in ARCHITECTURES
    ]


def compiled(launch: Launch, architecture: int) -> Any:
    """The kernel of a launch, through all stages of Triton's compiler."""
    source = ASTSource(
        fn=getattr(kernels, launch.kernel),
        signature=dict(launch.signature),
        constexprs=dict(launch.constants),
        attrs={(number,): [["tt.divisibility", 16]] for number in launch.aligned},
    )
    options = {"num_warps": launch.warps, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def measured(job: Job) -> Row:
    """Compiles a launch and reads its cubin."""
    launch, constants = job.launch, dict(job.launch.constants)
    stages = compiled(launch, job.architecture).asm
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(stages["cubin"])
        usage = subprocess.run(
            [CUOBJDUMP, "-res-usage", cubin], check=True, capture_output=True, text=True
        ).stdout
    used = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", usage)}
    loads = re.findall(r"ld\.global\S*?(?:\.v(\d+))?\.[bfus](\d+)", stages["ptx"])
    flags = [name for name, value in constants.items() if value is True and name != "LAST"]
    units = [f"{name}={constants[name]}" for name in ("K_UNIT", "C_UNIT") if name in constants]
    return Row(
        kernel=launch.kernel.removesuffix("_kernel"),
        layout=job.layout,
        planes=job.planes,
        dtype=job.dtype,
        sm=job.architecture,
        tile=f"{constants['P']} x {constants.get('KB', 1)}",
        warps=launch.warps,
        registers=used["REG"],
        spilled_bytes=used["STACK"] + used["LOCAL"],
        shared_bytes=used["SHARED"],
        load_bits=max(int(count or 1) * int(bits) for count, bits in loads),
        constants=" ".join([*units, *flags]),
    )


def table(dtypes: Sequence[str] = DTYPES, processes: int | None = None) -> list[Row]:
    """Compiles everything in parallel processes; one row a kernel, dtype and architecture."""
    # Not forked: a child that inherits torch's threads may hang.
    with ProcessPoolExecutor(processes or os.cpu_count(), get_context("spawn")) as pool:
        return list(pool.map(measured, jobs(dtypes), chunksize=4))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--processes", type=int)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    arguments = parser.parse_args()
    rows = table(arguments.dtypes, arguments.processes)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, asdict(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    spills = [row for row in rows if row.spilled_bytes]
    most = max(row.registers for row in rows)
    print(f"{len(rows)} kernels, at most {most} registers, {len(spills)} spill: {arguments.out}")
    return 1 if spills else 0


if __name__ == "__main__":
    sys.exit(main())
