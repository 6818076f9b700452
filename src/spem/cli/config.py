"""The options of a training: every field of a run's config, the usual ones by short names."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from types import NoneType
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from spem.cli.options import Kind, Option, typed

if TYPE_CHECKING:
    from spem.training.config import DataConfig, RunConfig

RECIPES = ("paper", "fast", "short", "smoke")
RECIPE_HELP = "paper, fast (the same, faster), short (scaled down for a CPU) or smoke (digits)"
_USUAL = {
    "data.name": ("--data", "SET", "cifar10, cifar100, digits, or a folder of images"),
    "model.attention": ("--attention", "ATTENTION", 'such as spem, none or "se(reduction=8)"'),
    "model.depth": ("--depth", "N", "11, 29, 83, 164 ..., or 20, 56 ... with basic blocks"),
    "optim.epochs": ("--epochs", "N", "length of the run; the milestones move along"),
    "optim.batch": ("--batch", "N", "images a step"),
    "optim.lr": ("--lr", "RATE", "learning rate at the start"),
    "data.root": ("--root", "DIR", "folder that holds the named sets"),
    "data.val": ("--val", "N", "training images kept apart to choose the best epoch"),
    "data.limit": ("--limit", "N", "use only this many training images"),
    "data.size": ("--size", "PIXELS", "scale images of a folder to this side"),
    "runtime.device": ("--device", "DEVICE", "cpu, cuda, or auto"),
    "runtime.precision": ("--precision", "fp32|bf16", "bf16 is faster where the processor has it"),
    "runtime.checkpoint_minutes": ("--checkpoint-minutes", "MINUTES", "between checkpoints"),
}
"""The fields that have a short name too: it, what it takes, help."""
_RARE = ("runtime.checkpoint_minutes", "optim.batch")


def config_options(*left_out: str) -> list[Option]:
    """An option for every field of `RunConfig` but these; only those given are among the values."""
    from spem.training.config import RunConfig

    fields: dict[str, tuple[Any, str]] = {"seed": (int, "of weights and order of images")}
    for section, part in get_type_hints(RunConfig).items():
        if dataclasses.is_dataclass(part):
            said = (part.__doc__ or "").partition("Args:\n")[2]
            helps = dict(re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", said, re.MULTILINE))
            for name, hint in get_type_hints(part).items():
                help = " ".join(helps.get(name, "").split()).rstrip(".")
                fields[f"{section}.{name}"] = hint, help
    found: list[Option] = []
    for name in dict.fromkeys(("seed", *_USUAL, *fields)):
        hint, help = fields[name]
        flag, rare = f"--{name.replace('_', '-')}", name not in ("seed", *_USUAL) or name in _RARE
        if name in left_out:
            continue
        if hint is bool:
            no = flag.replace(".", ".no-")
            found.append(Option(name, (flag,), "", help, lambda _: True, rare=True))
            found.append(Option(name, (no,), "", "the opposite", lambda _: False, rare=True))
            continue
        # Of all but the seed the config says itself what it takes.
        kind, metavar, many = typed(hint, 0 if name == "seed" else -math.inf)
        if NoneType in get_args(hint):
            kind = _or_none(kind)
        flags = (flag,)
        if name in _USUAL:
            short, metavar, help = _USUAL[name]
            flags = (short, flag)
        found.append(Option(name, flags, metavar, help, kind, many=many, rare=rare))
    return found


def _or_none(kind: Kind) -> Kind:
    return lambda text: None if text.lower() == "none" else kind(text)


def configured(recipe: str, given: Mapping[str, Any]) -> RunConfig:
    """The config of a recipe with the values of `config_options`.

    Another data set brings its own size, flips and normalisation, another length moves the
    milestones; what is given for those goes before.
    """
    from spem.training import recipes

    config: RunConfig = getattr(recipes, recipe)()
    name, epochs = given.get("data.name"), given.get("optim.epochs")
    if name is not None and name != config.data.name:
        smoke = recipes.smoke().data
        data = smoke if name == smoke.name else recipes.paper(name).data
        config = dataclasses.replace(config, data=data)
    if epochs is not None:
        given = {"optim.milestones": recipes.scaled_milestones(epochs), **given}
    changes: dict[str, Any] = {"seed": given.get("seed", config.seed)}
    for section in ("model", "data", "optim", "runtime"):
        own = {k.partition(".")[2]: v for k, v in given.items() if k.startswith(f"{section}.")}
        changes[section] = dataclasses.replace(getattr(config, section), **own)
    return dataclasses.replace(config, **changes)


def check_data(data: DataConfig) -> None:
    """Refuse images that a run would fail on, right away; needs no torch."""
    from spem.data import check_images

    fields = {name: getattr(data, name) for name in ("root", "size", "test", "skip_broken")}
    check_images(data.name, **fields)
