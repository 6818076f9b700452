"""`spem train`: one run of a recipe, with any field of its config changed by an option."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from spem.cli.output import print_json, unknown
from spem.cli.recipe import RECIPES, recipe_config

if TYPE_CHECKING:
    from spem.training.config import RunConfig
    from spem.training.runs import Result


def command(args: list[str]) -> Callable[..., None]:
    """The function whose signature is the command line of `spem train`, with the recipe's values as defaults."""
    import tyro

    recipe = args[0] if args and not args[0].startswith("-") else None
    if recipe is None and not {"-h", "--help"} & set(args):
        raise ValueError(f"train: no recipe given. Use one of {', '.join(RECIPES)}, such as `spem train short`.")
    if recipe is not None and recipe not in RECIPES:
        raise ValueError(unknown("recipe", recipe, RECIPES))
    if recipe is None or "-h" in args or "--help" in args:
        return _signature(recipe_config(recipe or "paper"), run=True)
    # The data set brings settings of its own (size, flips, normalisation), which are defaults like the recipe's. So
    # the line is read once to learn the data set, and then with the defaults that belong to it.
    dataset = tyro.cli(_signature(recipe_config(recipe), run=False), prog="spem train", args=args)
    return _signature(recipe_config(recipe, dataset=dataset), run=True)


def _signature(default: "RunConfig", *, run: bool) -> Callable[..., str]:
    from tyro.conf import Positional, arg

    from spem.training.config import RunConfig

    def train(
        recipe: Positional[str],
        /,
        config: Annotated[RunConfig, arg(name="")] = default,
        *,
        runs: Path = Path("runs"),
        folder: Path | None = None,
        json: bool = False,
    ) -> str:
        """Train one network. An interrupted run goes on where it stopped; a finished one shows its result.

        Args:
            recipe: paper (the paper's), fast (the same, faster), short (scaled down for a CPU), smoke (digits).
            config: Every field of the recipe can be changed.
            runs: Folder of all runs; this one gets a folder of its own in it.
            folder: Folder of this run, instead of one under --runs.
            json: Print the result as JSON.
        """
        del recipe
        if run:
            _train(config, folder or config.folder(runs), json=json)
        return config.data.name

    return train


def _train(config: "RunConfig", folder: Path, *, json: bool) -> None:
    from spem.training import train

    result = train(config, folder)
    if json:
        print_json({"folder": str(folder), **dataclasses.asdict(result)})
        return
    _print(result, folder)
