"""`spem compare`: several attentions with the same seeds, as table, figure and report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from spem.cli.config import RECIPE_HELP, RECIPES, config_options, configured
from spem.cli.network import register_from_file
from spem.cli.options import RARE, Json, one_of
from spem.cli.progress import carry_out, parse_seeds

SEEDS = [0, 1, 2]
Recipe = Annotated[
    str | None,
    "RECIPE",
    f"{RECIPE_HELP}; without it smoke for digits, else short",
    one_of(*RECIPES, what="recipe"),
]
Workers = Annotated[int, "N", "runs at a time, as tasks of Ray"]
Address = Annotated[str | None, "ADDRESS", "of a Ray cluster whose machines share the folder", RARE]
PerGpu = Annotated[int, "N", "runs at a time on one GPU", RARE]
RetryDiverged = Annotated[bool, "train runs that diverged once more, from their start", RARE]


def run(
    arms: Annotated[
        Sequence[str],
        "ATTENTION",
        'the reference first: none control se "spem(form=code)"; control is the plain network '
        "whose branches start as small as SPEM's",
    ] = (),
    *,
    module: Annotated[
        Sequence[str], "FILE:CLASS", "modules of your own to compare too", register_from_file
    ] = (),
    recipe: Recipe = None,
    seeds: Annotated[
        list[int], "SEEDS", "a number (3 is 0, 1, 2) or a list (0,4,7); else 3", parse_seeds
    ] = SEEDS,
    out: Annotated[Path, "DIR", "folder for tables and report"] = Path("comparison"),
    runs: Annotated[Path, "DIR", "folder of all runs", RARE] = Path("runs"),
    workers: Workers = 1,
    address: Address = None,
    per_gpu: PerGpu = 1,
    retry_diverged: RetryDiverged = False,
    json: Json = False,
    **given: Annotated[Any, config_options("seed", "model.attention")],
) -> int:
    """Train several attentions with the same seeds, and show how they differ from the first.

    What is finished is not trained again; the same command goes on where it stopped.
    """
    if len(arms) + len(module) < 2:
        named = f"only {(*arms, *module)[0]} is named" if arms or module else "nothing is named"
        raise ValueError(
            f"{named}, so there is nothing to compare. Name two or more, the reference first: "
            "spem compare none se spem"
        )
    from spem.reproduce.experiments import comparison
    from spem.reproduce.tables import COMPARE

    recipe = recipe or ("smoke" if given.get("data.name") == "digits" else "short")
    configs, baseline = comparison(configured(recipe, given), [*arms, *module], seeds)
    how: dict[str, Any] = {"workers": workers, "address": address, "per_gpu": per_gpu}
    how |= {"baseline": baseline, "retry_diverged": retry_diverged, "json": json}
    return carry_out({config: [COMPARE] for config in configs}, runs, out, **how)
