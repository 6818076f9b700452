"""Putting attention into other people's networks, and taking it out again."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import Any, cast

import torch
from torch import Tensor, nn

from spem.attention import PLACES, AttentionSpec, ChannelAttention, as_spec, attention_class
from spem.attention.pooling import PoolSpec
from spem.extras import first_line
from spem.insert import fused, sites
from spem.insert.families import is_norm
from spem.insert.sites import Site, Spot, Where
from spem.insert.start import CarriedSE, IdentityStart, se_parts
from spem.insert.wrap import AfterNorm, Around, BeforeModule

Attention = str | AttentionSpec | type[ChannelAttention]
_KEY = "attached_by_spem"
DISPLACED = "displaced_by_spem"
"""Attribute of an attention: the module whose place it took, kept out of the network."""
_SHARED_BY_PROCESSES = {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"}


@dataclass(frozen=True)
class Attached:
    """The arguments of one call of `spem.attach` that changed a network.

    The attention is its text; None is all sites or stages; ``where`` says whether there was one.
    """

    attention: str
    include: tuple[str, ...] | None
    stages: tuple[int, ...] | None
    replace: bool
    start: str
    fuse: bool
    input_shape: tuple[int, ...] | None
    where: bool


def attach(
    model: nn.Module,
    attention: Attention,
    *,
    where: Where | None = None,
    include: str | Collection[str] | None = None,
    stages: int | Collection[int] | None = None,
    replace: bool = False,
    start: str = "identity",
    fuse: bool = False,
    dry_run: bool = False,
    input_shape: tuple[int, ...] | None = None,
) -> list[str]:
    """Puts attention into a network: at the end of every residual branch.

    The network is changed in place: attention takes a free slot of a block, or goes with the last
    norm of the branch (or what else ends it) in an `AfterNorm`. Weights of the plain network load
    before or after (``load_state_dict(..., strict=False)``; only keys of attention are missing).
    At the end the network runs once, if it takes the input it is made for, and every site has to
    run. If anything fails, the network is as it was.

    Args:
        model: Any network of convolutions, of one to three axes. timm's and torchvision's families
            are known by name; others are followed through one forward pass. One without residual
            branches gets attention after the last norm of each resolution, and a warning.
        attention: A spec, its text, or the class, of a module that goes in the tail of a block.
        where: A function that is given every module and returns the norm to follow (or another
            module of the network whose output is [N, C, ...]), or None.
        include: Wildcard pattern of the names of sites, or several; None is all.
        stages: Numbers of stages, from 1 (`find_sites` shows them); None is all.
        replace: Put attention in the place of the SE, ECA, CBAM ... layers that the network has, if
            it has any, or of what ``where=`` names. An SE keeps its weights, activation and gate
            where ``attention`` is ``se`` with no option but a pool; with ``start="identity"`` that
            pool starts as the exact average, so outputs stay. False: attention follows such layers.
        start: ``"identity"``: the gate starts at one, so that trained weights keep their outputs
            (`IdentityStart`); ``"module"``: as the module itself starts (SPEM at 0.03).
        fuse: Run norm, attention, addition and ReLU as one operation; for the ResNet and ResNeXt
            blocks of timm and torchvision. A block that is changed or watched later runs composed.
        dry_run: Change nothing.
        input_shape: An input for the forward passes; None is what the network says it is made for,
            or one for its first convolution, such as (1, 3, 224, 224).

    Returns:
        The names of the sites, in the order of the network.

    Raises:
        ValueError: No site, an unknown attention, one that goes elsewhere or does not fit the
            channels or the rank of a map, attention that is there already, a site that does not
            run, a network that DDP or FSDP has wrapped, or a block that cannot be fused.

    Warns:
        UserWarning: ``start="module"`` on trained norms, layers replaced whose weights are lost, or
            a network without residual branches.
    """
    spec = _tail_spec(attention, "attach")
    chosen = _chosen(include=include, stages=stages, input_shape=input_shape)
    how: dict[str, Any] = {"replace": replace, "start": start, "fuse": fuse}
    call = Attached(str(spec), **chosen, **how, where=where is not None)
    model = _uncompiled(model)
    spots, runs = _spots(model, spec, where, call)
    if dry_run:
        return [spot.name for spot in spots]
    for spot in spots:
        spot.attention = _built(spot, spec, start)
    _warn(spots, start)
    _insert(model, spots, call.input_shape, runs=runs)
    for spot in spots if fuse else ():
        fused.fuse(spot.block)
    vars(model)[_KEY] = (*vars(model).get(_KEY, ()), call)
    return [spot.name for spot in spots]


def find_sites(
    model: nn.Module,
    attention: Attention | None = None,
    *,
    where: Where | None = None,
    include: str | Collection[str] | None = None,
    stages: int | Collection[int] | None = None,
    replace: bool = False,
    start: str = "identity",
    fuse: bool = False,
    input_shape: tuple[int, ...] | None = None,
) -> list[Site]:
    """What `attach` with these arguments would change: every site with its map and its cost.

    The network runs once, in evaluation mode, and is left as it was. Sizes of maps are missing if
    it does not run on the input that was guessed; costs, if no attention is named. Errors are those
    of `attach`.
    """
    spec = None if attention is None else _tail_spec(attention, "find_sites")
    chosen = _chosen(include=include, stages=stages, input_shape=input_shape)
    call = Attached("", **chosen, replace=replace, start=start, fuse=fuse, where=False)
    spots, _ = _spots(_uncompiled(model), spec, where, call)
    return [sites.described(spot, spec) for spot in spots]


def detach(model: nn.Module) -> list[str]:
    """Takes out what `attach` put in; keys, modules and outputs are those of the host again.

    Weights of the host that were trained since stay as they are. A layer that attention had
    replaced comes back in the mode, on the device and in the dtype that the network has now.

    Returns:
        The names of the sites, as `attach` returned them; empty if there was no attention.
    """
    names: dict[nn.Module, str] = {}
    _take_out(_uncompiled(model), "", names, set())
    return list(names.values())


def _uncompiled(model: nn.Module) -> nn.Module:
    """The network that torch.compile was given: its names are those that everything else knows."""
    return getattr(model, "_orig_mod", model)


def _take_out(
    parent: nn.Module, above: str, names: dict[nn.Module, str], seen: set[nn.Module]
) -> None:
    """Takes attention out of a part of a network, and collects its names."""
    seen.add(parent)
    vars(parent).pop(_KEY, None)
    fused.unfuse(parent)
    for key, child in list(parent._modules.items()):
        name, found = sites.join(above, key), child
        while isinstance(found, Around) or (found is not None and DISPLACED in vars(found)):
            names.setdefault(found, name)
            found = _displaced_by(found)
            _put(parent, key, found)
        if found is not None and found not in seen:
            _take_out(found, name, names, seen)


def _put(parent: nn.Module, key: str, new: nn.Module | None) -> None:
    if new is None:  # a plain attribute, as in a host whose slot is free
        delattr(parent, key)
    setattr(parent, key, new)


def exchange(model: nn.Module, new: Mapping[nn.Module, nn.Module | None]) -> None:
    """Puts other modules in the place of some, wherever they are held."""
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if child is not None and child in new:
                _put(parent, key, new[child])


def attn_layer(spec: Attention) -> Callable[..., ChannelAttention]:
    """What timm takes as ``attn_layer``: a function of a number of channels.

    Raises:
        ValueError: The spec is unreadable, unknown or "none", or names a module that does not go
            in the tail of a block.

    Examples:
        >>> attn_layer("se(reduction=8)")(64).channels
        64
    """
    return partial(_layer, _tail_spec(spec, "attn_layer"))


def _layer(
    spec: AttentionSpec,
    channels: int,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **_hints: object,  # for timm's own layers: rd_ratio, act_layer
) -> ChannelAttention:
    return spec.build(channels, device=device, dtype=dtype)


def remembered(model: nn.Module) -> list[tuple[str, Attached]]:
    """Every call that changed a network or a part of it, with the name of that part."""
    return [(n, call) for n, m in model.named_modules() for call in vars(m).get(_KEY, ())]


def _tail_spec(attention: Attention, asker: str) -> AttentionSpec:
    """The spec of a module that other people's networks have a place for."""
    if isinstance(attention, type) and issubclass(attention, ChannelAttention):
        if not attention.name:
            raise ValueError(f"{asker}: register {attention.__name__} by spem.register_attention.")
        attention = AttentionSpec(attention.name)
    spec = as_spec(attention)
    if spec is None:
        raise ValueError(f"{asker}: 'none' is the plain network; there is nothing to put in.")
    if spec.shared or spec.place != "tail":
        goes = "is shared by the blocks of a stage" if spec.shared else f"goes {PLACES[spec.place]}"
        raise ValueError(
            f"{asker}: {spec} {goes}, which only spem.resnet has a place for. Use a module of "
            f"placement 'tail' with one instance a block (spem list)."
        )
    return spec


