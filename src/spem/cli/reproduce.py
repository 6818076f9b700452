"""`spem reproduce`: the runs of the paper's tables and figures, and what comes out of them."""

import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

from spem.cli.compare import parse_seeds
from spem.extras import require

if TYPE_CHECKING:
    from spem.reproduce.board import GridOutcome
    from spem.reproduce.experiments import Experiment
    from spem.training import RunConfig


class Request(NamedTuple):
    """What the command line asks for."""

    experiments: tuple[str, ...]
    scale: str
    results: Path
    seeds: str | None
    root: Path | None
    workers: int | None
    per_gpu: int
    budget: str | None
    engine: Literal["local", "ray"]
    address: str | None
    dry_run: bool
    retry_diverged: bool


def run(args: list[str]) -> None:
    """Run `spem reproduce` with these arguments."""
    import tyro

    request = tyro.cli(_signature(), prog="spem reproduce", args=args)
    reproduce(request, again=shlex.join(["spem", "reproduce", *args]))


def _signature() -> Callable[..., Request]:
    from tyro.conf import Positional, arg

    def reproduce(
        experiments: Positional[
            Annotated[tuple[str, ...], arg(metavar="EXPERIMENT [EXPERIMENT ...]")]
        ],
        /,
        *,
        scale: str = "short",
        results: Path = Path("reproduction"),
        seeds: str | None = None,
        root: Path | None = None,
        workers: int | None = None,
        per_gpu: int = 1,
        budget: str | None = None,
        engine: Literal["local", "ray"] = "local",
        address: str | None = None,
        dry_run: bool = False,
        retry_diverged: bool = False,
    ) -> Request:
        """Reproduce tables and figures of the paper: run what is missing, then CSV and a report.

        The same command goes on where it was stopped, by Ctrl-C, a budget or a crash; two of them
        on one folder share the runs.

        Args:
            experiments: table1 table2 table3 table4 figure2, all (these five), or one of our own:
                controls forms parametrisations mixes penalty gradients equivalence family.
            scale: paper (164 epochs, 50,000 images), short (hours) or smoke (minutes, digits).
            results: Folder for everything: runs, CSV files, report.
            seeds: A number of seeds (3 is 0, 1, 2) or a list (0,4,7), instead of the scale's.
            root: Folder that holds cifar10 and cifar100; without it $SPEM_DATA, or the hub.
            workers: Runs at a time; without it one for every processor core or GPU.
            per_gpu: Runs at a time on one GPU.
            budget: Time after which everything is stopped with a checkpoint: 90s, 30m, 8h.
            engine: Worker processes here (local) or tasks of a Ray cluster (ray).
            address: Address of a Ray cluster; without it one is started on this machine.
            dry_run: Only show the runs, their FLOPs and an estimate of the time.
            retry_diverged: Train runs that diverged before once more, from their start.
        """
        return Request(
            experiments,
            scale,
            results,
            seeds,
            root,
            workers,
            per_gpu,
            budget,
            engine,
            address,
            dry_run,
            retry_diverged,
        )

    return reproduce


def reproduce(request: Request, *, again: str) -> None:
    """Plan, run what is missing, collect, report, and say how it went.

    Args:
        request: What to do.
        again: The command that goes on after an interruption.

    Raises:
        ValueError: An argument makes no sense.
        Interrupted: A signal stopped the runs; what is finished is collected.
        FloatingPointError: Runs diverged or failed; everything else is done first.
    """
    from spem.reproduce.experiments import run_configs

    planned = find_experiments(request)
    configs = [_with_root(config, request.root) for config in run_configs(planned)]
    if request.address is not None and request.engine != "ray":
        raise ValueError("reproduce: --address is of a Ray cluster. Add --engine ray.")
    if request.dry_run:
        from spem.cli.reproduce_plan import show_plan

        show_plan(planned, configs, request)
        return
    budget = None if request.budget is None else parse_duration(request.budget)
    for module in ("scipy.stats", "matplotlib", "jinja2"):  # missed now, not after hours of runs
        require(module, extra="reproduce", purpose="spem reproduce")
    from spem.reproduce.plan_file import record_plan

    out = request.results
    out.mkdir(parents=True, exist_ok=True)
    record_plan(planned, out)
    outcome = _execute(request, configs, budget)
    try:
        files, damaged = _collect(out, report=outcome.stopped_by is None)
    except (OSError, ValueError) as error:
        files, damaged = [], [f"The tables could not be made: {error}"]
    _summarise(outcome, files, damaged, again)


