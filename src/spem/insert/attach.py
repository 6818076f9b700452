"""Putting attention into other people's networks, and taking it out again."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from spem.attention import AttentionSpec, ChannelAttention, attention_class
from spem.attention.pooling import PoolSpec
from spem.insert.families import is_norm
from spem.insert.fused import FusedTail, fuse, unfuse, why_not_fused
from spem.insert.layer import tail_spec
from spem.insert.sites import (
    Place,
    Site,
    Spot,
    Where,
    built,
    chosen,
    costed,
    find_spots,
    is_lazy,
    number_stages,
    run_once,
    trace,
)
from spem.insert.start import CarriedSE, IdentityStart, carries
from spem.insert.wrap import AfterNorm, Around, BeforeModule

_T = TypeVar("_T")
_KEY = "attached_by_spem"
_STARTS = ("identity", "module")
_WRAPPED = ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule")


@dataclass(frozen=True)
class Attached:
    """The arguments of one call of `spem.attach` that changed a network.

    Attributes:
        attention: The text of the spec.
        include: Patterns of site names; None is all.
        stages: Numbers of stages; None is all.
        replace: As for `spem.attach`, and so are the others.
        start: ``"identity"`` or ``"module"``.
        fuse: Whether tails are fused.
        input_shape: Of the traced forward pass, or None.
        where: Whether sites were found by a rule of the caller's.
    """

    attention: str
    include: tuple[str, ...] | None
    stages: tuple[int, ...] | None
    replace: bool
    start: str
    fuse: bool
    input_shape: tuple[int, ...] | None
    where: bool


class Displaced:
    """What stood where attention stands now: kept beside the network, not in it."""

    def __init__(self, layer: nn.Module | None) -> None:
        self.layer = layer


def attach(
    model: nn.Module,
    attention: str | AttentionSpec | type[ChannelAttention],
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

    The network is changed in place: attention takes a free slot of a block, or stands with the last
    norm of the branch (or what else ends it) in an `AfterNorm`. Weights of the plain network load
    before or after (``load_state_dict(..., strict=False)``; only keys of attention are missing).
    `detach` takes it out again. At the end the network runs once, if it takes the input it is made
    for, and every site has to run. If anything fails, the network is as it was.

    Args:
        model: Any network of convolutions, of one to three axes. timm's and torchvision's families
            are known by name; others are followed through one forward pass. One without residual
            branches gets attention after the last norm of each resolution, and a warning.
        attention: A spec, its text, or the class, of a module that stands in the tail of a block.
        where: For other networks: a function that is given every module and returns the norm to
            follow (or another module of the network whose output is [N, C, ...]), or None.
        include: Wildcard pattern of the names of sites, or several; None is all.
        stages: Numbers of stages, from 1 (`find_sites` shows them); None is all.
        replace: Put attention in the place of the SE, ECA, CBAM ... layers that the network has, if
            it has any. An SE keeps its weights, activation and gate where ``attention`` is ``se``
            with no option but a pool; with ``start="identity"`` that pool starts as the exact
            average, so outputs stay. With ``where=`` it takes the place of what that names. False
            leaves such layers, and attention follows a layer that takes its slot.
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
        ValueError: No site, an unknown attention, one that stands elsewhere or does not fit the
            channels or the rank of a map, attention that is there already, a site that does not
            run, a network that DDP or FSDP has wrapped, or a block that cannot be fused.

    Warns:
        UserWarning: ``start="module"`` on trained norms, layers replaced whose weights are lost, or
            a network without residual branches.
    """
    spec = tail_spec(attention, "attach")
    _check_start(start)
    spots = _spots(model, spec, where, include, stages, replace, input_shape)
    if fuse:
        _check_fusable(model, spots)
    if not dry_run:
        added = [_built(spot, spec, start) for spot in spots]
        _warn(spots, added, start)
        _insert(model, spots, added, input_shape, fused=fuse)
        remember(
            model,
            Attached(
                attention=str(spec),
                include=(include,) if isinstance(include, str) else _tuple(include),
                stages=(stages,) if isinstance(stages, int) else _tuple(stages),
                replace=replace,
                start=start,
                fuse=fuse,
                input_shape=_tuple(input_shape),
                where=where is not None,
            ),
        )
    return [spot.name for spot in spots]