def _chosen(**options: object) -> dict[str, Any]:
    """Options of one value or several as tuples; None stays."""
    found: dict[str, Any] = dict(options)
    for option, value in options.items():
        kind, word = (str, "pattern of names") if option == "include" else (Integral, "number")
        if value is not None:
            several = isinstance(value, Iterable) and not isinstance(value, str)
            found[option] = tuple(cast("Any", value)) if several else (value,)
            if not all(isinstance(part, kind) for part in found[option]):
                raise TypeError(f"attach: {option}={value!r} is not a {word} or several.")
    return found


def _displaced_by(attention: nn.Module) -> nn.Module | None:
    """What was there before attention, in the state that the network has now."""
    if isinstance(attention, Around):
        return attention.layer
    layer: nn.Module | None = vars(attention)[DISPLACED]
    if layer is not None:
        like = sites.float_like(attention, layer)
        layer.to(device=like.device, dtype=like.dtype).train(attention.training)
    return layer


def _spots(
    model: nn.Module, spec: AttentionSpec | None, where: Where | None, call: Attached
) -> tuple[list[Spot], bool]:
    """The chosen sites with their channels and maps, and whether the network ran to find these."""
    if call.start not in ("identity", "module"):
        raise ValueError(f"attach: start={call.start!r} is unknown. Use 'identity' or 'module'.")
    if not isinstance(model, nn.Module):
        raise TypeError(f"attach: needs a torch.nn.Module, got {type(model).__name__}.")
    if where is not None and not callable(where):
        said = f"where={where!r} is not a function of a module"
        raise TypeError(f"attach: {said}. Names are chosen with include='{where}*'.")
    if isinstance(model, torch.jit.ScriptModule):
        said = "TorchScript takes no new module"
        raise ValueError(f"attach: {said}. Attach to the network that it was made from.")
    kinds = {kind.__name__ for module in model.modules() for kind in type(module).__mro__}
    for wrapper in kinds & _SHARED_BY_PROCESSES:
        said = f"the network is in a {wrapper}, which would not share the new parameters"
        remedy = "Attach first, then wrap it"
        remedy += "" if wrapper.startswith("D") else "; FSDP takes an alpha only in the shape [1]"
        raise ValueError(f"attach: {said}. {remedy}.")
    spots = sites.find_spots(model, where, replacing=call.replace, input_shape=call.input_shape)
    failed, maps = None, sites.Maps()
    try:
        maps = sites.run_once(model, call.input_shape)
    except sites.InputError as error:
        failed = error
    spots = sites.trace(spots, maps)
    sites.number_stages(spots)
    spots = sites.chosen(spots, call.include, call.stages)
    # A guess at the input is not a fault of the network's, if no map has to be known.
    sized = spec and attention_class(spec.name).needs.size and "size" not in dict(spec.options)
    if failed and (call.input_shape is not None or sized or any(spot.fault for spot in spots)):
        raise failed
    _refuse(model, spots, fuse=call.fuse)
    return spots, failed is None


