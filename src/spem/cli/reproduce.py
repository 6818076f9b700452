"""`spem reproduce`: the runs of the paper's tables and figures, and what comes out of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from spem.cli.options import RARE, Json, one_of
from spem.cli.output import print_json, print_table, say
from spem.cli.progress import carry_out, parse_duration, parse_seeds, roughly

if TYPE_CHECKING:
    from spem.training import RunConfig

PAPER = ("table1", "table2", "table3", "table4", "figure2")
OWN = (
    *("scratch", "finetune-1000", "finetune-5000", "controls", "forms", "parametrisations"),
    *("mixes", "penalty", "gradients", "equivalence", "family"),
)
SCALES = ("paper", "short", "study", "smoke")
_EXPERIMENTS = f"{' '.join(PAPER)}, all (these five), or of our own: {' '.join(OWN)}"
_EXPERIMENT = one_of("all", *PAPER, *OWN, what="experiment")
_RECIPE = "paper (164 epochs), study (20 epochs), short (hours) or smoke (minutes, digits)"
_SEEDS = "a number (3 is 0, 1, 2) or a list (0,4,7), instead of the recipe's"
_ROOT = "folder that holds cifar10 and cifar100; else $SPEM_DATA, or the hub"
_BUDGET = "stop with checkpoints after 90s, 30m, 8h"
_DRY_RUN = "only show how many runs there are, and about how long they take"


def run(
    experiments: Annotated[Sequence[str], "EXPERIMENT", _EXPERIMENTS, _EXPERIMENT] = (),
    *,
    recipe: Annotated[str, "RECIPE", _RECIPE, one_of(*SCALES, what="recipe")] = "short",
    results: Annotated[Path, "DIR", "folder for everything"] = Path("reproduction"),
    seeds: Annotated[list[int] | None, "SEEDS", _SEEDS, parse_seeds] = None,
    root: Annotated[Path | None, "DIR", _ROOT] = None,
    budget: Annotated[float | None, "TIME", _BUDGET, parse_duration] = None,
    dry_run: Annotated[bool, _DRY_RUN] = False,
    json: Json = False,
    **how: Annotated[Any, carry_out, RARE],
) -> int:
    """Reproduce tables and figures of the paper: train what is missing, then tables and report.

    The same command resumes where it was stopped, by Ctrl-C, a budget or a crash.
    """
    if not experiments:
        raise ValueError(f"no experiment given. Name some of: all, {', '.join((*PAPER, *OWN))}.")
    from spem.reproduce.experiments import experiment, run_configs

    names = [one for name in experiments for one in (PAPER if name == "all" else (name,))]
    names = list(dict.fromkeys(names))
    planned: dict[RunConfig, list[str]] = {}
    for config, owners in run_configs([experiment(n, recipe, seeds=seeds) for n in names]).items():
        data = config.data if root is None else replace(config.data, root=str(root))
        planned[replace(config, data=data)] = owners
    if dry_run:
        _show_plan(planned, names, results / "runs", how["workers"], json=json)
        return 0
    return carry_out(planned, results / "runs", results, budget=budget, json=json, **how)


def _show_plan(
    planned: Mapping[RunConfig, Sequence[str]],
    names: Sequence[str],
    runs: Path,
    workers: int,
    *,
    json: bool,
) -> None:
    """The runs of each experiment, and a rough time."""
    from spem.reproduce.run import estimate_seconds, missing

    todo = set(missing(planned, runs))
    rows: list[list[object]] = []
    for name in names:
        own = [config for config, owners in planned.items() if name in owners]
        left = [config for config in own if config in todo]
        data = ", ".join(sorted({Path(config.data.name).name for config in own}))
        depths = ", ".join(map(str, sorted({config.model.depth for config in own})))
        networks, seeds = {(c.id, c.experiment) for c in own}, {c.seed for c in own}
        time = roughly(estimate_seconds(left) or 0) if left else "-"
        rows.append([name, data, depths, *map(len, (networks, seeds, own, left)), time])
    columns = ["experiment", "trained on", "depth", "networks", "seeds", "runs", "missing", "time"]
    seconds = (estimate_seconds(todo) or 0) / min(workers, max(1, len(todo)))
    if json:
        told = {"runs": len(planned), "missing": len(todo), "seconds": seconds}
        print_json(told | {"experiments": [dict(zip(columns, row, strict=True)) for row in rows]})
        return
    print_table(columns, rows)
    print()
    say(
        f"{len(planned)} runs, each once even where tables share it; {len(todo)} are to be",
        f"trained: {roughly(seconds)} with {workers} at a time, a rough estimate from a few steps",
        "of a small network on this machine.",
    )