def find_sites(
    model: nn.Module,
    attention: str | AttentionSpec | type[ChannelAttention] | None = None,
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
    it does not run on the input that was guessed.

    Args:
        model: As for `attach`, and so are the other arguments.
        attention: The attention whose cost is counted; None counts none.
        where: As for `attach`.
        include: As for `attach`.
        stages: As for `attach`.
        replace: As for `attach`.
        start: As for `attach`.
        fuse: As for `attach`.
        input_shape: The input for which sizes of maps are given.

    Raises:
        ValueError: As `attach` does.
    """
    spec = None if attention is None else tail_spec(attention, "find_sites")
    _check_start(start)
    spots = _spots(model, spec, where, include, stages, replace, input_shape, traced=True)
    if fuse:
        _check_fusable(model, spots)
    if spec is None:
        return [spot.site() for spot in spots]
    return [costed(spot, spec) for spot in spots]


def detach(model: nn.Module) -> list[str]:
    """Takes out what `attach` put in; keys, modules and outputs are those of the host again.

    Weights of the host that were trained meanwhile stay as they are. A layer that attention had
    replaced comes back in the mode, on the device and in the dtype that the network has now.

    Returns:
        The names of the sites, as `attach` returned them; empty if there was no attention.
    """
    names: list[str] = []
    longer: dict[str, str] = {}  # names that wrappers have made longer, and those before
    found: set[nn.Module] = set()
    for true_name, module in list(model.named_modules()):
        unfuse(module)
        name = true_name
        for now, before in longer.items():
            if name.startswith(f"{now}."):
                name = before + name.removeprefix(now)
        if isinstance(module, Around):
            longer[f"{true_name}.{module.inner}"] = name
        if true_name and (isinstance(module, Around) or "displaced" in vars(module)):
            names.append(name)
            found.add(module)
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if child in found:
                put(parent, key, _displaced_by(child))
    forget(model)
    return names


def put(parent: nn.Module, key: str, module: nn.Module | None) -> None:
    """Sets an attribute; None as a plain one, as it is in a host whose slot is free."""
    if module is None:
        delattr(parent, key)
    setattr(parent, key, module)


def _displaced_by(attention: nn.Module) -> nn.Module | None:
    """What stood where attention stands: as it is in the network now."""
    if isinstance(attention, Around):
        return attention.layer
    displaced: Displaced = vars(attention)["displaced"]
    layer = displaced.layer
    if layer is not None:
        like = next((p for p in attention.parameters() if p.is_floating_point()), None)
        if like is not None:
            layer = layer.to(device=like.device, dtype=like.dtype)
        layer.train(attention.training)
    return layer


def _tuple(values: Collection[_T] | None) -> tuple[_T, ...] | None:
    return None if values is None else tuple(values)


def _check_start(start: str) -> None:
    if start not in _STARTS:
        raise ValueError(f"attach: start={start!r} is unknown. Use 'identity' or 'module'.")


def _spots(
    model: nn.Module,
    spec: AttentionSpec | None,
    where: Where | None,
    include: str | Collection[str] | None,
    stages: int | Collection[int] | None,
    replace: bool,
    input_shape: tuple[int, ...] | None,
    *,
    traced: bool = False,
) -> list[Spot]:
    """The chosen sites with their channels, and their maps where those are asked for."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"attach: needs a torch.nn.Module, got {type(model).__name__}.")
    if where is not None and not callable(where):
        raise TypeError(
            f"attach: where={where!r} is no function. It is given every module and returns the "
            f"norm to follow, or None; names are chosen with include='{where}*'."
        )
    for module in model.modules():
        wrapped = {cls.__name__ for cls in type(module).__mro__} & set(_WRAPPED)
        if wrapped:
            raise ValueError(
                f"attach: the network is in a {wrapped.pop()}, which would not share the new "
                f"parameters between its processes. Attach first, then wrap it."
            )
    spots = find_spots(model, where, replacing=replace, input_shape=input_shape)
    needed = _needs_trace(spots, spec)
    if traced or input_shape is not None or needed or any(spot.composite for spot in spots):
        try:
            trace(model, spots, input_shape)
        except ValueError:
            # A guess at the input is no fault of the network's.
            if needed or input_shape is not None or any(map(is_lazy, model.modules())):
                raise
    number_stages(spots)
    spots = chosen(spots, include, stages)
    _refuse_attached(spots)
    _refuse_shared(model, spots)
    return spots


def _needs_trace(spots: list[Spot], spec: AttentionSpec | None) -> bool:
    if any(spot.channels is None for spot in spots):
        return True
    if spec is None:
        return False
    unsized = attention_class(spec.name).needs.size and dict(spec.options).get("size") is None
    return unsized or (any(spot.rank is None for spot in spots) and not _takes_any_rank(spec))


def _takes_any_rank(spec: AttentionSpec) -> bool:
    kind = attention_class(spec.name)
    return kind.gate_from is not ChannelAttention.gate_from


def _refuse_attached(spots: list[Spot]) -> None:
    for spot in spots:
        layer = spot.layer
        attached = isinstance(layer, Around) or isinstance(spot.parent, Around)
        if attached or "displaced" in vars(layer or object):
            raise ValueError(
                f"attach: there is attention at {spot.name} already. Call spem.detach(model) first."
            )


def _refuse_shared(model: nn.Module, spots: list[Spot]) -> None:
    """A stage of `spem.resnet` that hands all blocks one module leaves their own slots unused."""
    for name, stage in model.named_modules():
        shared = getattr(stage, "shared", None)
        if isinstance(shared, ChannelAttention):
            unused = next((spot.name for spot in spots if spot.name.startswith(f"{name}.")), None)
            if unused is not None:
                raise ValueError(
                    f"attach: {unused} would not run, because the blocks of {name} share one "
                    f"{shared.name}. Build the network with attention='none'."
                )


def _check_fusable(model: nn.Module, spots: list[Spot]) -> None:
    for spot in spots:
        why = why_not_fused(spot.block, spot.parent, spot.key)
        if why is None and spot.how == "slot" and not spot.free:
            why = f"keeps its {type(spot.layer).__name__} before attention; pass replace=True"
        if why is not None:
            raise ValueError(
                f"attach: fuse=True: {spot.name} of {type(model).__name__} {why}. Leave fuse out."
            )


def _built(spot: Spot, spec: AttentionSpec, start: str) -> ChannelAttention:
    """The attention of a site, in the mode, on the device and in the dtype of its place."""
    assert spot.channels is not None
    like = _like(spot)
    if _carried(spot, spec):
        assert spot.layer is not None
        pool = cast("PoolSpec", dict(spec.options).get("pool", "avg"))  # make_pool checks it
        carried = CarriedSE(
            spot.layer, pool, channels=spot.channels, exact=start == "identity", place=spot.key
        )
        return _in_mode(carried, spot)
    inner = built(spot, spec, asker="attach", like=like)
    if start == "identity":
        inner = IdentityStart(inner, device=like.device, dtype=like.dtype)
    return _in_mode(inner, spot)


def _in_mode(attention: ChannelAttention, spot: Spot) -> ChannelAttention:
    for part in attention.modules():  # not train(), which a carried layer would follow
        if part is not spot.layer:
            part.training = spot.parent.training
    return attention


def _carried(spot: Spot, spec: AttentionSpec) -> bool:
    replaced = spot.how == "replace" and spot.layer is not None and carries(spot.layer)
    return replaced and spec.name == "se" and {name for name, _ in spec.options} <= {"pool"}


def _like(spot: Spot) -> Tensor:
    """A tensor of the device and dtype that the attention gets."""
    for module in (spot.layer, spot.reads, spot.block):
        if isinstance(module, Tensor):
            return module
        if isinstance(module, nn.Module):
            for tensor in (*module.parameters(), *module.buffers()):
                if tensor.is_floating_point():
                    return tensor
    return torch.empty(0)


def _warn(spots: list[Spot], added: list[ChannelAttention], start: str) -> None:
    if spots[0].reason.endswith("no residual branches"):
        warnings.warn(
            f"attach: this network has no residual branches. Attention follows the last norm of "
            f"each of its {len(spots)} resolutions, {spots[0].name} to {spots[-1].name}; "
            f"where= or include= choose others.",
            UserWarning,
            stacklevel=3,
        )
    lost = [
        spot
        for spot, attention in zip(spots, added, strict=True)
        if spot.how == "replace"
        and not isinstance(attention, CarriedSE)
        and spot.layer is not None
        and any(True for _ in spot.layer.parameters())
    ]
    if lost:
        warnings.warn(
            f"attach: the weights of {len(lost)} replaced layers ({lost[0].name} ...) do not go "
            f"over into {added[0].name}; the network has to be trained again. "
            f"An SE's go over into 'se' with no option but pool.",
            UserWarning,
            stacklevel=3,
        )
    trained = [spot for spot in spots if spot.how != "replace" and _is_trained(spot)]
    if start == "module" and trained:
        warnings.warn(
            f"attach: start='module' on trained weights: the gates of {added[0].name} do not start "
            f"at one, so the outputs change and the network has to be trained again. "
            f"Use start='identity' to keep them.",
            UserWarning,
            stacklevel=3,
        )


def _is_trained(spot: Spot) -> bool:
    """Whether a norm of the block has seen data; old checkpoints count no batches."""
    for module in spot.block.modules():
        if is_norm(module):
            batches = getattr(module, "num_batches_tracked", None)
            mean = getattr(module, "running_mean", None)
            for tensor in (batches, mean):
                if isinstance(tensor, Tensor) and tensor.device.type != "meta" and tensor.any():
                    return True
    return False


def _insert(
    model: nn.Module,
    spots: list[Spot],
    added: list[ChannelAttention],
    input_shape: tuple[int, ...] | None,
    *,
    fused: bool,
) -> None:
    """Puts the attention in and runs the network; all of it or nothing."""
    undo: list[tuple[Place, nn.Module | None]] = []
    blocks: list[nn.Module] = []
    try:
        for spot, attention in zip(spots, added, strict=True):
            standing = _standing(spot, attention)
            for place in spot.places:
                undo.append((place, getattr(*place)))
                put(*place, standing)
        _check_that_all_run(model, spots, added, undo, input_shape)
        for spot in spots if fused else ():
            if not isinstance(spot.block, FusedTail):
                blocks.append(spot.block)
                fuse(spot.block)
    except BaseException:
        for block in blocks:
            unfuse(block)
        _swap(undo)
        raise


def _check_that_all_run(
    model: nn.Module,
    spots: list[Spot],
    added: list[ChannelAttention],
    undo: list[tuple[Place, nn.Module | None]],
    input_shape: tuple[int, ...] | None,
) -> None:
    """Runs the network once; one that does not run on this input without attention is let be.

    Raises:
        ValueError: It runs without attention but not with it, or a site does not run.
    """
    model = getattr(model, "_orig_mod", model)  # of what torch.compile gave
    ran: set[nn.Module] = set()
    handles = [
        attention.register_forward_hook(lambda module, *_: ran.add(module)) for attention in added
    ]
    try:
        run_once(model, input_shape)
    except ValueError as error:
        after = _swap(undo)
        try:
            run_once(model, input_shape)
        except ValueError:
            return
        finally:
            _swap(after)
        cause = error.__cause__ or error
        raise ValueError(
            f"attach: {type(model).__name__} no longer runs with {added[0].name} in it: "
            f"{str(cause).strip().partition(chr(10))[0]} Pass where= other modules, or leave sites "
            f"out with include=."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    idle = [spot.name for spot, attention in zip(spots, added, strict=True) if attention not in ran]
    if idle:
        raise ValueError(
            f"attach: {len(idle)} of {len(spots)} sites do not run in a forward pass of "
            f"{type(model).__name__}, {idle[0]} first: the network does not call this module. "
            f"Leave them out with include=, or pass where= modules that it calls."
        )


def _swap(
    places: list[tuple[Place, nn.Module | None]],
) -> list[tuple[Place, nn.Module | None]]:
    """Puts modules in their places, the last first; what takes them back again."""
    back: list[tuple[Place, nn.Module | None]] = []
    for place, module in reversed(places):
        back.append((place, getattr(*place)))
        put(*place, module)
    return back


def _standing(spot: Spot, attention: ChannelAttention) -> nn.Module:
    """What is put into the attribute of the host."""
    layer = spot.layer
    if isinstance(attention, CarriedSE):
        return attention
    if spot.free or spot.how == "replace":
        vars(attention)["displaced"] = Displaced(layer)
        return attention
    assert layer is not None
    kind = BeforeModule if spot.how == "before" else AfterNorm
    wrapper = kind(layer, attention, spot.key)
    wrapper.training = spot.parent.training
    return wrapper


def remember(model: nn.Module, call: Attached) -> None:
    """Adds a call to what a network remembers; it is no part of the state dict."""
    vars(model)[_KEY] = (*vars(model).get(_KEY, ()), call)


def forget(model: nn.Module) -> None:
    """Makes a network and its parts forget all calls."""
    for module in model.modules():
        vars(module).pop(_KEY, None)


def remembered(model: nn.Module) -> list[tuple[str, Attached]]:
    """Every call that changed a network or a part of it, with the name of that part."""
    return [(n, call) for n, m in model.named_modules() for call in vars(m).get(_KEY, ())]
