"""A network in words, and the network of these words: what `config.json` says of it."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from spem.attention import spec_text
from spem.hub.fields import fields, sequence
from spem.insert import attach
from spem.insert.architectures import OPTIONS, build, check_options, library_of
from spem.insert.attached import Attached, remembered
from spem.models import ResNet, resnet

_NONE = type(None)
_LARGEST_INPUT = 2**26
"""Numbers in the input that attention was traced with; no image is larger."""
_OURS = {"kind": (str,), "depth": (int,), "classes": (int,), "attention": (str,), "block": (str,)}
_THEIRS = {"kind": (str,), "arch": (str,), "options": (dict,)}
_ATTACHED = {
    "part": (str,),
    "attention": (str,),
    "include": (list, _NONE),
    "stages": (list, _NONE),
    "replace": (bool,),
    "start": (str,),
    "fuse": (bool,),
    "input_shape": (list, _NONE),
}


def describe(
    model: nn.Module, arch: str | None, options: Mapping[str, Any] | None, *, asker: str
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A network as plain values: what it is, and what was attached to it, in order.

    Raises:
        ValueError: The architecture is not told and the network does not say it, or attention was
            attached by a rule, which no file can hold.
    """
    calls: list[dict[str, Any]] = []
    for part, call in remembered(model):
        if call.where:
            raise ValueError(
                f"{asker}: {call.attention} was attached with where=, a rule that no file can "
                f"hold. Use include= or stages=, or share the weights with your code."
            )
        values = dataclasses.asdict(call)
        del values["where"]
        lists = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        calls.append({"part": part, **lists})
    if isinstance(model, ResNet):
        if arch is not None or options:
            raise ValueError(f"{asker}: a network of spem.resnet has no arch= and options=.")
        ours = {"depth": model.depth, "classes": model.classes}
        ours |= {"attention": spec_text(model.spec), "block": model.block}
        return {"kind": "spem.resnet", **ours}, calls
    if arch is None:
        said = getattr(model, "pretrained_cfg", None)  # timm's
        arch = said.get("architecture") if isinstance(said, dict) else None
    if not isinstance(arch, str):
        raise ValueError(
            f"{asker}: {type(model).__name__} does not say what it is called. "
            f"Pass arch=, its name in timm or torchvision, such as 'torchvision:resnet50'."
        )
    library, name = library_of(arch, asker)
    given = dict(options or {})
    if library == "timm":
        given = _said(model, name, asker) | given
    return {"kind": library, "arch": name, "options": given}, calls


def _said(model: nn.Module, arch: str, asker: str) -> dict[str, Any]:
    """The options that a timm network shows: its number of classes, and what is not usual."""
    shown = _shown(model)
    with torch.random.fork_rng(devices=[]):
        usual = _shown(build(f"timm:{arch}", asker=asker))
    return {k: v for k, v in shown.items() if k == "num_classes" or v != usual.get(k, v)}


def _shown(model: nn.Module) -> dict[str, Any]:
    found = {name: getattr(model, name, None) for name in ("num_classes", "in_chans")}
    shown: dict[str, Any] = {k: v for k, v in found.items() if isinstance(v, int)}
    for owner in (model, getattr(model, "head", None)):
        pool = getattr(owner, "global_pool", None)
        kind = pool if isinstance(pool, str) else getattr(pool, "pool_type", None)
        if isinstance(kind, str):
            return shown | {"global_pool": kind}
    return shown


def rebuild(network: object, calls: object, *, subject: str) -> nn.Module:
    """The network of a description, with random weights, in evaluation mode.

    Nothing of it is run but this library's, timm's and torchvision's own constructors, with the
    arguments that `OPTIONS` and the signatures here admit.

    Args:
        network: What `describe` says first.
        calls: What it says second.
        subject: Start of messages.

    Raises:
        ValueError: A field is unknown, missing or of another type, or names something unknown.
    """
    kind, given = checked(network, subject=subject)
    if kind == "spem.resnet":
        model: nn.Module = resnet(
            given["depth"], given["classes"], attention=given["attention"], block=given["block"]
        ).eval()
    else:
        model = build(f"{kind}:{given['arch']}", given["options"], asker=subject)
    if not isinstance(calls, list):
        raise ValueError(f"{subject}: attach must be a list, found {type(calls).__name__}.")
    for call in cast("list[object]", calls):
        _attach(model, f"{subject}: attach", call)
    return model


def checked(network: object, *, subject: str) -> tuple[str, dict[str, Any]]:
    """The kind of a described network and its fields, each of its type.

    Raises:
        ValueError: The kind is unknown, or a field is unknown, missing or of another type.
    """
    kind = cast("dict[str, Any]", network).get("kind") if isinstance(network, dict) else None
    subject_here = f"{subject}: network"
    if kind == "spem.resnet":
        return kind, fields(subject_here, network, _OURS)
    if isinstance(kind, str) and kind in OPTIONS:
        given = fields(subject_here, network, _THEIRS)
        check_options(kind, given["options"], subject)
        return kind, given
    known = ", ".join(["spem.resnet", *OPTIONS])
    raise ValueError(f"{subject_here} is of an unknown kind {kind!r}. Known: {known}.")


def _attach(model: nn.Module, subject: str, values: object) -> None:
    given = fields(subject, values, _ATTACHED)
    lists = {
        name: sequence(subject, name, given[name], kind)
        for name, kind in (("include", str), ("stages", int), ("input_shape", int))
    }
    call = Attached(
        attention=given["attention"],
        replace=given["replace"],
        start=given["start"],
        fuse=given["fuse"],
        where=False,
        **lists,
    )
    shape = call.input_shape
    if shape is not None and (min(shape, default=0) < 1 or math.prod(shape) > _LARGEST_INPUT):
        raise ValueError(f"{subject}: input_shape={list(shape)} is no shape of an input.")
    try:
        part = model.get_submodule(given["part"])
    except AttributeError as error:
        raise ValueError(f"{subject}: the network has no part of that name ({error}).") from error
    arguments = {k: v for k, v in dataclasses.asdict(call).items() if k != "where"}
    with warnings.catch_warnings():
        # Weights that do not go over into attention come from the file.
        warnings.filterwarnings("ignore", message="attach: the weights of")
        attach(part, **arguments)


def misfit(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str | None:
    """How the tensors of a file differ from those that a network needs; None if they do not."""
    for names, what in (
        (sorted(wanted.keys() - found.keys()), "lack"),
        (sorted(found.keys() - wanted.keys()), "hold beside those of the network"),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            return f"the weights {what} {names[0]!r}{more}"
    for name, tensor in wanted.items():
        other = found[name]
        if other.shape != tensor.shape:
            return (
                f"{name!r} has the shape {list(other.shape)}, the network's is {list(tensor.shape)}"
            )
        if other.dtype != tensor.dtype:
            return f"{name!r} is of {other.dtype}, the network's of {tensor.dtype}"
    return None


def dtype_of(model: nn.Module, *, asker: str) -> torch.dtype:
    """The one floating-point dtype of a network's tensors.

    Raises:
        ValueError: There are several.
    """
    found = {t.dtype for t in model.state_dict().values() if t.is_floating_point()}
    if len(found) > 1:
        names = " and ".join(sorted(map(str, found)))
        raise ValueError(f"{asker}: the network has tensors of {names}. Convert it: model.float().")
    return found.pop() if found else torch.float32
