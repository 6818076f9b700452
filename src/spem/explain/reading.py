"""One image through a network: what every attention keeps of it, and what the network answers."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spem.attention import ChannelAttention
from spem.gates import GateRecord, Inspection, inspect
from spem.insert import IdentityStart
from spem.ops import use_impl

CLOSED = 0.1
"""A channel whose gate is below this is told as closed."""


@dataclass(frozen=True, eq=False)
class BlockView:
    """What one attention did to the image.

    Shape:
        kept: [C], the gate of every channel; its mean over positions where they differ.
        maps: [C, H, W].

    Attributes:
        name: The attention's name in the state dict; shared ones have the block's number behind it.
        attention: Its name in the registry.
        kept: The gates.
        maps: The channels before the gate; the gate itself where it differs from position to
            position (``spatial``); the output of a module that replaces a norm or a convolution.
        spatial: Whether the gate differs from position to position.
        adds: Whether the attention also adds to the map.
        lambdas: The weight of the maximum in each of its mixes, by name.
        alpha: The alpha of an identity start, or None.
    """

    name: str
    attention: str
    kept: Tensor
    maps: Tensor
    spatial: bool
    adds: bool
    lambdas: dict[str, float]
    alpha: float | None

    @property
    def order(self) -> list[int]:
        """The channels from the most kept to the least; ties by number."""
        return self.kept.argsort(descending=True, stable=True).tolist()

    @property
    def mean(self) -> float:
        """The mean gate."""
        return float(self.kept.mean())

    @property
    def closed(self) -> float:
        """The share of channels whose gate is below 0.1."""
        return float((self.kept < CLOSED).double().mean())


@dataclass(frozen=True, eq=False)
class Explanation:
    """The attentions in the order in which they ran, and the answer of the network.

    Attributes:
        blocks: One view per attention, or per block that shares one.
        probabilities: Softmax of the logits, [classes]; None if the output is no row of logits.
    """

    blocks: list[BlockView]
    probabilities: Tensor | None


@torch.no_grad()
def explain(model: nn.Module, image: Tensor) -> Explanation:
    """Shows one image to a network and looks at what each of its attentions keeps.

    Tails are composed meanwhile, since a fused one never forms the map that its gate multiplies;
    the numbers are those of ``impl="reference"``. The mode of every module is
    restored.

    Shape:
        image: [1, 3, H, W], normalised as in training.

    Args:
        model: A network with attention.
        image: The image.

    Raises:
        ValueError: The network has no attention, or the image is no batch of one.
    """
    if image.dim() != 4 or image.shape[0] != 1:
        raise ValueError(f"explain: needs one image [1, 3, H, W], got {list(image.shape)}.")
    inside = inspect(model)
    attentions = _attentions(model)
    maps: list[tuple[ChannelAttention, Tensor]] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, ChannelAttention)
        shown = inputs[0] if module.needs.replaces is None else output
        maps.append((module, shown[0].detach().float().cpu()))

    modes = [(module, module.training) for module in model.modules()]
    with ExitStack() as stack:
        for module, mode in modes:  # each its own: a norm may be frozen in a network in training
            stack.callback(setattr, module, "training", mode)
        stack.enter_context(use_impl("reference"))
        for attention in attentions:
            stack.callback(attention.register_forward_hook(keep).remove)
        stack.enter_context(inside)
        output = model.eval()(image)
    blocks = [
        _view(inside, record, module, shown)
        for record, (module, shown) in zip(inside.records, maps, strict=True)
    ]
    logits = isinstance(output, Tensor) and output.dim() == 2 and output.shape[0] == 1
    return Explanation(blocks, output[0].float().softmax(0).cpu() if logits else None)


def _attentions(model: nn.Module) -> list[ChannelAttention]:
    """The attentions that the records are of: an identity start, not what it starts."""
    found = [m for m in model.modules() if isinstance(m, ChannelAttention)]
    started = {id(m.inner) for m in found if isinstance(m, IdentityStart)}
    return [m for m in found if id(m) not in started]


def _view(
    inside: Inspection, record: GateRecord, module: ChannelAttention, shown: Tensor
) -> BlockView:
    gate = record.gate[0].float().cpu()
    name = record.name.partition("[")[0]
    spatial = gate.dim() > 1
    return BlockView(
        name=record.name,
        attention=module.name,
        kept=gate.flatten(1).mean(1) if spatial else gate,
        maps=gate if spatial else shown,
        spatial=spatial,
        adds=module.needs.adds,
        lambdas={k: v for k, v in inside.lambdas.items() if k.startswith(f"{name}.")},
        alpha=inside.alphas.get(name),
    )
