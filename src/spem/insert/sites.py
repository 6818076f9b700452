"""Finding the places of a network where attention is put, and what it costs there."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.utils._pytree import tree_leaves

from spem.attention import AttentionSpec, ChannelAttention
from spem.extras import rephrased
from spem.insert.families import How, Stage, attribute, is_norm, rule_of
from spem.insert.follow import follow, holds, suggestion, summary
from spem.insert.start import existing_layer, se_parts

_LOG = logging.getLogger("spem.insert")
Where = Callable[[nn.Module], nn.Module | None]
Shape = tuple[int, ...] | None
Maps = dict[nn.Module | tuple[nn.Module, nn.Module], tuple[Shape, Shape]]
"""The shapes of what modules got and gave in a forward pass, in the order of their last calls.

Also by the module that held them: detectors have one activation in blocks of all widths.
"""


@dataclass(frozen=True)
class Site:
    """A place of a network where attention is put.

    Attributes:
        name: Dotted name in the host of what it follows, or of the slot it takes.
        block: Class of the block it belongs to.
        stage: Number of its stage, from 1.
        how: ``"slot"``: it takes a slot of the block; ``"after"`` or ``"before"``: it follows or
            precedes a module; ``"replace"``: it takes the place of a layer.
        layer: Class of that module or layer; "" for a free slot.
        channels: C.
        shape: Shape of the map there; None if the network did not run.
        parameters: Parameters that the attention adds; None if none was named.
        flops: FLOPs of its forward pass for that map (as `spem.cost.count`); None without a shape.
        reason: A known block, the end of a residual branch, or the last norm of a resolution.
    """

    name: str
    block: str
    stage: int
    how: str
    layer: str
    channels: int
    shape: Shape = None
    parameters: int | None = None
    flops: int | None = None
    reason: str = ""


@dataclass(eq=False)
class Spot:
    """A site with the modules it is made of, and the attention once it is built."""

    model: nn.Module
    name: str
    block: nn.Module
    reason: str
    how: How = "after"
    kind: Stage = "name"
    reads: object = None  # what has the channels; None is the layer
    parent: nn.Module = field(init=False)
    key: str = field(init=False)
    layer: nn.Module | None = field(init=False)
    shape: Shape = None
    stage: int = 0
    fault: str = ""  # why no attention can go there
    attention: ChannelAttention = field(init=False)

    def __post_init__(self) -> None:
        above, _, self.key = self.name.rpartition(".")
        self.parent = self.model.get_submodule(above)
        self.layer = getattr(self.parent, self.key)
        self.reads = self.layer if self.reads is None else self.reads
        self.channels = _width(self.reads)  # 0 if it is not known yet

    @property
    def free(self) -> bool:
        """Whether it is a slot with nothing in it."""
        return self.how == "slot" and (self.layer is None or type(self.layer) is nn.Identity)

    @property
    def watched(self) -> nn.Module:
        """The module whose map is that of the site."""
        return next(m for m in (self.layer, self.reads, self.block) if isinstance(m, nn.Module))


def find_spots(
    model: nn.Module, where: Where | None, *, replacing: bool, input_shape: Shape
) -> list[Spot]:
    """All sites of a network, in its order, without stages."""
    if where is not None:
        spots = list(_asked(model, where, "replace" if replacing else "after"))
        if not spots:
            raise ValueError("attach: where= gave None for every module, so there is no site.")
    else:
        spots = list(_existing(model)) if replacing else []
        spots = spots or list(_ruled(model)) or list(followed(model, input_shape))
    spots = list({(spot.parent, spot.key): spot for spot in spots}.values())
    order: dict[object, int] = {}
    for number, (name, module) in enumerate(model.named_modules(remove_duplicate=False)):
        order[name] = number
        order.setdefault(module, number)
    return sorted(spots, key=lambda spot: order[spot.name if spot.layer else spot.watched])


def trace(spots: list[Spot], maps: Maps) -> list[Spot]:
    """The sites with the maps of one forward pass.

    A site whose layer does not run, because the network calls the parts of that layer itself, moves
    to the last of these parts.
    """
    moved = [_moved(spot, maps) for spot in spots]
    for spot in moved:
        here = maps.get((spot.parent, spot.watched)) or maps.get(spot.watched)
        before, after = here or (None, None)
        shape = before if spot.how in ("before", "replace") else after
        if shape is None:
            unknown = f"the forward pass did not come by {spot.name}, so its channels are unknown"
            spot.fault = "" if spot.channels else unknown
        elif 3 <= len(shape) <= 5 and prod(shape) and spot.channels in (0, shape[1]):
            spot.channels, spot.shape = shape[1], shape
        else:
            said = f" and the {spot.channels} channels of its norm" if spot.channels else ""
            axes = f"[N, C, ...] with 1 to 3 spatial axes{said}"
            spot.fault = f"the map at {spot.name} is {list(shape)}, not {axes}"
    return moved


def _moved(spot: Spot, maps: Maps) -> Spot:
    if spot.how != "after" or spot.layer is None or spot.layer in maps:
        return spot
    parts = {part: name for name, part in spot.layer.named_modules()}
    last = next((parts[part] for part in reversed(maps) if part in parts), None)
    return spot if last is None else replace(spot, name=f"{spot.name}.{last}", reads=None)


class InputError(ValueError):
    """A network does not run on an input."""


def run_once(model: nn.Module, input_shape: Shape) -> Maps:
    """One forward pass on zeros, in evaluation mode, which is restored; or an `InputError`."""
    for name, module in model.named_modules():
        if isinstance(module, LazyModuleMixin) and cast("Any", module).has_uninitialized_params():
            said = f"{name or 'the network'} is a {type(module).__name__} that has seen no data"
            raise InputError(f"attach: {said}. Run one batch through the network first.")
    maps: Maps = {}
    running: list[nn.Module] = []

    def see(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        running.pop()
        maps.pop(module, None)
        maps[module] = _shape(inputs[0] if inputs else None), _shape(output)
        if running and holds(running[-1], module):
            maps[running[-1], module] = maps[module]

    shape, like = input_shape or default_input(model), float_like(model)
    said = f"attach: {type(model).__name__} does not run on an input of {list(shape)}"
    remedy = "Pass input_shape= one that it takes, or where= a rule that names the layers."
    with ExitStack() as stack, rephrased(said, remedy, kind=InputError):
        stack.enter_context(evaluating(model))
        for module in model.modules():
            if not isinstance(module, torch.jit.ScriptModule):  # which takes no hooks
                enter = lambda module, _: running.append(module)  # noqa: E731
                stack.enter_context(module.register_forward_pre_hook(enter))
                stack.enter_context(module.register_forward_hook(see))
        with torch.no_grad():
            model(torch.zeros(shape, dtype=like.dtype, device=like.device))
    return maps


def _shape(value: object) -> Shape:
    return tuple(value.shape) if isinstance(value, Tensor) else None


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside of what torch.compile and data parallelism give."""
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while hasattr(model, "_orig_mod") or isinstance(model, parallel):
        model = model.module if isinstance(model, parallel) else cast("Any", model)._orig_mod
    return model


@contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """Puts a network in evaluation mode for a while; every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def float_like(*parts: object) -> Tensor:
    """The first floating-point tensor of some modules or tensors: whose device and dtype to use."""
    for part in parts:
        tensors = (*part.parameters(), *part.buffers()) if isinstance(part, nn.Module) else (part,)
        for tensor in tensors:
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                return tensor
    return torch.empty(0)


def tensors(output: object) -> list[Tensor]:
    """The tensors of an output, however nested."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def attentions_of(model: nn.Module) -> dict[str, ChannelAttention]:
    """The attentions of a network by their names; what is part of another one is left out."""
    found: dict[str, ChannelAttention] = {}
    parts: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, ChannelAttention) and module not in parts:
            found[name] = module
            parts |= set(module.modules())
    return found


_EXTENTS = {1: (1024,), 2: (224, 224), 3: (8, 64, 64)}
"""What an input is taken for, by the rank of the first convolution."""


def default_input(model: nn.Module) -> tuple[int, ...]:
    """The input a network says it is made for (timm's do), else one for its first convolution."""
    config: Any = getattr(model, "pretrained_cfg", None)
    if isinstance(config, dict) and config.get("input_size"):
        usual, *extents = config["input_size"]
        channels = getattr(model, "in_chans", usual)
        # A first convolution that was exchanged says its own; of a multiple it takes patches.
        first = attribute(model, f"{config.get('first_conv')}.in_channels")
        channels = first if isinstance(first, int) and first % channels else channels
        return (1, channels, *extents)
    for module in model.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            return (1, module.in_channels or 3, *_EXTENTS[len(module.kernel_size)])
    return (1, 3, *_EXTENTS[2])


