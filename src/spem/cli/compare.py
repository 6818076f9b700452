"""`spem compare`: several attentions with the same seeds, as table, figure and report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spem.cli.config import RECIPE_HELP, RECIPES, add_config, configured
from spem.cli.options import Options, UsageError, integer, one_of
from spem.cli.progress import carry_out, parse_seeds


def options() -> Options:
    """What the command takes."""
    o = Options(
        "compare",
        "Train several attentions with the same seeds, and show how they differ from the first.",
        more="What is finished is not trained again; the same command goes on where it stopped.",
    )
    o.add(
        "arms",
        "ATTENTION",
        'the reference first: none control se "spem(form=code)"; control is '
        "the plain network whose branches start as small as SPEM's",
        count="*",
    )
    o.add("--module", "FILE:CLASS", "modules of your own to compare too", count="*", default=())
    recipe = one_of(*RECIPES, what="recipe")
    o.add(
        "--recipe", "RECIPE", f"{RECIPE_HELP}; without it smoke for digits, else short", kind=recipe
    )
    o.add(
        "--seeds",
        "SEEDS",
        "a number (3 is 0, 1, 2) or a list (0,4,7)",
        kind=parse_seeds,
        default="3",
    )
    add_config(o, leave_out=("seed", "model.attention"))
    o.add("--out", "DIR", "folder for tables and report", kind=Path, default=Path("comparison"))
    o.add("--runs", "DIR", "folder of all runs", kind=Path, default=Path("runs"), rare=True)
    add_workers(o)
    return o.json()


def add_workers(o: Options) -> None:
    """Adds how many runs are trained at a time, and where."""
    o.add("--workers", "N", "runs at a time, as tasks of Ray", kind=integer(1), default=1)
    o.add("--address", "ADDRESS", "of a Ray cluster whose machines share the folder", rare=True)
    o.add("--per-gpu", "N", "runs at a time on one GPU", kind=integer(1), default=1, rare=True)
    o.flag("--retry-diverged", "train runs that diverged once more, from their start", rare=True)


def run(
    *,
    arms: list[str],
    module: list[str],
    recipe: str | None,
    seeds: list[int],
    out: Path,
    runs: Path,
    workers: int,
    address: str | None,
    per_gpu: int,
    retry_diverged: bool,
    json: bool,
    **given: Any,
) -> int:
    """Train what is missing, and show how the arms differ."""
    if len(arms) + len(module) < 2:
        named = f"only {(*arms, *module)[0]} is named" if arms or module else "nothing is named"
        raise UsageError(
            f"{named}, so there is nothing to compare. Name two or more, the reference first: "
            "spem compare none se spem"
        )
    from spem.cli.user_module import register_from_file
    from spem.reproduce.experiments import comparison
    from spem.reproduce.tables import COMPARE

    own = [register_from_file(where) for where in module]
    config = configured(
        recipe or ("smoke" if given.get("data.name") == "digits" else "short"), given
    )
    configs, baseline = comparison(config, [*arms, *own], seeds)
    return carry_out(
        {config: [COMPARE] for config in configs},
        runs,
        out,
        baseline=baseline,
        workers=workers,
        address=address,
        per_gpu=per_gpu,
        retry_diverged=retry_diverged,
        json=json,
    )
