"""`spem bench`: what attention costs and what fusing brings, measured on this machine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from spem.cli.output import print_table

if TYPE_CHECKING:
    from spem.bench.settings import Settings
    from spem.bench.step import Workload
    from spem.bench.table import Row

Device = Literal["auto", "cpu", "cuda"]
Layout = Literal["contiguous", "channels_last"]
Dtype = Literal["float32", "bfloat16"]


def run(args: list[str]) -> None:
    """Run `spem bench` with these arguments."""
    from tyro.extras import subcommand_cli_from_dict

    subcommand_cli_from_dict(
        {
            "ops": ops,
            "step": step,
            "family": family,
            "network": network,
            "memory": memory,
            "plot": plot,
        },
        prog="spem bench",
        description="Measure what attention costs and what fusing the block's tail brings.",
        args=args,
    )


def ops(
    *,
    device: Device = "auto",
    rounds: int = 15,
    warm_up: int = 2,
    threads: int = 0,
    impl: str | None = None,
    compile: bool = True,
    out: Path | None = None,
    resume: bool = False,
    quick: bool = False,
) -> None:
    """Time the tail alone: norm, attention, addition and ReLU of a block.

    Args:
        device: Where; auto takes CUDA where there is any.
        rounds: Timed calls of each provider.
        warm_up: Calls of each before those.
        threads: CPU threads; 0 is torch's choice.
        impl: What counts as fused, instead of this machine's kernels.
        compile: Whether compiled tails take part (most of the waiting).
        out: Folder for table and picture; without it they are only shown.
        resume: Keep the maps that the table in --out has, if commit and machine are the same.
        quick: Tiny maps, to see that it runs; writes nothing.
    """
    settings = _settings(device, rounds, warm_up, threads, impl, compiled=compile, quick=quick)
    _run("ops", settings, None, out, resume=resume)


def step(
    *,
    depth: int = 29,
    batch: int = 128,
    dtype: Dtype = "float32",
    layout: Layout = "contiguous",
    attention: tuple[str, ...] = (),
    device: Device = "auto",
    rounds: int = 15,
    warm_up: int = 2,
    threads: int = 0,
    impl: str | None = None,
    compile: bool = False,
    out: Path | None = None,
    quick: bool = False,
) -> None:
    """Time the training step of a CIFAR ResNet: forward, loss, backward, SGD.

    Args:
        depth: Layers, 9n + 2.
        batch: Images a step.
        dtype: bfloat16 is autocast.
        layout: Memory layout of images and weights.
        attention: Who takes part; all modules without this option.
        device: Where; auto takes CUDA where there is any.
        rounds: Timed steps of each network.
        warm_up: Steps of each before those.
        threads: CPU threads; 0 is torch's choice.
        impl: What counts as fused, instead of this machine's kernels.
        compile: Whether compiled networks take part (minutes each).
        out: Folder for table and picture; without it they are only shown.
        quick: Depth 11, batch 4, to see that it runs; writes nothing.
    """
    settings = _settings(device, rounds, warm_up, threads, impl, compiled=compile, quick=quick)
    _run("step", settings, _workload(depth, batch, dtype, layout, attention), out)


def family(
    *,
    depth: int = 29,
    batch: int = 128,
    layout: Layout = "contiguous",
    attention: tuple[str, ...] = (),
    device: Device = "auto",
    rounds: int = 15,
    warm_up: int = 2,
    threads: int = 0,
    impl: str | None = None,
    out: Path | None = None,
    quick: bool = False,
) -> None:
    """Time the training step with every registered module, beside parameters and FLOPs.

    Args:
        depth: Layers, 9n + 2.
        batch: Images a step.
        layout: Memory layout of images and weights.
        attention: Who takes part; every module, and forms of some, without this option.
        device: Where; auto takes CUDA where there is any.
        rounds: Timed steps of each network.
        warm_up: Steps of each before those.
        threads: CPU threads; 0 is torch's choice.
        impl: What counts as fused, instead of this machine's kernels.
        out: Folder for table and picture; without it they are only shown.
        quick: Depth 11, batch 4, to see that it runs; writes nothing.
    """
    from spem.bench.family import family as members

    settings = _settings(device, rounds, warm_up, threads, impl, compiled=False, quick=quick)
    work = _workload(depth, batch, "float32", layout, attention or members())
    _run("family", settings, work, out)


def network(
    *,
    depth: int = 29,
    dtype: Dtype = "float32",
    layout: Layout = "contiguous",
    attention: tuple[str, ...] = (),
    device: Device = "auto",
    rounds: int = 15,
    warm_up: int = 2,
    threads: int = 0,
    impl: str | None = None,
    compile: bool = False,
    out: Path | None = None,
    quick: bool = False,
) -> None:
    """Time inference at batch 128 and 1, also against the plain network with folded norms.

    Args:
        depth: Layers, 9n + 2.
        dtype: bfloat16 is autocast.
        layout: Memory layout of images and weights.
        attention: Who takes part; all modules without this option.
        device: Where; auto takes CUDA where there is any.
        rounds: Timed passes of each network.
        warm_up: Passes of each before those.
        threads: CPU threads; 0 is torch's choice.
        impl: What counts as fused, instead of this machine's kernels.
        compile: Whether compiled networks take part (minutes each).
        out: Folder for table and picture; without it they are only shown.
        quick: Depth 11, batch 2 and 1, to see that it runs; writes nothing.
    """
    settings = _settings(device, rounds, warm_up, threads, impl, compiled=compile, quick=quick)
    _run("network", settings, _workload(depth, 128, dtype, layout, attention), out)


def memory(
    *,
    depth: int = 29,
    batch: int = 128,
    dtype: Dtype = "float32",
    layout: Layout = "contiguous",
    attention: tuple[str, ...] = (),
    device: Device = "auto",
    threads: int = 0,
    impl: str | None = None,
    out: Path | None = None,
    quick: bool = False,
) -> None:
    """Peak memory of a training step and of inference, every network in its own process.

    Args:
        depth: Layers, 9n + 2.
        batch: Images a step.
        dtype: bfloat16 is autocast.
        layout: Memory layout of images and weights.
        attention: Who takes part; all modules without this option.
        device: Where; auto takes CUDA where there is any.
        threads: CPU threads; 0 is torch's choice.
        impl: What counts as fused, instead of this machine's kernels.
        out: Folder for table and picture; without it they are only shown.
        quick: Depth 11, batch 4, to see that it runs; writes nothing.
    """
    settings = _settings(device, 2, 0, threads, impl, compiled=False, quick=quick)
    _run("memory", settings, _workload(depth, batch, dtype, layout, attention), out)


def plot(folder: Path, /) -> None:
    """Draw every table of a folder beside it, and state what the tables say.

    Args:
        folder: Holds tables that `spem bench` wrote.
    """
    from spem.bench import plots, table

    paths = [p for kind in table.KINDS for p in sorted(folder.glob(f"{kind}_*.csv"))]
    if not paths:
        raise ValueError(f"bench: {folder} holds no table of `spem bench`.")
    for path in paths:
        kind = path.stem.partition("_")[0]
        _show(kind, table.read(path))
        print(f"drawn: {plots.draw(kind, path)}\n")


def _settings(
    device: Device,
    rounds: int,
    warm_up: int,
    threads: int,
    impl: str | None,
    *,
    compiled: bool,
    quick: bool,
) -> Settings:
    from spem.bench.settings import Settings

    if quick:
        rounds, warm_up, compiled = 3, 1, False
    return Settings(device, rounds, warm_up, threads, impl, compiled, quick)


def _workload(
    depth: int, batch: int, dtype: Dtype, layout: Layout, attention: tuple[str, ...]
) -> Workload:
    from spem.bench.step import ATTENTIONS, Workload

    return Workload(depth, batch, dtype, layout, attention or ATTENTIONS)


def _run(
    kind: str,
    settings: Settings,
    work: Workload | None,
    out: Path | None,
    *,
    resume: bool = False,
) -> None:
    """Measure, show, write, draw."""
    import torch

    from spem.bench import plots
    from spem.bench.checks import BenchError
    from spem.bench.report import failures
    from spem.bench.runs import measure, path_of
    from spem.bench.settings import fused_impl

    dtype = torch.float32 if work is None else getattr(torch, work.dtype)
    impl, reason = fused_impl(settings, dtype)
    if impl is None:
        print(f"There are no fused rows: {reason}.", file=sys.stderr)
    path = None if out is None or settings.quick else path_of(kind, out, settings)
    try:
        rows = measure(kind, settings, work, path=path, resume=resume)
    except BenchError as error:  # wrong results: one sentence and exit code 1, as of a divergence
        raise FloatingPointError(str(error)) from error
    _show(kind, rows, aimed=not settings.quick)
    if path is not None:
        print(f"written: {path}")
        print(f"drawn: {plots.draw(kind, path)}")
    failed = failures(rows)
    if failed:
        raise FloatingPointError("bench: could not run: " + "; ".join(failed))


def _show(kind: str, rows: list[Row], *, aimed: bool = True) -> None:
    """The tables, what their ratios mean, and the aims they tell about."""
    from spem.bench.report import aims, legend, reports

    for report in reports(kind, rows):
        print_table(report.columns, report.rows, align=report.align, title=report.title)
        print()
    print("\n".join(legend(rows)))
    found = aims(kind, rows) if aimed else []
    if found:
        print("\nAims:")
        print("\n".join(str(aim) for aim in found))
