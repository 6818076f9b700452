"""The cost of a network: parameters and FLOPs by layer, and the tails of its blocks."""

import math
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from spem.attention import ChannelAttention
from spem.insert.fused import FusedTail
from spem.insert.sites import evaluating, float_like
from spem.ops import Choice, choose, use_impl, why_composed

__all__ = ["Cost", "LayerCost", "TailCost", "block_tails", "count", "tails_text"]

_MAP_PASSES = {"numba": (4, 7), "triton": (4, 7), "formula": (4, 8), "plain": (8, 8)}
"""Reads and writes of a whole map by a tail, forward and backward: fused (the formula as a compiler
makes it), and batch norm, addition and ReLU one after the other."""


@dataclass(frozen=True)
class LayerCost:
    """A layer with its forward FLOPs; an attention is one, with all its parts.

    ``output`` is the shape of its last output, None where it was not called as a module.
    """

    name: str
    kind: str
    output: tuple[int, ...] | None
    parameters: int
    flops: int
    attention: bool


@dataclass(frozen=True)
class TailCost:
    """The end of one residual block: norm, attention, addition, ReLU.

    ``impl`` runs it ("reference" composes modules, the others fuse them), and ``reason`` says why
    if it is not fused. The bytes count full maps read and written; None for composed attention,
    whose traffic depends on the module.
    """

    name: str
    attention: str
    impl: str
    reason: str
    forward_bytes: int | None = None
    backward_bytes: int | None = None


@dataclass(frozen=True)
class Cost:
    """The cost of one forward pass of the batch, and the share of channel attention.

    Layers and tails of blocks are in the order of the model; the layers add up to the totals.
    """

    parameters: int
    attention_parameters: int
    flops: int
    attention_flops: int
    layers: tuple[LayerCost, ...]
    input_shape: tuple[int, ...]
    tails: tuple[TailCost, ...] = ()


def count(
    model: nn.Module,
    input_shape: tuple[int, ...],
    *,
    device: str | None = None,
    dtype: torch.dtype | None = None,
) -> Cost:
    """Count parameters and forward FLOPs of a model, layer by layer.

    FLOPs are counted by `torch.utils.flop_counter`: 2 per multiply-add, convolutions and matrix
    products only. Norms, activations, pooling and the scaling of the map by its gate count 0 but
    take time; so a difference in FLOPs says little about a difference in speed. The model runs
    once, in evaluation mode, on zeros; nothing in it changes.

    Args:
        model: Any module that takes one tensor.
        input_shape: Shape of that tensor, such as (1, 3, 32, 32).
        device: Device type to report tails for, present or not; None is the model's.
        dtype: Assumed dtype of the maps; None is the model's.

    Raises:
        ValueError: `input_shape` is empty or holds what is no number from 1 up, or an
            implementation that was asked for (`spem.ops.use_impl`) cannot run there.

    Examples:
        >>> cost = count(nn.Sequential(nn.Linear(3, 5)), (2, 3))
        >>> cost.parameters, cost.flops
        (20, 60)
    """
    if not input_shape or not all(isinstance(n, int) and n >= 1 for n in input_shape):
        raise ValueError(
            f"count: input_shape={input_shape!r} is not the shape of a batch. "
            "Use numbers from 1 up, such as (1, 3, 32, 32)."
        )
    tails = list(block_tails(model, device=device, dtype=dtype))  # before hooks are in the way
    own, outputs = _run(model, input_shape)
    layers: list[LayerCost] = []
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():  # one that several hold comes once
        if module in inside:
            continue
        attention = isinstance(module, ChannelAttention)
        parts = list(module.modules()) if attention else [module]
        inside.update(parts)
        parameters = sum(p.numel() for p in module.parameters(recurse=attention))
        flops = sum(own[part] for part in parts)
        if attention or parameters or flops or not any(True for _ in module.children()):
            kind, output = type(module).__name__, outputs.get(name)
            layers.append(LayerCost(name, kind, output, parameters, flops, attention))
    width = (dtype or float_like(model).dtype).itemsize
    for number, tail in enumerate(tails):
        composed = tail.impl == "reference"
        passes = _MAP_PASSES.get("plain" if composed and tail.attention == "none" else tail.impl)
        if passes is not None and tail.name in outputs:
            forward, backward = (each * math.prod(outputs[tail.name]) * width for each in passes)
            tails[number] = replace(tail, forward_bytes=forward, backward_bytes=backward)
    return Cost(
        parameters=sum(p.numel() for p in model.parameters()),
        attention_parameters=sum(row.parameters for row in layers if row.attention),
        flops=sum(own.values()),
        attention_flops=sum(row.flops for row in layers if row.attention),
        layers=tuple(layers),
        input_shape=tuple(input_shape),
        tails=tuple(tails),
    )


