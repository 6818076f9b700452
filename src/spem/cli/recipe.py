"""Recipes by name, with the settings that belong to the data set they are used on."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from spem.cli.options import unknown

if TYPE_CHECKING:
    from spem.training.config import DataConfig, RunConfig

RECIPES = ("paper", "fast", "short", "smoke")
SHORT_FORMS = {
    "--attention": "--model.attention",
    "--depth": "--model.depth",
    "--root": "--data.root",
    "--val": "--data.val",
    "--limit": "--data.limit",
    "--precision": "--runtime.precision",
    "--checkpoint-minutes": "--runtime.checkpoint-minutes",
}
"""Options of a config that are asked for often, by a name without its section."""


def recipe_config(
    recipe: str,
    *,
    dataset: str | None = None,
    epochs: int | None = None,
) -> "RunConfig":
    """A complete config: the recipe, and where given another data set or length.

    Args:
        recipe: One of `RECIPES`.
        dataset: Name or path of the images; brings its own settings (size, flips, normalisation).
        epochs: Length of the run; the milestones move to the same fractions of it.

    Raises:
        ValueError: No recipe has this name.
    """
    from spem.training import recipes

    if recipe not in RECIPES:
        raise ValueError(unknown("recipe", recipe, RECIPES))
    create: Callable[[], RunConfig] = getattr(recipes, recipe)
    config = create()
    if dataset is not None and dataset != config.data.name:
        config = replace(config, data=_data_settings(dataset))
    if epochs is not None and epochs != config.optim.epochs:
        milestones = recipes.scaled_milestones(epochs)
        config = replace(config, optim=replace(config.optim, epochs=epochs, milestones=milestones))
    return config


def in_full(args: Sequence[str]) -> list[str]:
    """The arguments with `SHORT_FORMS` written out.

    >>> in_full(["--val", "5000", "--root=data"])
    ['--data.val', '5000', '--data.root=data']
    """
    parts = [arg.partition("=") for arg in args]
    return [SHORT_FORMS.get(name, name) + sign + value for name, sign, value in parts]


def _data_settings(dataset: str) -> "DataConfig":
    """How the images of a data set are treated, whatever the recipe."""
    from spem.training import recipes

    own = recipes.smoke().data
    return own if dataset == own.name else recipes.paper(dataset).data
