"""Putting attention into other people's networks, and taking it out again."""

import warnings
from collections.abc import Collection
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from spem.attention import AttentionSpec, ChannelAttention, attention_class
from spem.attention.pooling import PoolSpec
from spem.insert.attached import Attached, forget, remember
from spem.insert.choose import chosen, costed, number_stages
from spem.insert.existing import CarriedSE, carries
from spem.insert.families import is_norm
from spem.insert.fused import FusedBlock, why_not_fused
from spem.insert.identity import IdentityStart
from spem.insert.keys import Around, walk
from spem.insert.layer import tail_spec
from spem.insert.sites import Site, Spot, Where, find_spots, trace
from spem.insert.wrap import AfterNorm, BeforeModule

_T = TypeVar("_T")
_STARTS = ("identity", "module")


class Displaced:
    """What stood where attention stands now: kept beside the network, not in it."""

    def __init__(self, layer: nn.Module | None) -> None:
        self.layer = layer


def attach(
    model: nn.Module,
    attention: str | AttentionSpec,
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
    """Puts attention into a network: after the last norm of every residual branch.

    The network is changed in place. Its state dict keeps its keys and gets those of the attention,
    so weights of the plain network load before or after (``load_state_dict(..., strict=False)``;
    only keys of attention are missing). `detach` takes it out again. If anything fails, the network
    is as it was.

    Args:
        model: Any network of convolutions; timm's and torchvision's families are known, with named
            rules for those without residual branches.
        attention: A spec or its text, of a module that stands in the tail of a block.
        where: For other networks: a function that is given every module and returns the norm to
            follow (or another module of the network whose output is [N, C, H, W]), or None.
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
            blocks of timm and torchvision.
        dry_run: Change nothing.
        input_shape: An input for the forward pass that is traced where the channels, or a map's
            size that the module must know, are told by no layer; None is what the network says it
            is made for, or (1, 3, 224, 224).

    Returns:
        The names of the sites, in the order of the network.

    Raises:
        ValueError: No site, an unknown attention, one that stands elsewhere or does not fit the
            channels, attention that is there already, or a block that cannot be fused.

    Warns:
        UserWarning: ``start="module"`` on trained norms, or layers replaced whose weights are lost.
    """
    spec = tail_spec(attention, "attach")
    if start not in _STARTS:
        raise ValueError(f"attach: start={start!r} is unknown. Use 'identity' or 'module'.")
    spots = _spots(model, spec, where, include, stages, replace, input_shape)
    if fuse:
        _check_fusable(model, spots)
    if not dry_run:
        built = [_built(spot, spec, start) for spot in spots]
        _warn(spots, built, start)
        _insert(model, spots, built, fuse=fuse)
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
    attention: str | AttentionSpec | None = None,
    *,
    where: Where | None = None,
    include: str | Collection[str] | None = None,
    stages: int | Collection[int] | None = None,
    replace: bool = False,
    input_shape: tuple[int, ...] | None = None,
) -> list[Site]:
    """What `attach` with these arguments would change: every site with its map and its cost.

    The network runs once, in evaluation mode, and is left as it was.

    Args:
        model: As for `attach`, and so are the other arguments.
        attention: The attention whose cost is counted; None counts none.
        where: As for `attach`.
        include: As for `attach`.
        stages: As for `attach`.
        replace: As for `attach`.
        input_shape: The input the maps are told for.

    Raises:
        ValueError: As `attach` does.
    """
    spec = None if attention is None else tail_spec(attention, "find_sites")
    spots = _spots(model, spec, where, include, stages, replace, input_shape, traced=True)
    if spec is None:
        return [spot.site() for spot in spots]
    return [costed(spot.site(), spec) for spot in spots]


def detach(model: nn.Module) -> list[str]:
    """Takes out what `attach` put in; keys, modules and outputs are those of the host again.

    Weights of the host that were trained meanwhile stay as they are.

    Returns:
        The names of the sites, as `attach` returned them; empty if there was no attention.
    """
    names: list[str] = []
    for node in list(walk(model)):
        module, parent = node.module, node.parent
        if parent is None:
            continue
        displaced = vars(module).get("displaced")
        if isinstance(module, FusedBlock):
            # Its parts are found below: the block is the same module as before.
            _put(parent, node.key, module.block)
        elif isinstance(module, (AfterNorm, BeforeModule, CarriedSE)):
            _put(parent, node.key, getattr(module, module.inner))
            names.append(node.name)
        elif isinstance(displaced, Displaced):
            like = next(module.parameters(), None)
            layer = displaced.layer
            if layer is not None and like is not None:
                layer = layer.to(device=like.device, dtype=like.dtype)
            _put(parent, node.key, layer)
            names.append(node.name)
    forget(model)
    return names