def block_tails(
    model: nn.Module, *, device: str | None = None, dtype: torch.dtype | None = None
) -> tuple[TailCost, ...]:
    """What runs the tail of each residual block, without running the model.

    A block is a module with an `attention` (a channel attention, or None) and a last norm `bn3` or
    `bn2`, as in `spem.models`; a stage has its blocks' attention as `shared`; blocks fused by
    ``spem.attach(fuse=True)`` describe their own tail. Attention elsewhere is a separate module
    after its norm: not fused. Arguments and errors as for `count`.
    """
    like = float_like(model)
    device, dtype = device or like.device.type, dtype or like.dtype
    shared = {
        id(block): stage.shared
        for stage in model.modules()
        if isinstance(getattr(stage, "shared", None), ChannelAttention)
        for block in stage.modules()  # which may be wrapped
    }
    found: list[TailCost] = []
    counted: set[nn.Module] = set()
    for name, block in model.named_modules():
        norm: Any = getattr(block, "bn3", None) or getattr(block, "bn2", None)
        attention: object = shared.get(id(block), getattr(block, "attention", False))
        composed: str | None = None
        if isinstance(block, FusedTail):
            parts = block.tail_parts()
            if isinstance(parts, str):
                inside = (m for m in block.modules() if isinstance(m, ChannelAttention))
                attention, composed = next(inside, None), parts
            else:
                norm, attention = parts
        elif isinstance(block, ChannelAttention):
            if block in counted or block.needs.place != "tail":
                continue
            attention, composed = block, "attention is separate from norm and addition"
        elif not isinstance(norm, nn.Module):
            continue
        elif attention is None and isinstance(norm, ChannelAttention):
            attention = norm  # in place of the norm
        if not isinstance(attention, (ChannelAttention, type(None))):
            continue
        if composed is None and attention is not None:
            composed = attention.why_composed()
        choice = Choice("reference", composed or "")
        if composed is None:
            choice = choose("bn_gate_tail", device, dtype, composed=why_composed(norm))
        kind = "none" if attention is None else attention.name or type(attention).__name__
        found.append(TailCost(name, kind, choice.impl, choice.reason))
        counted.update(() if attention is None else attention.modules())
    return tuple(found)


def tails_text(tails: Sequence[TailCost]) -> str:
    """One readable phrase: the number of tails, and what runs them.

    Examples:
        >>> tails_text([TailCost("layer1.0", "spem", "numba", "")])
        '1 block tail: numba (fused batch norm + spem + add + ReLU)'
    """
    kinds = Counter((tail.impl, tail.attention, tail.reason) for tail in tails)
    parts: list[str] = []
    for (impl, attention, reason), number in kinds.items():
        middle = "" if attention == "none" else f"{attention} + "
        text = f"fused batch norm + {middle}add + ReLU"
        if impl == "reference":
            text = f"not fused{f': {reason}' if reason else ''}"
        parts.append(f"{number} block tail{'s' if number > 1 else ''}: {impl} ({text})")
    return "; ".join(parts) or "no block tails"


def _run(
    model: nn.Module, input_shape: tuple[int, ...]
) -> tuple[Counter[nn.Module], dict[str, tuple[int, ...]]]:
    """FLOPs of each module outside of those that it calls; shapes of last outputs by name."""
    from torch.utils.flop_counter import FlopCounterMode

    own: Counter[nn.Module] = Counter()
    running: list[nn.Module] = [model]
    outputs: dict[str, tuple[int, ...]] = {}

    def spent() -> None:  # since the last call began or ended, by the module that runs
        own[running[-1]] += counter.get_total_flops() - own.total()

    def enter(module: nn.Module, _x: object) -> None:
        spent()
        running.append(module)

    def leave(name: str, _module: object, _x: object, output: object) -> None:
        spent()
        running.pop()
        if isinstance(output, Tensor):
            outputs[name] = tuple(output.shape)

    like, counter = float_like(model), FlopCounterMode(display=False)
    x = torch.zeros(input_shape, dtype=like.dtype, device=like.device)
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for name, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue  # which takes no hooks: what it does is counted for what calls it
            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(partial(leave, name)).remove)
        # Composed tails call every module, whose hooks then see its share.
        with torch.no_grad(), use_impl("reference"), counter:
            model(x)
    return own, outputs
