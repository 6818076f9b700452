"""`spem compare`: several attentions with the same seeds, as table, figure and report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from spem.cli.config import RECIPE_HELP, RECIPES, config_options, configured
from spem.cli.network import register_from_file
from spem.cli.options import RARE, Json, one_of
from spem.cli.progress import carry_out, parse_seeds

_ARMS = (
    'the reference first: none control se "spem(form=code)"; control is the plain network '
    "whose branches start as small as SPEM's"
)
_OWN = "modules of your own to compare too"
_RECIPE = f"{RECIPE_HELP}; without it smoke for digits, else short"
_SEEDS = "a number (3 is 0, 1, 2) or a list (0,4,7); else 3"


def run(
    arms: Annotated[Sequence[str], "ATTENTION", _ARMS] = (),
    *,
    module: Annotated[Sequence[str], "FILE:CLASS", _OWN, register_from_file] = (),
    recipe: Annotated[str | None, "RECIPE", _RECIPE, one_of(*RECIPES, what="recipe")] = None,
    seeds: Annotated[list[int] | None, "SEEDS", _SEEDS, parse_seeds] = None,
    out: Annotated[Path, "DIR", "folder for tables and report"] = Path("comparison"),
    runs: Annotated[Path, "DIR", "folder of all runs", RARE] = Path("runs"),
    json: Json = False,
    **given: Annotated[Any, config_options("seed", "model.attention"), carry_out],
) -> int:
    """Train several attentions with the same seeds, and show how they differ from the first.

    What is finished is not trained again; the same command resumes where it stopped.
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
    how = {name: given.pop(name) for name in [*given] if "." not in name}
    configs, baseline = comparison(configured(recipe, given), [*arms, *module], seeds or range(3))
    planned = {config: [COMPARE] for config in configs}
    return carry_out(planned, runs, out, baseline=baseline, json=json, **how)
