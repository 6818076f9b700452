"""`spem train`: one run of a recipe, with any field of its config changed by an option."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Annotated, Any

from spem.cli.config import RECIPE_HELP, RECIPES, check_data, config_options, configured
from spem.cli.options import RARE, Json, one_of
from spem.cli.output import print_json

_RECIPE = one_of(*RECIPES, what="recipe")


def run(
    recipe: Annotated[str | None, "RECIPE", RECIPE_HELP, _RECIPE] = None,
    *,
    recipe_: Annotated[str | None, "RECIPE", "the same, as in compare", _RECIPE, RARE] = None,
    runs: Annotated[Path, "DIR", "folder of all runs"] = Path("runs"),
    folder: Annotated[Path | None, "DIR", "folder of this run, instead of one in --runs"] = None,
    json: Json = False,
    **given: Annotated[Any, config_options()],
) -> None:
    """Train one network; an interrupted run resumes, a finished one shows its result.

    Several processes train one run together under torchrun, with the result of one: torchrun
    --nproc-per-node 2 -m spem train short ... Each has its own GPU, or they share the CPU. If one
    is lost, the same command resumes, with any number of processes.
    """
    recipe = recipe or recipe_
    if recipe is None:
        names = ", ".join(RECIPES)
        raise ValueError(f"no recipe given. Use one of {names}, such as `spem train short`.")
    config = configured(recipe, given)
    folder = folder or config.folder(runs)
    if not (folder / "result.json").exists():  # before torch is loaded
        check_data(config.data)
    from spem.training import Interrupted, process_group, train
    from spem.training.distributed import FollowerError
    from spem.training.loop import resolved, starting_network
    from spem.training.step import keep_freed_memory

    if not folder.exists():  # what cannot be built, or run here, leaves none behind
        starting_network(config, classes=2)
        if "RANK" not in os.environ:  # under torchrun each process has a device of its own
            resolved(config.runtime, 1)
    keep_freed_memory()
    with process_group(config.runtime.device) as first:
        try:
            result = train(config, folder)
        except (Interrupted, FollowerError) as stopped:
            if first:
                raise
            # The first process says it for all.
            raise SystemExit(getattr(stopped, "code", 1)) from stopped
    if json and first:
        print_json({"folder": str(folder), **dataclasses.asdict(result)})
    elif first:
        step = f"{1000 * result.step_seconds:.1f} ms a step ({result.step}, tails by {result.impl})"
        length = f"{result.epochs} epoch" + "s" * (result.epochs > 1)
        best = f"{result.best_accuracy:.2f} % in epoch {result.best_epoch + 1}"
        print(f"""\
network        ResNet-{result.depth}, attention {result.attention}, {result.parameters:,} parameters
data           {result.dataset}, seed {result.seed}, {length}
test accuracy  {result.accuracy:.2f} % after the last epoch
best epoch     {best}, selected on {result.best_selected_on}
time           {result.train_seconds:.1f} s training, {step}, on {result.hardware}
folder         {folder}""")