def number_stages(spots: list[Spot]) -> None:
    """Gives every site the number of its stage; needs channels."""
    names = [spot.name.split(".") for spot in spots]
    columns = enumerate(zip(*names, strict=False))
    differing = (depth for depth, column in columns if len(set(column)) > 1)
    depth = next(differing, min(map(len, names)) - 1)
    order: dict[object, int] = {}
    run = channels = 0
    for spot, name in zip(spots, names, strict=True):
        run, channels = run + (spot.channels != channels), spot.channels
        rest = ".".join(name[depth:])
        found = re.match(r"\D*\d+", rest)
        keys = {"channels": run, "name": found[0] if found else rest, "site": (spot.name,)}
        spot.stage = order.setdefault(keys[spot.kind], len(order) + 1)


def chosen(
    spots: list[Spot], include: tuple[str, ...] | None, stages: tuple[int, ...] | None
) -> list[Spot]:
    """The sites whose name matches a pattern and whose stage is asked for."""
    last = max(spot.stage for spot in spots)
    if stages and not set(stages) <= set(range(1, last + 1)):
        raise ValueError(
            f"attach: stages={sorted(stages or ())}, but this network has stages 1 to {last}."
        )
    staged = [spot for spot in spots if stages is None or spot.stage in stages]
    patterns = ("*",) if include is None else include
    kept = [spot for spot in staged if any(fnmatchcase(spot.name, p) for p in patterns)]
    if not kept:
        given = {"include": include, "stages": stages}.items()
        asked = " with ".join(f"{key}={list(value)}" for key, value in given if value is not None)
        names = f"{spots[0].name} to {spots[-1].name}"
        raise ValueError(f"attach: {asked} matches no site. The names are {names}.")
    return kept


def built(spot: Spot, spec: AttentionSpec, like: Tensor) -> ChannelAttention:
    """The attention of a site, on the device and in the dtype of a tensor."""
    shape = spot.shape or (1, spot.channels, 1, 1)
    size = (shape[2], shape[3]) if spot.shape is not None and len(shape) == 4 else None
    with rephrased(f"attach: {spot.name}"):
        attention = spec.build(spot.channels, size=size, device=like.device, dtype=like.dtype)
    if len(shape) not in attention.ranks:
        raise ValueError(
            f"attach: {spec.name} takes maps [N, C, H, W], and the map at {spot.name} has "
            f"{len(shape)} axes. Use a module that takes any rank, such as 'se' or 'spem'."
        )
    return attention


def described(spot: Spot, spec: AttentionSpec | None) -> Site:
    """A site with what an attention costs there: it is built without memory and counted."""
    from torch.utils.flop_counter import FlopCounterMode

    parameters = flops = None
    if spec is not None:
        attention = built(spot, spec, torch.empty(0, device="meta")).eval()
        parameters = sum(p.numel() for p in attention.parameters())
        if spot.shape is not None:
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                attention(torch.empty(spot.shape, device="meta"))
            flops = counter.get_total_flops()
    layer = "" if spot.layer is None or spot.free else type(spot.layer).__name__
    place = spot.name, type(spot.block).__name__, spot.stage, spot.how, layer
    return Site(*place, spot.channels, spot.shape, parameters, flops, spot.reason)


def join(above: str, name: str) -> str:
    """The dotted name of a part, one of which may be "" for the whole."""
    return f"{above}.{name}" if above and name else above or name