def _tuple(values: Collection[_T] | None) -> tuple[_T, ...] | None:
    return None if values is None else tuple(values)


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
    spots = find_spots(model, where, replacing=replace, input_shape=input_shape)
    if traced or input_shape is not None or _needs_trace(spots, spec):
        trace(model, spots, input_shape)
    number_stages(spots)
    spots = chosen(spots, include, stages)
    _refuse_attached(spots)
    _refuse_shared(model, spots)
    return spots


def _needs_trace(spots: list[Spot], spec: AttentionSpec | None) -> bool:
    if any(spot.channels is None for spot in spots):
        return True
    return (
        spec is not None
        and attention_class(spec.name).needs.size
        and (dict(spec.options).get("size") is None)
    )


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
    """The attention of a site, on the device and in the dtype of the norm there."""
    assert spot.channels is not None
    like = _like(spot)
    training = spot.block.training
    if _carried(spot, spec):
        assert spot.layer is not None
        pool = cast("PoolSpec", dict(spec.options).get("pool", "avg"))  # make_pool checks it
        carried = CarriedSE(spot.layer, pool, channels=spot.channels, exact=start == "identity")
        return carried.train(training)
    size = None if spot.shape is None else (spot.shape[2], spot.shape[3])
    try:
        inner = spec.build(spot.channels, size=size, device=like.device, dtype=like.dtype)
    except ValueError as error:
        raise ValueError(f"attach: {spot.name}: {error}") from None
    if start == "identity":
        inner = IdentityStart(inner, device=like.device, dtype=like.dtype)
    return inner.train(training)


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


def _warn(spots: list[Spot], built: list[ChannelAttention], start: str) -> None:
    lost = [
        spot
        for spot, attention in zip(spots, built, strict=True)
        if spot.how == "replace"
        and not isinstance(attention, CarriedSE)
        and spot.layer is not None
        and any(True for _ in spot.layer.parameters())
    ]
    if lost:
        warnings.warn(
            f"attach: the weights of {len(lost)} replaced layers ({lost[0].name} ...) do not go "
            f"over into {built[0].name}; the network has to be trained again. "
            f"An SE's go over into 'se' with no option but pool.",
            UserWarning,
            stacklevel=3,
        )
    trained = [spot for spot in spots if spot.how != "replace" and _is_trained(spot)]
    if start == "module" and trained:
        warnings.warn(
            f"attach: start='module' on trained weights: the gates of {built[0].name} do not start "
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
    model: nn.Module, spots: list[Spot], built: list[ChannelAttention], *, fuse: bool
) -> None:
    """Puts the attention in; all of it or nothing."""
    undo: list[tuple[nn.Module, str, nn.Module | None]] = []

    def put(parent: nn.Module, key: str, module: nn.Module) -> None:
        undo.append((parent, key, getattr(parent, key)))
        _put(parent, key, module)

    try:
        for spot, attention in zip(spots, built, strict=True):
            put(spot.parent, spot.key, _standing(spot, attention))
        if fuse:
            blocks = {id(spot.block) for spot in spots}
            for node in list(walk(model)):
                if id(node.module) in blocks:
                    if node.parent is None:
                        raise ValueError(
                            "attach: fuse=True: the network is a single block, and nothing is "
                            "around it. Put it into an nn.Sequential."
                        )
                    put(node.parent, node.key, FusedBlock(node.module))
    except BaseException:
        for parent, key, module in reversed(undo):
            _put(parent, key, module)
        raise


def _standing(spot: Spot, attention: ChannelAttention) -> nn.Module:
    """What is put into the attribute of the host."""
    layer = spot.layer
    if isinstance(attention, CarriedSE):
        return attention
    if spot.how == "before":
        assert layer is not None
        return BeforeModule(layer, attention)
    if spot.free or spot.how == "replace":
        vars(attention)["displaced"] = Displaced(layer)
        return attention
    assert layer is not None
    return AfterNorm(layer, attention)


def _put(parent: nn.Module, key: str, module: nn.Module | None) -> None:
    """Sets an attribute; None as a plain one, as it is in a host whose slot is free."""
    if module is None:
        delattr(parent, key)
    setattr(parent, key, module)
