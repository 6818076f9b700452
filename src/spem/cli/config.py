"""The options of a training: every field of a run's config, the usual ones by short names."""

from __future__ import annotations

import argparse
import dataclasses
import re
import typing
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, cast

from spem.cli.options import Kind, Options, integer, number, one_of

if TYPE_CHECKING:
    from spem.training.config import RunConfig

RECIPES = ("paper", "fast", "short", "smoke")
RECIPE_HELP = "paper, fast (the same, faster), short (scaled down for a CPU) or smoke (digits)"

SHORT = {
    "data.name": ("--data", "SET", "cifar10, cifar100, digits, or a folder of images"),
    "model.attention": ("--attention", "ATTENTION", 'such as spem, none or "se(reduction=8)"'),
    "model.depth": ("--depth", "N", "11, 29, 83, 164 ..., or 20, 56 ... with basic blocks"),
    "optim.epochs": ("--epochs", "N", "length of the run; the milestones move along"),
    "optim.batch": ("--batch", "N", "images a step"),
    "optim.lr": ("--lr", "RATE", "learning rate at the start"),
    "data.root": ("--root", "DIR", "folder that holds the named sets"),
    "data.val": ("--val", "N", "training images kept apart to choose the best epoch"),
    "data.limit": ("--limit", "N", "use only so many training images"),
    "data.size": ("--size", "PIXELS", "scale images of a folder to this side"),
    "runtime.device": ("--device", "DEVICE", "cpu, cuda, or auto"),
    "runtime.precision": ("--precision", "fp32|bf16", "bf16 is faster where the processor has it"),
    "runtime.checkpoint_minutes": ("--checkpoint-minutes", "MINUTES", "between checkpoints"),
}
"""The fields that are asked for often: name, what it takes, help."""
_RARE = ("runtime.checkpoint_minutes", "optim.batch")


def add_config(options: Options, *, leave_out: tuple[str, ...] = ()) -> None:
    """Adds an option for every field of `RunConfig`; only those given are among the values.

    Args:
        options: Of the command.
        leave_out: Fields that the command sets itself, such as "seed".
    """
    from spem.training import config as parts

    sections = {
        "model": parts.ModelConfig,
        "data": parts.DataConfig,
        "optim": parts.OptimConfig,
        "runtime": parts.RuntimeConfig,
    }
    if "seed" not in leave_out:
        options.add(
            "--seed",
            "N",
            "of weights and order of images",
            kind=integer(0),
            default=argparse.SUPPRESS,
        )
    fields: dict[str, tuple[Any, str]] = {}
    for section, kind in sections.items():
        described = _described(kind.__doc__ or "")
        for name, hint in typing.get_type_hints(kind).items():
            fields[f"{section}.{name}"] = (hint, described.get(name, ""))
    for name in (*SHORT, *(name for name in fields if name not in SHORT)):
        if name in leave_out or name not in fields:
            continue
        hint, help = fields[name]
        flag = f"--{name.replace('_', '-')}"
        names, metavar = [flag], _metavar(hint)
        if name in SHORT:
            short, metavar, help = SHORT[name]
            names = [short, flag]
        if hint is bool:
            section, _, rest = flag.partition(".")
            options.switch(flag, f"{section}.no-{rest}", help)
            continue
        options.add(
            *names,
            metavar,
            help,
            kind=_kind(hint),
            default=argparse.SUPPRESS,
            count="*" if typing.get_origin(hint) is tuple else None,
            rare=name not in SHORT or name in _RARE,
        )


def configured(recipe: str, given: Mapping[str, Any]) -> RunConfig:
    """The config of a recipe with what `add_config`'s options say.

    Another data set brings its own size, flips and normalisation, another length moves the
    milestones; what is given for those goes before.

    Args:
        recipe: One of `RECIPES`.
        given: Dotted names of fields and their values.
    """
    from spem.training import recipes

    create: Callable[[], RunConfig] = getattr(recipes, recipe)
    config = create()
    name = given.get("data.name")
    if name is not None and name != config.data.name:
        smoke = recipes.smoke().data
        data = smoke if name == smoke.name else recipes.paper(name).data
        config = dataclasses.replace(config, data=data)
    epochs = given.get("optim.epochs")
    if epochs is not None:
        milestones = recipes.scaled_milestones(epochs)
        optim = dataclasses.replace(config.optim, epochs=epochs, milestones=milestones)
        config = dataclasses.replace(config, optim=optim)
    changes: dict[str, Any] = {}
    for dotted, value in given.items():
        section, _, field = dotted.rpartition(".")
        value = tuple(value) if isinstance(value, list) else value
        if section:
            changes.setdefault(section, {})[field] = (
                tuple(value) if isinstance(value, list) else value
            )
        else:
            changes[field] = value
    built = {
        section: dataclasses.replace(getattr(config, section), **fields)
        if isinstance(fields, dict)
        else fields
        for section, fields in changes.items()
    }
    return dataclasses.replace(config, **built)


def _described(doc: str) -> dict[str, str]:
    """What a Google docstring says of each argument."""
    args = doc.partition("Args:\n")[2]
    found = re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", args, re.MULTILINE)
    return {name: " ".join(text.split()).rstrip(".") for name, text in found}


def _metavar(hint: Any) -> str:
    inner = _without_none(hint)
    if typing.get_origin(inner) is Literal:
        return "|".join(map(str, typing.get_args(inner)))
    if typing.get_origin(inner) is tuple:
        return "N"
    return {int: "N", float: "X", str: "TEXT"}.get(inner, "PATH")


def _kind(hint: Any) -> Kind:
    inner = _without_none(hint)
    if typing.get_origin(inner) is tuple:
        inner = typing.get_args(inner)[0]
    if typing.get_origin(inner) is Literal:
        kind = one_of(*typing.get_args(inner))
    else:
        # What a field may be at least is said by the config itself.
        kind = cast("Kind", {int: integer(), float: number()}.get(inner, inner))
    if inner is hint or type(None) not in typing.get_args(hint):
        return kind
    return lambda text: None if text.lower() == "none" else kind(text)


def _without_none(hint: Any) -> Any:
    left = [part for part in typing.get_args(hint) if part is not type(None)]
    return left[0] if type(None) in typing.get_args(hint) else hint
