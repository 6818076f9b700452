"""`spem train`: one run of a recipe, with any field of its config changed by an option."""

from __future__ import annotations

import dataclasses
from argparse import SUPPRESS
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spem.cli.config import RECIPE_HELP, RECIPES, add_config, configured
from spem.cli.options import Options, UsageError, one_of
from spem.cli.output import print_json

if TYPE_CHECKING:
    from spem.training import Result, RunConfig


def options() -> Options:
    """What the command takes."""
    o = Options(
        "train",
        "Train one network. An interrupted run goes on where it stopped, a finished one shows its "
        "result.",
        more="Several processes train one run together under torchrun, with the result of one: "
        "torchrun --nproc-per-node 2 -m spem train short ... Each has its own GPU, or they share "
        "the CPU. If one is lost, the same command goes on, with any number of processes.",
    )
    recipe = one_of(*RECIPES, what="recipe")
    o.add("recipe", "RECIPE", RECIPE_HELP, kind=recipe, default=SUPPRESS, count="?")
    o.add("--recipe", "RECIPE", "the same, as other commands take it", kind=recipe, rare=True)
    add_config(o)
    o.add("--runs", "DIR", "folder of all runs", kind=Path, default=Path("runs"))
    o.add("--folder", "DIR", "folder of this run, instead of one in --runs", kind=Path)
    return o.json()


def run(*, recipe: str | None, runs: Path, folder: Path | None, json: bool, **given: Any) -> None:
    """Train, and show the result."""
    if recipe is None:
        raise UsageError(
            f"no recipe given. Use one of {', '.join(RECIPES)}, such as `spem train short`."
        )
    config = configured(recipe, given)
    _train(config, folder or config.folder(runs), json=json)


def _train(config: RunConfig, folder: Path, *, json: bool) -> None:
    from spem.data import check_images

    data = config.data
    if not (folder / "result.json").exists():  # before torch is loaded
        check_images(
            data.name,
            root=data.root,
            size=data.size,
            test=data.test,
            skip_broken=data.skip_broken,
        )
    import torch

    from spem.training import Interrupted, process_group, train
    from spem.training.distributed import FollowerError
    from spem.training.folder import build_network
    from spem.training.step import keep_freed_memory

    with torch.device("meta"):  # what cannot be built leaves no folder behind
        build_network(config, classes=2)
    keep_freed_memory()
    with process_group(config.runtime.device) as first:
        try:
            result = train(config, folder)
        except (Interrupted, FollowerError) as stopped:
            if first:
                raise
            # The first process says it for all.
            raise SystemExit(getattr(stopped, "code", 1)) from stopped
    if not first:
        return
    if json:
        print_json({"folder": str(folder), **dataclasses.asdict(result)})
        return
    _print(result, folder)


def _print(result: Result, folder: Path) -> None:
    network = f"ResNet-{result.depth}, attention {result.attention}"
    best = f"{result.best_accuracy:.2f} % in epoch {result.best_epoch + 1}"
    step = f"{1000 * result.step_seconds:.1f} ms a step"
    if result.step is not None:
        step += f" ({result.step}, tails by {result.impl})"
    rows = {
        "network": f"{network}, {result.parameters:,} parameters",
        "data": f"{result.dataset}, seed {result.seed}, {result.epochs} epochs",
        "test accuracy": f"{result.accuracy:.2f} % after the last epoch",
        "best epoch": f"{best}, selected on {result.best_selected_on}",
        "time": f"{result.train_seconds:.1f} s training, {step}, on {result.hardware}",
        "folder": str(folder),
    }
    for name, value in rows.items():
        print(f"{name:<14} {value}")