def _refuse(model: nn.Module, spots: list[Spot], *, fuse: bool) -> None:
    """Raises ValueError where attention is already, or cannot be fused."""
    for spot in spots:
        if spot.fault:
            remedy = "Leave it out with include=, or pass where= another module."
            raise ValueError(f"attach: {spot.fault}. {remedy}")
        ours = isinstance(spot.parent, Around) or isinstance(spot.layer, Around)
        if ours or hasattr(spot.layer, DISPLACED):
            said = f"there is attention at {spot.name} already"
            raise ValueError(f"attach: {said}. Call spem.detach(model) first.")
        why = fused.why_not_fused(spot.block, spot.parent, spot.key) if fuse else None
        if fuse and why is None and spot.how == "slot" and not spot.free:
            why = f"keeps its {type(spot.layer).__name__} before attention; pass replace=True"
        if why is not None:
            said = f"{spot.name} of {type(model).__name__} {why}"
            raise ValueError(f"attach: fuse=True: {said}. Leave fuse=True out.")


def _built(spot: Spot, spec: AttentionSpec, start: str) -> ChannelAttention:
    """The attention of a site, in the mode, on the device and in the dtype of its place."""
    host, options = spot.layer, dict(spec.options)
    carries = spot.how == "replace" and se_parts(host) and not getattr(host, "add_maxpool", False)
    if host is not None and carries and spec.name == "se" and options.keys() <= {"pool"}:
        pool = cast("PoolSpec", options.get("pool", "avg"))  # make_pool checks it
        exact, place = start == "identity", spot.key
        attention = CarriedSE(host, pool, channels=spot.channels, exact=exact, place=place)
    else:
        like = sites.float_like(spot.layer, spot.reads, spot.block)
        attention = sites.built(spot, spec, like)
        if start == "identity":
            attention = IdentityStart(attention, device=like.device, dtype=like.dtype)
    for part in attention.modules():  # not train(), which a carried layer would follow
        if part is not spot.layer:
            part.training = spot.parent.training
    return attention