def find_experiments(request: Request) -> "list[Experiment]":
    """The experiments that are asked for, each once.

    Raises:
        ValueError: No experiment is named, or one is unknown.
    """
    from spem.reproduce.experiments import EXPERIMENTS, PAPER, experiment

    if not request.experiments:
        known = ", ".join(["all", *EXPERIMENTS])
        raise ValueError(f"reproduce: no experiment given. Name some of: {known}.")
    seeds = None if request.seeds is None else parse_seeds(request.seeds)
    names: list[str] = []
    for name in request.experiments:
        names += list(PAPER) if name == "all" else [name]
    return [experiment(name, request.scale, seeds=seeds) for name in dict.fromkeys(names)]


def parse_duration(text: str) -> float:
    """Seconds of a time such as 90s, 30m, 1.5h or 45 (seconds).

    Raises:
        ValueError: The text is no such time.

    >>> parse_duration("30m"), parse_duration("1.5h"), parse_duration("45")
    (1800.0, 5400.0, 45.0)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip())
    if found is None or not float(found[1]):
        raise ValueError(f"reproduce: --budget {text!r} is no time. Write 90s, 30m or 8h.")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]


def _with_root(config: "RunConfig", root: Path | None) -> "RunConfig":
    if root is None:
        return config
    return replace(config, data=replace(config.data, root=str(root)))


def _execute(
    request: Request, configs: "Sequence[RunConfig]", budget: float | None
) -> "GridOutcome":
    from spem.cli.grid_table import GridTable

    runs = request.results / "runs"
    if request.engine == "ray":
        from spem.reproduce.cluster import run_on_ray

        return run_on_ray(
            configs,
            runs,
            address=request.address,
            workers=request.workers,
            per_gpu=request.per_gpu,
            budget=budget,
            retry_diverged=request.retry_diverged,
            observer=GridTable(),
        )
    from spem.reproduce.grid import run_grid

    return run_grid(
        configs,
        runs,
        workers=request.workers,
        per_gpu=request.per_gpu,
        budget=budget,
        retry_diverged=request.retry_diverged,
        observer=GridTable(),
    )


def _collect(out: Path, *, report: bool) -> tuple[list[Path], list[str]]:
    """Tables, and the report unless somebody is waiting for the prompt."""
    from spem.reproduce.gather import gather
    from spem.reproduce.report import build_report
    from spem.training.claim import folder_lock

    with folder_lock(out):  # of two commands the later one must not write the older tables
        files, damaged = gather(out)
        return (files + build_report(out) if report else files), damaged


def _summarise(
    outcome: "GridOutcome", files: Sequence[Path], damaged: Sequence[str], again: str
) -> None:
    from spem.training import Interrupted

    for path in files:
        print(f"wrote {path}")
    for sentence in damaged:
        print(f"left out: {sentence}", file=sys.stderr)
    print(f"{_runs(len(outcome.finished))} finished.")
    left = len(outcome.left) + len(outcome.held)
    if outcome.held:
        print(f"{_runs(len(outcome.held))} still with other processes.")
    go_on = f"Checkpoints are written; `{again}` goes on."
    if outcome.stopped_by is not None:
        name = "Ctrl-C" if outcome.stopped_by.name == "SIGINT" else outcome.stopped_by.name
        text = (
            f"reproduce: stopped by {name} with {_runs(left)} left. {go_on} The tables are up to "
        )
        text += "date, the report is not (`spem report` makes it)."
        raise Interrupted(text, 128 + outcome.stopped_by)
    if outcome.left:
        print(f"{_runs(len(outcome.left))} left. {go_on}")
    problems = [
        *(("diverged", *each) for each in outcome.diverged),
        *(("failed", *each) for each in outcome.failed),
    ]
    if problems:
        sys.stdout.flush()
        raise FloatingPointError(_complaint(problems))


def _runs(count: int) -> str:
    return f"{count} run" + ("" if count == 1 else "s")


def _complaint(problems: "Sequence[tuple[str, RunConfig, str]]") -> str:
    """What went wrong with which runs, each reason once."""
    from spem.cli.grid_table import run_name

    by_reason: dict[tuple[str, str], list[str]] = {}
    for kind, config, text in problems:
        by_reason.setdefault((kind, text), []).append(run_name(config))
    lines = [f"reproduce: {_runs(len(problems))} did not end well; the others are kept."]
    for (kind, text), names in by_reason.items():
        which = names[0] if len(names) == 1 else f"{len(names)} runs ({names[0]} and others)"
        lines.append(f"{kind}: {which}: {text}")
    if any(kind == "diverged" for kind, _, _ in problems):
        lines.append("Diverged runs are not tried again unless asked to by --retry-diverged.")
    return "\n".join(lines)
