"""What a network costs: parameters and FLOPs, layer by layer, with attention's share."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spem.attention import ChannelAttention
from spem.ops import use_impl

__all__ = ["Cost", "LayerCost", "count"]


@dataclass(frozen=True)
class LayerCost:
    """One row of the table.

    Args:
        name: Dotted name in the model.
        kind: Class name.
        output: Shape of its last output; None if it was not called as a module of its own.
        parameters: Number of parameters it holds.
        flops: FLOPs of its forward pass.
        attention: Whether it is a channel-attention module, which is one row with all its parts.
    """

    name: str
    kind: str
    output: tuple[int, ...] | None
    parameters: int
    flops: int
    attention: bool


@dataclass(frozen=True)
class Cost:
    """The cost of one forward pass. The rows of `layers` add up to the totals.

    Args:
        parameters: Parameters of the whole model.
        attention_parameters: Those that belong to channel-attention modules.
        flops: FLOPs of the whole forward pass for the given batch.
        attention_flops: Those of channel-attention modules.
        layers: One row for every layer, in the order of the model.
        input_shape: The input they were counted with.
    """

    parameters: int
    attention_parameters: int
    flops: int
    attention_flops: int
    layers: tuple[LayerCost, ...]
    input_shape: tuple[int, ...]


def count(model: nn.Module, input_shape: tuple[int, ...]) -> Cost:
    """Count parameters and forward FLOPs of a model, layer by layer.

    FLOPs are counted by `torch.utils.flop_counter`: 2 per multiply-add, convolutions and matrix
    products only. Norms, activations, pooling and the scaling of the map by its gate count 0 there
    although they take time, mostly for memory traffic; so a difference in FLOPs says little about a
    difference in speed.

    The model runs once, in evaluation mode, on zeros; its mode is restored, nothing in it changes.

    Args:
        model: Any module that takes one tensor.
        input_shape: Shape of that tensor, such as (1, 3, 32, 32).

    Raises:
        ValueError: `input_shape` is empty or holds a number below 1.

    >>> cost = count(nn.Sequential(nn.Linear(3, 5)), (2, 3))
    >>> cost.parameters, cost.flops
    (20, 60)
    """
    if not input_shape or min(input_shape) < 1:
        raise ValueError(
            f"count: input_shape={input_shape} is not the shape of a batch. "
            "Use numbers from 1 up, such as (1, 3, 32, 32)."
        )
    totals, outputs = _run(model, input_shape)
    layers = tuple(_rows(model, totals, outputs))
    return Cost(
        parameters=sum(p.numel() for p in model.parameters()),
        attention_parameters=sum(row.parameters for row in layers if row.attention),
        flops=totals.get("", 0),
        attention_flops=sum(row.flops for row in layers if row.attention),
        layers=layers,
        input_shape=tuple(input_shape),
    )


def _run(
    model: nn.Module, input_shape: tuple[int, ...]
) -> tuple[dict[str, int], dict[str, tuple[int, ...]]]:
    """By module name: FLOPs with all that it contains, and the shape of its last output."""
    from torch.utils.flop_counter import FlopCounterMode

    totals: dict[str, int] = {}
    outputs: dict[str, tuple[int, ...]] = {}
    open_at: dict[str, list[int]] = {}
    counter = FlopCounterMode(display=False)

    def enter(name: str) -> None:
        open_at.setdefault(name, []).append(counter.get_total_flops())

    def leave(name: str, output: object) -> None:
        spent = counter.get_total_flops() - open_at[name].pop()
        totals[name] = totals.get(name, 0) + spent
        if isinstance(output, Tensor):
            outputs[name] = tuple(output.shape)

    handles: list[torch.utils.hooks.RemovableHandle] = []
    modes = [(module, module.training) for module in model.modules()]
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    x = torch.zeros(input_shape, dtype=like.dtype, device=like.device)
    try:
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(lambda _m, _x, name=name: enter(name)))
            handles.append(
                module.register_forward_hook(lambda _m, _x, output, name=name: leave(name, output))
            )
        model.eval()
        # Composed tails call every module, whose hooks then see its share.
        with torch.no_grad(), use_impl("reference"), counter:
            model(x)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    return totals, outputs


def _spent(module: nn.Module, name: str, totals: dict[str, int]) -> int:
    """FLOPs of a module; one not called itself (a fused tail) spends what its parts spend."""
    if name in totals:
        return totals[name]
    return sum(_spent(child, _join(name, key), totals) for key, child in module.named_children())


def _join(name: str, child: str) -> str:
    return f"{name}.{child}" if name else child


def _rows(
    module: nn.Module, totals: dict[str, int], outputs: dict[str, tuple[int, ...]], name: str = ""
) -> Iterator[LayerCost]:
    """Rows: attention modules, modules without children, and what containers do themselves."""
    attention = isinstance(module, ChannelAttention)
    children = [] if attention else list(module.named_children())
    parameters = sum(p.numel() for p in module.parameters(recurse=attention))
    flops = _spent(module, name, totals)
    flops -= sum(_spent(child, _join(name, key), totals) for key, child in children)
    if attention or not children or parameters or flops:
        kind = type(module).__name__
        yield LayerCost(name, kind, outputs.get(name), parameters, flops, attention)
    for key, child in children:
        yield from _rows(child, totals, outputs, _join(name, key))