def _warn(spots: list[Spot], start: str) -> None:
    name, texts = spots[0].attention.name, list[str]()
    if spots[0].reason.endswith("no residual branches"):
        texts.append(
            f"this network has no residual branches. Attention follows the last norm of each of "
            f"its {len(spots)} resolutions; where= or include= choose others."
        )
    replaced = [s for s in spots if s.how == "replace" and not isinstance(s.attention, CarriedSE)]
    lost = [s.name for s in replaced if s.layer is not None and list(s.layer.parameters())]
    if lost:
        texts.append(
            f"the weights of {len(lost)} replaced layers ({lost[0]} ...) do not go over into "
            f"{name}; an SE's do into 'se' with no option but pool."
        )
    if start == "module" and any(_is_trained(s.block) for s in spots if s.how != "replace"):
        texts.append(
            f"start='module' changes the outputs of trained weights, since the gates of {name} do "
            f"not start at one. Use start='identity' to keep them."
        )
    for text in texts:
        warnings.warn(f"attach: {text}", UserWarning, stacklevel=3)


def _is_trained(block: nn.Module) -> bool:
    """Whether a norm of the block has seen data."""
    means = (getattr(norm, "running_mean", None) for norm in filter(is_norm, block.modules()))
    return any(isinstance(t, Tensor) and not t.is_meta and bool(t.any()) for t in means)


def _insert(model: nn.Module, spots: list[Spot], shape: tuple[int, ...] | None, runs: bool) -> None:
    """Puts the attention in and runs the network, if it runs without; all of it or nothing."""
    standing = {spot: _standing(spot) for spot in spots}
    whole: dict[nn.Module, nn.Module] = {}
    try:
        for spot, new in standing.items():
            if spot.layer is not None and spot.layer.state_dict():
                whole[spot.layer] = new
            elif spot.layer is not None:
                # What has no tensors, such as one activation of all blocks, is meant in this one.
                exchange(spot.block, {spot.layer: new})
        exchange(model, whole)
        for spot, new in standing.items():
            setattr(spot.parent, spot.key, new)
        if runs:
            _check_that_all_run(model, spots, shape)
    except BaseException:
        exchange(model, {new: spot.layer for spot, new in standing.items()})
        raise


def _standing(spot: Spot) -> nn.Module:
    """What is put into the attribute of the host."""
    if isinstance(spot.attention, CarriedSE):
        return spot.attention
    if spot.free or spot.how == "replace" or spot.layer is None:
        vars(spot.attention)[DISPLACED] = spot.layer
        return spot.attention
    kind = BeforeModule if spot.how == "before" else AfterNorm
    wrapper = kind(spot.layer, spot.attention, spot.key)
    wrapper.training = spot.parent.training
    return wrapper


def _check_that_all_run(
    model: nn.Module, spots: list[Spot], input_shape: tuple[int, ...] | None
) -> None:
    kind = type(model).__name__
    try:
        ran = sites.run_once(model, input_shape)
    except sites.InputError as error:
        cause = first_line(error.__cause__ or error)
        raise ValueError(
            f"attach: {kind} no longer runs with {spots[0].attention.name} in it: {cause}. Pass "
            f"where= other modules, or leave sites out with include=."
        ) from error
    idle = [spot.name for spot in spots if spot.attention not in ran]
    if idle:
        raise ValueError(
            f"attach: {len(idle)} of {len(spots)} sites do not run in a forward pass of {kind}, "
            f"{idle[0]} first. Leave them out with include=, or pass where= modules that it calls."
        )
