"""Finding the places of a network where attention is put, and what it costs there."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from math import prod
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from spem.attention import AttentionSpec, ChannelAttention
from spem.insert.families import How, Rule, Stage, is_norm, rule_of
from spem.insert.follow import Call, End, ends_of_branches, follow, suggestion, summary
from spem.insert.start import channels_of_layer, existing_layer

_LOG = logging.getLogger("spem.insert")
Where = Callable[[nn.Module], nn.Module | None]
Place = tuple[nn.Module, str]
"""A module and the attribute of it that holds another one."""


@dataclass(frozen=True)
class Site:
    """A place of a network where attention is put.

    Args:
        name: Dotted name in the host of what it follows, or of the slot it takes.
        block: Class of the block it belongs to.
        stage: Number of its stage, from 1.
        how: ``"slot"``: it takes a free slot of the block; ``"after"``: it follows a module;
            ``"before"``: it stands before one; ``"replace"``: it takes the place of a layer.
        layer: Class of the module it follows, precedes or replaces; "" for a free slot.
        channels: C.
        shape: Shape of the map there; None if no forward was traced.
        parameters: Parameters that the attention adds; None if none was named.
        flops: FLOPs of its forward pass for that map, 2 per multiply-add, convolutions and matrix
            products only (as `spem.cost.count`); None without a shape.
        reason: Why it is one: a known block, the end of a residual branch, the last norm of a
            resolution.
    """

    name: str
    block: str
    stage: int
    how: str
    layer: str
    channels: int
    shape: tuple[int, ...] | None = None
    parameters: int | None = None
    flops: int | None = None
    reason: str = ""


@dataclass
class Spot:
    """A site with the modules it is made of; for the insertion itself."""

    name: str
    block: nn.Module
    parent: nn.Module
    key: str
    how: How
    kind: Stage
    layer: nn.Module | None
    reads: object
    reason: str
    places: list[Place] = field(default_factory=list[Place])
    """Every attribute of the network that holds the layer."""
    channels: int | None = None
    shape: tuple[int, ...] | None = None
    stage: int = 0

    def site(self) -> Site:
        """Its public description."""
        assert self.channels is not None
        layer = "" if self.layer is None or self.free else type(self.layer).__name__
        return Site(
            self.name,
            type(self.block).__name__,
            self.stage,
            self.how,
            layer,
            self.channels,
            self.shape,
            reason=self.reason,
        )

    @property
    def free(self) -> bool:
        """Whether it is a slot with nothing in it."""
        return self.how == "slot" and (self.layer is None or type(self.layer) is nn.Identity)

    @property
    def watched(self) -> nn.Module | None:
        """The module whose map is that of the site."""
        if self.layer is not None:
            return self.layer
        return self.reads if isinstance(self.reads, nn.Module) else None

    @property
    def composite(self) -> bool:
        """Whether it follows a module of several parts, which the network may call themselves."""
        return self.how == "after" and self.layer is not None and any(self.layer.children())

    @property
    def rank(self) -> int | None:
        """Axes of the map, from its shape or the class of the layer; None if neither says."""
        if self.shape is not None:
            return len(self.shape)
        for part in (self.layer, self.reads):
            for cls in type(part).__mro__:
                if found := re.search(r"([123])d$", cls.__name__):
                    return 2 + int(found[1])
        return None


class Node(NamedTuple):
    """A module of a network: its name, and the attribute that holds it."""

    name: str
    module: nn.Module
    parent: nn.Module | None
    key: str


def nodes_of(model: nn.Module) -> list[Node]:
    """Every module of a network once, in its order."""
    found: list[Node] = []
    for name, module in model.named_modules():
        above, _, key = name.rpartition(".")
        found.append(Node(name, module, model.get_submodule(above) if name else None, key))
    return found


def find_spots(
    model: nn.Module,
    where: Where | None,
    *,
    replacing: bool,
    input_shape: tuple[int, ...] | None = None,
) -> list[Spot]:
    """All sites of a network, in its order, without stages.

    Raises:
        ValueError: There is none.
    """
    nodes = nodes_of(model)
    spots: list[Spot] = []
    if where is not None:
        spots = list(_asked(nodes, where, "replace" if replacing else "after"))
        if not spots:
            raise ValueError(
                f"attach: where= gave None for every module of {type(model).__name__}, so there is "
                f"no site."
            )
    elif replacing:
        spots = list(_existing(nodes))
    spots = spots or list(_ruled(nodes)) or list(_followed(model, nodes, input_shape))
    order = {id(node.module): number for number, node in enumerate(nodes)}
    spots = list({(id(spot.parent), spot.key): spot for spot in spots}.values())
    spots.sort(key=lambda spot: order[id(spot.watched or spot.block)])
    held = _holders(model)
    for spot in spots:
        lazy = next((m for m in (spot.layer, spot.reads) if is_lazy(m)), None)
        if lazy is not None:
            raise ValueError(
                f"attach: {spot.name} is a {type(lazy).__name__} that has seen no data, so its "
                f"channels are unknown. Run one batch through the network first."
            )
        spot.channels = _width(spot.reads)
        if not spot.places:
            spot.places = _places(spot, held)
    return spots


def is_lazy(module: object) -> bool:
    """Whether a module gets its parameters from the first batch, and has seen none."""
    return isinstance(module, LazyModuleMixin) and cast("Any", module).has_uninitialized_params()


def trace(model: nn.Module, spots: Iterable[Spot], input_shape: tuple[int, ...] | None) -> None:
    """Runs the network once in evaluation mode and writes down the map of every site.

    A site whose layer does not run, because the network calls the parts of that layer itself, moves
    to the last of these parts.

    Raises:
        ValueError: The network does not run on such an input, or a map is no [N, C, ...].
    """
    spots = list(spots)
    shapes: dict[int, tuple[int, ...]] = {}
    parts: dict[int, tuple[str, tuple[int, ...]]] = {}
    handles: list[torch.utils.hooks.RemovableHandle] = []

    def watch(module: nn.Module, see: Callable[[object, object], None]) -> None:
        hook = module.register_forward_hook(lambda _, inputs, output: see(inputs[0], output))
        handles.append(hook)

    def see_map(spot: Spot, before: object, after: object) -> None:
        value = before if spot.how in ("before", "replace") else after
        if isinstance(value, Tensor):
            shapes[id(spot)] = tuple(value.shape)

    def see_part(spot: Spot, part: str, _: object, after: object) -> None:
        if isinstance(after, Tensor):
            parts[id(spot)] = part, tuple(after.shape)

    try:
        for spot in spots:
            if spot.watched is not None:
                watch(spot.watched, partial(see_map, spot))
            if spot.composite and spot.layer is not None:
                for name, part in list(spot.layer.named_modules())[1:]:
                    watch(part, partial(see_part, spot, name))
        run_once(model, input_shape)
    finally:
        for handle in handles:
            handle.remove()
    for spot in spots:
        if id(spot) not in shapes and id(spot) in parts:
            part, shapes[id(spot)] = parts[id(spot)]
            _move(spot, part)
        _take_shape(spot, shapes.get(id(spot)))


def _move(spot: Spot, part: str) -> None:
    """Moves a site to a part of its layer."""
    assert spot.layer is not None
    above, _, spot.key = part.rpartition(".")
    spot.parent = spot.layer.get_submodule(above)
    spot.layer = spot.reads = spot.layer.get_submodule(part)
    spot.name, spot.channels = f"{spot.name}.{part}", _width(spot.reads)
    spot.places = [(spot.parent, spot.key)]


def run_once(model: nn.Module, input_shape: tuple[int, ...] | None) -> None:
    """One forward pass on zeros, in evaluation mode; the modes are restored.

    Raises:
        ValueError: The network does not run on such an input.
    """
    shape = input_shape or default_input(model)
    modes = [(module, module.training) for module in model.modules()]
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    try:
        model.eval()
        with torch.no_grad():
            model(torch.zeros(shape, dtype=like.dtype, device=like.device))
    except Exception as error:  # a network says in its own way that an input does not fit
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"attach: {type(model).__name__} does not run on an input of {list(shape)} ({reason}). "
            f"Pass input_shape= one that it takes."
        ) from error
    finally:
        for module, training in modes:
            module.training = training


_EXTENTS = {1: (1024,), 2: (224, 224), 3: (8, 64, 64)}
"""What an input is taken for, by the rank of the first convolution."""


def default_input(model: nn.Module) -> tuple[int, ...]:
    """The input a network says it is made for (timm's do), else one for its first convolution."""
    for name in ("pretrained_cfg", "default_cfg"):
        config = getattr(model, name, None)
        size = config.get("input_size") if isinstance(config, dict) else None
        if isinstance(size, (tuple, list)) and len(size) == 3:
            return (1, *(int(extent) for extent in size))
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    for module in model.modules():
        if isinstance(module, convolutions):
            return (1, module.in_channels or 3, *_EXTENTS[len(module.kernel_size)])
    return (1, 3, *_EXTENTS[2])


def number_stages(spots: list[Spot]) -> None:
    """Gives every site the number of its stage; needs channels."""
    names = [spot.name.split(".") for spot in spots]
    depth = 0
    shortest = min(len(name) for name in names)
    while depth < shortest - 1 and len({name[depth] for name in names}) == 1:
        depth += 1
    order: dict[object, int] = {}
    run = 0
    for number, (spot, name) in enumerate(zip(spots, names, strict=True)):
        if spot.kind == "channels":
            run += number == 0 or spots[number - 1].channels != spot.channels
            key: object = run
        elif spot.kind == "site":
            key = (spot.name,)
        else:
            rest = ".".join(name[depth:])
            found = re.match(r"\D*\d+", rest)
            key = found[0] if found else rest
        spot.stage = order.setdefault(key, len(order) + 1)


def chosen(
    spots: list[Spot], include: str | Collection[str] | None, stages: int | Collection[int] | None
) -> list[Spot]:
    """The sites whose name matches a pattern and whose stage is asked for.

    Raises:
        ValueError: There is no such stage, or nothing is left.
    """
    kept = spots
    if stages is not None:
        wanted = {stages} if isinstance(stages, int) else set(stages)
        there = sorted({spot.stage for spot in spots})
        if not wanted <= set(there):
            raise ValueError(
                f"attach: stages={sorted(wanted)}, but this network has stages {there[0]} to "
                f"{there[-1]}. `spem attach --dry-run` shows them."
            )
        kept = [spot for spot in kept if spot.stage in wanted]
    if include is not None:
        patterns = [include] if isinstance(include, str) else list(include)
        kept = [s for s in kept if any(fnmatchcase(s.name, pattern) for pattern in patterns)]
    if not kept:
        raise ValueError(
            f"attach: include={include!r} matches no site. The names are {spots[0].name} to "
            f"{spots[-1].name}; use a pattern such as '*{spots[0].name.rpartition('.')[2]}'."
        )
    return kept


def built(spot: Spot, spec: AttentionSpec, *, asker: str, like: Tensor) -> ChannelAttention:
    """The attention of a site, on the device and in the dtype of a tensor.

    Raises:
        ValueError: It does not fit the channels or the rank of the map there.
    """
    assert spot.channels is not None
    size = spot.shape[2:] if spot.shape is not None and len(spot.shape) == 4 else None
    try:
        attention = spec.build(
            spot.channels,
            size=None if size is None else (size[0], size[1]),
            device=like.device,
            dtype=like.dtype,
        )
    except ValueError as error:
        raise ValueError(f"{asker}: {spot.name}: {error}") from None
    if spot.rank not in (None, 4) and not attention.takes_any_rank():
        layer = f" after a {type(spot.layer).__name__}" if spot.layer is not None else ""
        raise ValueError(
            f"{asker}: {spec.name} takes maps [N, C, H, W], and the map at {spot.name}{layer} has "
            f"{spot.rank} axes. Use a module that takes any rank, such as 'se' or 'spem'."
        )
    return attention


def costed(spot: Spot, spec: AttentionSpec) -> Site:
    """A site with what an attention costs there: it is built without memory and counted."""
    from torch.utils.flop_counter import FlopCounterMode

    site = spot.site()
    attention = built(spot, spec, asker="find_sites", like=torch.empty(0, device="meta")).eval()
    parameters = sum(p.numel() for p in attention.parameters())
    if site.shape is None:
        return replace(site, parameters=parameters)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        attention(torch.empty(site.shape, device="meta"))
    return replace(site, parameters=parameters, flops=counter.get_total_flops())


def _holders(model: nn.Module) -> dict[int, list[Place]]:
    """Every attribute that holds a module, by the module."""
    held: dict[int, list[Place]] = {}
    for parent in model.modules():
        for key, child in parent._modules.items():
            if child is not None:
                held.setdefault(id(child), []).append((parent, key))
    return held


def _places(spot: Spot, held: dict[int, list[Place]]) -> list[Place]:
    """Where the layer of a site is held: a network may keep its layers in two containers.

    One activation that many blocks share is held by all of them, and is meant in this block alone.
    """
    found = held.get(id(spot.layer), [])
    if len(found) < 2 or spot.layer is None:
        return [(spot.parent, spot.key)]
    if any(True for _ in (*spot.layer.parameters(), *spot.layer.buffers())):
        return found
    inside = {id(part) for part in spot.block.modules()}
    return [place for place in found if id(place[0]) in inside] or [(spot.parent, spot.key)]


def _ruled(nodes: list[Node]) -> Iterator[Spot]:
    """The sites that the table of families names."""
    for node in nodes:
        rule = rule_of(node.module)
        if rule is None:
            continue
        for path in rule.find(node.module):
            yield _spot(node, rule, path)


def _spot(node: Node, rule: Rule, path: str) -> Spot:
    if path:
        above, _, key = path.rpartition(".")
        parent = node.module.get_submodule(above) if above else node.module
    else:
        parent, key = node.parent, node.key
    if parent is None:
        raise ValueError(
            f"attach: the network is a single {type(node.module).__name__} and has nothing around "
            f"it. Put it into an nn.Sequential."
        )
    layer = getattr(parent, key)
    reads: object = layer
    if rule.reads:
        reads = node.module
        for name in rule.reads.split("."):
            reads = getattr(reads, name, None)
    name = ".".join(part for part in (node.name, path) if part)
    reason = f"known block {type(node.module).__name__}"
    return Spot(name, node.module, parent, key, rule.how, rule.stage, layer, reads, reason)


def _asked(nodes: list[Node], where: Where, how: How) -> Iterator[Spot]:
    """The sites that a function of the caller's names."""
    by_module = {id(node.module): node for node in nodes}
    for node in nodes:
        layer = where(node.module)
        if layer is None:
            continue
        if not isinstance(layer, nn.Module):
            raise TypeError(
                f"attach: where= gave {layer!r} for {node.name or 'the network'}, which is no "
                "module. It has to give the norm to follow, or None."
            )
        found = by_module.get(id(layer))
        if found is None or found.parent is None:
            raise ValueError(
                f"attach: where= gave a {type(layer).__name__} for {node.name or 'the network'} "
                f"that is no part of the network. It has to give one of its modules, or None."
            )
        # One activation may be held by many blocks: here it is that of this one.
        parent, key, name = found.parent, found.key, found.name
        for inner, child in node.module.named_modules(remove_duplicate=False):
            if child is layer and inner:
                above, _, key = inner.rpartition(".")
                parent = node.module.get_submodule(above)
                name = f"{node.name}.{inner}" if node.name else inner
                break
        reads = channels_of_layer(layer) or layer
        yield Spot(name, node.module, parent, key, how, "name", layer, reads, "where=")


def _followed(
    model: nn.Module, nodes: list[Node], input_shape: tuple[int, ...] | None
) -> Iterator[Spot]:
    """The sites of a network that is in no table, found by following a forward pass.

    Raises:
        ValueError: There is none.
    """
    if not any(hasattr(node.module, "kernel_size") for node in nodes):
        raise ValueError(
            f"attach: no site found in {type(model).__name__} (no convolutional layers). "
            f"Pass where= a rule that names the layers to follow."
        )
    forward = follow(model, lambda: run_once(model, input_shape))
    names = {id(node.module): node.name for node in nodes}
    norms = forward.norms if forward.convolutions > 1 else {}
    ranked: list[list[tuple[Call, Stage, str]]] = [
        *(
            [(end.call, "name", f"ends a residual branch of {_convs(end)}") for end in ends]
            for ends in ends_of_branches(forward)
        ),
        [
            (call, "site", f"last norm at {' x '.join(map(str, extents))}, no residual branches")
            for extents, call in norms.items()
        ],
    ]
    found = next((rank for rank in ranked if rank), [])
    for number, rank in enumerate(ranked, 1):
        for call, _, reason in rank:
            taken = "taken" if rank is found else "not taken"
            _LOG.info("rank %d, %s: %s, %s", number, taken, names[id(call.module)], reason)
    for (layer, parent), kind, reason in found:
        key = next((key for key, child in parent.named_children() if child is layer), None)
        if key is None:
            raise ValueError(
                f"attach: {names[id(layer)]} of {type(model).__name__} ends a branch, and no "
                f"attribute of {names[id(parent)] or 'the network'} holds it. Pass where=."
            )
        name = f"{names[id(parent)]}.{key}" if names[id(parent)] else key
        spot = Spot(name, parent, parent, key, "after", kind, layer, layer, reason)
        yield spot
    if not found:
        line = suggestion(model, forward)
        raise ValueError(
            f"attach: no site found in {type(model).__name__} ({summary(forward)}). Name the "
            f"layers to follow, for example spem.attach(model, 'spem', {line or 'where=...'})."
        )


def _convs(end: End) -> str:
    return f"{end.convolutions} convolution{'s' if end.convolutions > 1 else ''}"


def _existing(nodes: list[Node]) -> Iterator[Spot]:
    """The attention layers that a network has: of other libraries, and ours."""
    within = "\n"
    for node in nodes:
        ours = isinstance(node.module, ChannelAttention)
        if node.parent is None or node.name.startswith(within):
            continue
        if ours or existing_layer(node.module) is not None:
            within = f"{node.name}."
            layer = node.module
            reads = layer.channels if isinstance(layer, ChannelAttention) else None
            yield Spot(
                node.name,
                _block_of(node, nodes),
                node.parent,
                node.key,
                "replace",
                "name",
                layer,
                channels_of_layer(layer) if reads is None else reads,
                f"has a {type(layer).__name__}",
            )


def _block_of(node: Node, nodes: list[Node]) -> nn.Module:
    """The block of a known family that a module lies in; else what holds it."""
    assert node.parent is not None
    around = [
        other.module
        for other in nodes
        if node.name.startswith(f"{other.name}.") and rule_of(other.module) is not None
    ]
    return around[-1] if around else node.parent


def _width(reads: object) -> int | None:
    """The channels that a norm, a convolution, a parameter or a number has; None if none."""
    if isinstance(reads, int):
        return reads
    if isinstance(reads, Tensor):
        return reads.numel()
    if not isinstance(reads, nn.Module):
        return None
    for name in ("num_features", "num_channels", "out_channels"):
        value = getattr(reads, name, None)
        if isinstance(value, int):
            return value
    weight = getattr(reads, "weight", None)
    if is_norm(reads) and isinstance(weight, Tensor):  # LayerNorm, and torchvision's frozen norm
        return weight.shape[-1]
    return None


def _take_shape(spot: Spot, shape: tuple[int, ...] | None) -> None:
    if shape is None:
        if spot.channels is None:
            raise ValueError(
                f"attach: the forward pass did not come by {spot.name}, so its channels are "
                f"unknown. Leave it out with include=."
            )
        return
    if not 3 <= len(shape) <= 5 or prod(shape) == 0:
        raise ValueError(
            f"attach: the map at {spot.name} is {list(shape)}, not [N, C, ...] with 1 to 3 spatial "
            f"axes. Leave it out with include=, or pass where= another module."
        )
    if spot.channels is not None and spot.channels != shape[1]:
        raise ValueError(
            f"attach: the map at {spot.name} is {list(shape)}, but its norm says "
            f"{spot.channels} channels. Pass where= a module whose output is [N, C, ...]."
        )
    spot.channels, spot.shape = shape[1], shape
