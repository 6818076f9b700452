"""`spem train`: one run of a recipe, with any field of its config changed by an option."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

from spem.cli.output import print_json
from spem.cli.recipe import RECIPES, in_full, recipe_config

if TYPE_CHECKING:
    from spem.training import Result, RunConfig


class Request(NamedTuple):
    """What the command line asks for."""

    config: "RunConfig"
    data: str | None
    epochs: int | None
    folder: Path
    json: bool


def run(args: list[str]) -> None:
    """Run `spem train` with these arguments."""
    import tyro

    recipe = args[0] if args and not args[0].startswith("-") else None
    help_only = bool({"-h", "--help"} & set(args))
    if recipe is None and not help_only:
        names = ", ".join(RECIPES)
        raise ValueError(f"train: no recipe given. Use one of {names}, such as `spem train short`.")
    default = recipe_config(recipe or "paper")
    args = in_full(args)
    if recipe is not None and not help_only:
        # The data set brings settings of its own (size, flips, normalisation), which are defaults
        # like the recipe's. So the line is read once to learn it, and again with its defaults.
        asked = tyro.cli(_signature(default), prog="spem train", args=args)
        default = recipe_config(
            recipe,
            dataset=asked.data or asked.config.data.name,
            epochs=asked.epochs,
        )
    request = tyro.cli(_signature(default), prog="spem train", args=args)
    _train(request.config, request.folder, json=request.json)


def _signature(default: "RunConfig") -> Callable[..., Request]:
    from tyro.conf import Positional, arg

    from spem.training import RunConfig

    def train(
        recipe: Positional[str],
        /,
        config: Annotated[RunConfig, arg(name="")] = default,
        *,
        data: str | None = None,
        epochs: int | None = None,
        runs: Path = Path("runs"),
        folder: Path | None = None,
        json: bool = False,
    ) -> Request:
        """Train one network; an interrupted run goes on, a finished one shows its result.

        Several processes train one run together under torchrun, with the result of one process:
        torchrun --nproc-per-node 2 -m spem train short ... Each has its own GPU, or they share the
        CPU. If one is lost, the same command goes on, with any number of processes.

        Short forms: --attention, --depth, --root, --val, --limit, --precision and
        --checkpoint-minutes.

        Args:
            recipe: paper (the paper's), fast (the same, faster), short (scaled down for a CPU) or
                smoke (digits).
            config: Every field of the recipe can be changed.
            data: Data set or path; brings its own size, flips and normalisation.
            epochs: Length of the run; the milestones move along.
            runs: Folder of all runs; this one gets a folder of its own in it.
            folder: Folder of this run, instead of one under --runs.
            json: Print the result as JSON.
        """
        del recipe
        where = folder or config.folder(runs)
        return Request(config, data, epochs, where, json)

    return train


def _train(config: "RunConfig", folder: Path, *, json: bool) -> None:
    from spem.training import Interrupted, process_group, train
    from spem.training.distributed import FollowerError
    from spem.training.memory import keep_freed_memory

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


def _print(result: "Result", folder: Path) -> None:
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