def _ruled(model: nn.Module) -> Iterator[Spot]:
    """The sites that the table of families names."""
    for name, block in model.named_modules():
        if (rule := rule_of(block)) is not None:
            reason = f"known block {type(block).__name__}"
            for path in filter(partial(join, name), rule.places(block)):
                reads = attribute(block, rule.reads or path)
                yield Spot(model, join(name, path), block, reason, rule.how, rule.stage, reads)


def _asked(model: nn.Module, where: Where, how: How) -> Iterator[Spot]:
    """The sites that a function of the caller's names."""
    for name, module in model.named_modules():
        layer = where(module)
        if layer is not None:
            # One activation may be held by many blocks: here it is that of this one.
            inside = (join(name, n) for n in _names(module, layer) if n)
            site = next(inside, next(_names(model, layer), ""))
            if not site:
                said = f"a {type(layer).__name__}, which is no module of the network"
                here = name or "the network"
                raise TypeError(f"attach: where= gave {said}, for {here}. Give a norm, or None.")
            yield Spot(model, site, module, "where=", how)


def _names(parent: nn.Module, part: object) -> Iterator[str]:
    """All names of a part."""
    return (n for n, m in parent.named_modules(remove_duplicate=False) if m is part)


def _existing(model: nn.Module) -> Iterator[Spot]:
    """The attention layers that a network has: of other libraries, and ours."""
    within = "\n"
    for name, module in model.named_modules():
        known = isinstance(module, ChannelAttention) or existing_layer(module)
        if name and known and not name.startswith(within):
            within, parts = f"{name}.", name.split(".")
            above = [model.get_submodule(".".join(parts[:n])) for n in range(len(parts))][::-1]
            block = next((m for m in above if rule_of(m) is not None), above[0])
            yield Spot(model, name, block, f"has a {type(module).__name__}", "replace")


def followed(model: nn.Module, input_shape: Shape) -> Iterator[Spot]:
    """The sites of a network that is in no table, found by following a forward pass."""
    names = {module: name for name, module in model.named_modules()}
    kind = type(model).__name__
    scripts = [name for m, name in names.items() if isinstance(m, torch.jit.ScriptModule)]
    if scripts or not any(hasattr(module, "kernel_size") for module in names):
        script = f"{scripts[0] or 'it'} is TorchScript, which cannot be followed" if scripts else ""
        raise ValueError(
            f"attach: no site found in {kind} ({script or 'no convolutional layers'}). "
            f"Pass where= a rule that names the layers to follow."
        )
    forward = follow(model, lambda: run_once(model, input_shape))
    ranks = forward.ranks()
    found = next((rank for rank in ranks if rank), [])
    for number, rank in enumerate(ranks, 1):
        taken = "taken" if rank is found else "not taken"
        for call, reason in rank:
            _LOG.info("rank %d, %s: %s, %s", number, taken, names[call.module], reason)
    for (layer, parent), reason in found:
        # One activation may be held by many blocks: here it is that of this one.
        key = next((key for key, child in parent.named_children() if child is layer), None)
        name = names[layer] if key is None else join(names[parent], key)
        stage: Stage = "site" if found is ranks[-1] else "name"
        yield Spot(model, name, parent, reason, kind=stage)
    if not found:
        line = suggestion(forward) or "where=..."
        raise ValueError(
            f"attach: no site found in {kind} ({summary(forward)}). Name the layers to follow, "
            f"for example spem.attach(model, 'spem', {line})."
        )


def _width(reads: object) -> int:
    """The channels of a norm, convolution, attention, parameter or number; 0 if none."""
    if isinstance(reads, Tensor):
        return reads.numel()
    names = ["num_features", "num_channels", "out_channels"]
    names += ["channels"] if isinstance(reads, ChannelAttention) else []
    names += [f"{part}.in_channels" for part in se_parts(reads)[:1]]
    for value in (reads, *(attribute(reads, name) for name in names)):
        if isinstance(value, int):
            return value
    weight = getattr(reads, "weight", None)
    if is_norm(reads) and isinstance(weight, Tensor):
        return weight.shape[-1]  # LayerNorm, and torchvision's frozen norm
    return 0
