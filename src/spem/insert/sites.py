"""Finding the places of a network where attention is put, and what it costs there."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from spem.attention import ChannelAttention
from spem.insert.existing import channels_of_layer, existing_layer
from spem.insert.families import How, Rule, Stage, is_norm, rule_of
from spem.insert.keys import Node, joined, walk
from spem.insert.residuals import ends_of_branches

Where = Callable[[nn.Module], nn.Module | None]

_FEW = 8
"""A network with fewer convolutions has no convolutional stages: its stem is made of them."""


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
    channels: int | None = None
    shape: tuple[int, ...] | None = None
    stage: int = 0

    def site(self) -> Site:
        """What is told about it."""
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
    nodes = list(walk(model))
    spots: list[Spot] = []
    if where is not None:
        spots = list(_asked(nodes, where, "replace" if replacing else "after"))
    elif replacing:
        spots = list(_existing(nodes))
    if not spots and where is None:
        spots = list(_ruled(nodes))
    if not spots and where is None:
        spots = list(_followed(model, nodes, input_shape))
    if not spots:
        raise ValueError(_none_found(model, where))
    order = {id(node.module): number for number, node in enumerate(nodes)}
    spots = list({(id(spot.parent), spot.key): spot for spot in spots}.values())
    spots.sort(key=lambda spot: order[id(spot.watched or spot.block)])
    for spot in spots:
        spot.channels = _width(spot.reads)
    return spots


def trace(model: nn.Module, spots: Iterable[Spot], input_shape: tuple[int, ...] | None) -> None:
    """Runs the network once in evaluation mode and writes down the map of every site.

    Raises:
        ValueError: The network does not run on such an input, or a map is no [N, C, H, W].
    """
    spots = list(spots)
    shapes: dict[int, tuple[int, ...]] = {}
    handles: list[torch.utils.hooks.RemovableHandle] = []

    def see(spot: Spot, value: object) -> None:
        if isinstance(value, Tensor):
            shapes[id(spot)] = tuple(value.shape)

    try:
        for spot in spots:
            module = spot.watched
            if module is None:
                continue
            inside = spot.how in ("before", "replace")
            handles.append(
                module.register_forward_hook(
                    lambda _, inputs, output, spot=spot, inside=inside: see(
                        spot, inputs[0] if inside else output
                    )
                )
            )
        _run(model, input_shape)
    finally:
        for handle in handles:
            handle.remove()
    for spot in spots:
        _take_shape(spot, shapes.get(id(spot)))


def _run(model: nn.Module, input_shape: tuple[int, ...] | None) -> None:
    """One forward pass on zeros, in evaluation mode; the modes are restored."""
    shape = input_shape or default_input(model)
    modes = [(module, module.training) for module in model.modules()]
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    try:
        model.eval()
        with torch.no_grad():
            model(torch.zeros(shape, dtype=like.dtype, device=like.device))
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"attach: {type(model).__name__} does not run on an input of {list(shape)} ({reason}). "
            f"Pass input_shape= one that it takes."
        ) from error
    finally:
        for module, training in modes:
            module.training = training


def default_input(model: nn.Module) -> tuple[int, ...]:
    """The input a network says it is made for (timm's do), or one 224 x 224 image."""
    for name in ("pretrained_cfg", "default_cfg"):
        config = getattr(model, name, None)
        size = config.get("input_size") if isinstance(config, dict) else None
        if isinstance(size, (tuple, list)) and len(size) == 3:
            return (1, *(int(extent) for extent in size))
    return (1, 3, 224, 224)


def _ruled(nodes: list[Node]) -> Iterable[Spot]:
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
    name = joined(node.name, path)
    return Spot(name, node.module, parent, key, rule.how, rule.stage, layer, reads)


def _asked(nodes: list[Node], where: Where, how: How) -> Iterable[Spot]:
    """The sites that a function of the caller's names."""
    by_module = {id(node.module): node for node in nodes}
    for node in nodes:
        norm = where(node.module)
        if norm is None:
            continue
        if not isinstance(norm, nn.Module):
            raise TypeError(
                f"attach: where= gave {norm!r} for {node.name or 'the network'}, which is no "
                "module. It has to give the norm to follow, or None."
            )
        found = by_module.get(id(norm))
        if found is None or found.parent is None:
            raise ValueError(
                f"attach: where= gave a {type(norm).__name__} for {node.name or 'the network'} "
                f"that is no part of the network. It has to give one of its modules, or None."
            )
        reads = channels_of_layer(norm) or norm
        yield Spot(found.name, node.module, found.parent, found.key, how, "name", norm, reads)


def _followed(
    model: nn.Module, nodes: list[Node], input_shape: tuple[int, ...] | None
) -> Iterable[Spot]:
    """The sites of a network that is in no table, found by following a forward pass."""
    norms = {id(node.module): node for node in nodes if is_norm(node.module)}
    if sum(isinstance(node.module, nn.Conv2d) for node in nodes) < _FEW:
        return
    for norm in ends_of_branches(model, lambda: _run(model, input_shape)):
        node = norms[id(norm)]
        if node.parent is not None:
            yield Spot(node.name, node.parent, node.parent, node.key, "after", "name", norm, norm)


def _existing(nodes: list[Node]) -> Iterable[Spot]:
    """The attention layers that a network has: of other libraries, and ours."""
    within = "\n"
    for node in nodes:
        ours = isinstance(node.module, ChannelAttention)
        if node.parent is None or node.name.startswith(within):
            continue
        if ours or existing_layer(node.module) is not None:
            within = f"{node.name}."
            reads = node.module.channels if ours else channels_of_layer(node.module)
            block = _block_of(node, nodes)
            yield Spot(
                node.name, block, node.parent, node.key, "replace", "name", node.module, reads
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
    """The channels that a norm, a convolution, a parameter or a number tells; None if none."""
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
    if len(shape) != 4 or prod(shape) == 0:
        raise ValueError(
            f"attach: the map at {spot.name} is {list(shape)}, not [N, C, H, W]. "
            f"Leave it out with include=, or pass where= another module."
        )
    if spot.channels is not None and spot.channels != shape[1]:
        raise ValueError(
            f"attach: the map at {spot.name} is {list(shape)}, but its norm says "
            f"{spot.channels} channels. Pass where= a module whose output is [N, C, H, W]."
        )
    spot.channels, spot.shape = shape[1], shape


def _none_found(model: nn.Module, where: Where | None) -> str:
    name = type(model).__name__
    if where is not None:
        return f"attach: where= gave None for every module of {name}, so there is no site."
    convs = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    why = (
        "no convolutional stages"
        if convs < _FEW
        else "its blocks are in no known family, and no norm ends a residual branch"
    )
    return (
        f"attach: no site found in {name} ({why}). "
        f"Pass where= a rule that names the norms to follow."
    )
