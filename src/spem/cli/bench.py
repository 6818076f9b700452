"""`spem bench`: what attention costs and what fusing brings, measured on this machine."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import arg

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


@dataclass(frozen=True)
class Measuring:
    """Options of every measurement."""

    device: Device = "auto"
    """Where; auto takes CUDA where there is any."""
    threads: int = 0
    """CPU threads; 0 is torch's choice."""
    impl: str | None = None
    """What counts as fused, instead of this machine's kernels."""
    out: Path | None = None
    """Folder for table and picture; without it they are only shown."""
    quick: bool = False
    """Tiny sizes, to see that it runs; writes nothing."""

    def settings(self, rounds: Rounds | None = None, *, compiled: bool = False) -> Settings:
        """What the measurement is told."""
        from spem.bench.settings import Settings

        rounds = rounds or Rounds(2, 0)
        if self.quick:
            rounds, compiled = Rounds(3, 1), False
        return Settings(
            self.device,
            rounds.rounds,
            rounds.warm_up,
            self.threads,
            self.impl,
            compiled,
            self.quick,
        )


@dataclass(frozen=True)
class Rounds:
    """Options of every measurement of time."""

    rounds: int = 15
    """Timed calls of each provider."""
    warm_up: int = 2
    """Calls of each before those."""


@dataclass(frozen=True)
class Networks:
    """Options of every measurement of CIFAR ResNets."""

    depth: int = 29
    """Layers, 9n + 2."""
    dtype: Dtype = "float32"
    """bfloat16 is autocast."""
    layout: Layout = "contiguous"
    """Memory layout of images and weights."""
    attention: tuple[str, ...] = ()
    """Who takes part; all modules of the measurement without this option."""

    def workload(self, batch: int, default: Sequence[str] = ()) -> Workload:
        """The network and batch; ``default`` takes part where nobody was named."""
        from spem.bench.step import ATTENTIONS, Workload

        attention = self.attention or tuple(default) or ATTENTIONS
        return Workload(self.depth, batch, self.dtype, self.layout, attention)


def ops(
    *,
    how: Annotated[Measuring, arg(name="")] = Measuring(),  # frozen, as all here
    times: Annotated[Rounds, arg(name="")] = Rounds(),
    compile: bool = True,
    resume: bool = False,
) -> None:
    """Time the tail alone: norm, attention, addition and ReLU of a block.

    Args:
        how: Of every measurement.
        times: Of every measurement of time.
        compile: Whether compiled tails take part (most of the waiting).
        resume: Keep the maps that the table in --out has, if commit and machine are the same.
    """
    _run("ops", how.settings(times, compiled=compile), None, how.out, resume=resume)


def step(
    *,
    net: Annotated[Networks, arg(name="")] = Networks(),
    how: Annotated[Measuring, arg(name="")] = Measuring(),
    times: Annotated[Rounds, arg(name="")] = Rounds(),
    batch: int = 128,
    compile: bool = False,
) -> None:
    """Time the training step of a CIFAR ResNet: forward, loss, backward, SGD.

    Args:
        net: Of the networks.
        how: Of every measurement.
        times: Of every measurement of time.
        batch: Images a step.
        compile: Whether compiled networks take part (minutes each).
    """
    _run("step", how.settings(times, compiled=compile), net.workload(batch), how.out)


def family(
    *,
    net: Annotated[Networks, arg(name="")] = Networks(),
    how: Annotated[Measuring, arg(name="")] = Measuring(),
    times: Annotated[Rounds, arg(name="")] = Rounds(),
    batch: int = 128,
) -> None:
    """Time the training step with every registered module, beside parameters and FLOPs.

    Args:
        net: Of the networks.
        how: Of every measurement.
        times: Of every measurement of time.
        batch: Images a step.
    """
    from spem.bench.family import family as members

    _run("family", how.settings(times), net.workload(batch, members()), how.out)


def network(
    *,
    net: Annotated[Networks, arg(name="")] = Networks(),
    how: Annotated[Measuring, arg(name="")] = Measuring(),
    times: Annotated[Rounds, arg(name="")] = Rounds(),
    compile: bool = False,
) -> None:
    """Time inference at batch 128 and 1, also against the plain network with folded norms.

    Args:
        net: Of the networks.
        how: Of every measurement.
        times: Of every measurement of time.
        compile: Whether compiled networks take part (minutes each).
    """
    _run("network", how.settings(times, compiled=compile), net.workload(128), how.out)


def memory(
    *,
    net: Annotated[Networks, arg(name="")] = Networks(),
    how: Annotated[Measuring, arg(name="")] = Measuring(),
    batch: int = 128,
) -> None:
    """Peak memory of a training step and of inference, every network in its own process.

    Args:
        net: Of the networks.
        how: Of every measurement.
        batch: Images a step.
    """
    _run("memory", how.settings(), net.workload(batch), how.out)


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
