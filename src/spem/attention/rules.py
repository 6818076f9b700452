"""What a training loop asks of a whole network: penalties, optimiser groups, attention's share."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from spem.attention.base import ChannelAttention
from spem.attention.pooling import LearnedMix


def learned_mixes(model: nn.Module) -> list[tuple[str, LearnedMix]]:
    """Every learned mix of a model with its name, shared ones once."""
    return [
        (name, module) for name, module in model.named_modules() if isinstance(module, LearnedMix)
    ]


def penalty(model: nn.Module) -> Tensor:
    """The sum of the penalties of a model's learned mixes, without the paper's coefficient 0.1.

    Formula:
        sum over blocks of p0^2 + p1^2 (`Mix`: squares; the others name theirs). A sum, so it grows
        with depth; 0.5 a block at the start.

    Returns:
        A 0-dim tensor in at least float32; zero for a model without learned mixes.

    Paper: Mix-Pooling Strategy for Attention Mechanism (2022), arXiv 2208.10322, eq. (8).
    """
    parts = [mix.penalty() for _, mix in learned_mixes(model)]
    if parts:
        return torch.stack(parts).sum()
    first = next(model.parameters(), None)
    return torch.zeros((), device=None if first is None else first.device)


def param_groups(
    model: nn.Module, lr: float, weight_decay: float, *, mix_lr: float | None = None
) -> list[dict[str, Any]]:
    """Optimiser groups that honour what every module declares.

    Each trainable parameter stands in exactly one group. Parameters that a module's authors train
    without weight decay (`Needs.no_decay`) and those of learned mixes get none (a mix without decay
    keeps lambda from drifting); all others get ``weight_decay``.

    Args:
        model: The network.
        lr: Learning rate.
        weight_decay: Weight decay of ordinary parameters.
        mix_lr: A learning rate of their own for learned mixes, or None for ``lr``.
    """
    mixes = {id(parameter) for _, mix in learned_mixes(model) for parameter in mix.parameters()}
    spared = {id(parameter) for parameter in _declared_no_decay(model)} - mixes
    groups: dict[str, list[nn.Parameter]] = {"decay": [], "no_decay": [], "mixes": []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            key = (
                "mixes"
                if id(parameter) in mixes
                else "no_decay"
                if id(parameter) in spared
                else "decay"
            )
            groups[key].append(parameter)
    rates = {"decay": lr, "no_decay": lr, "mixes": lr if mix_lr is None else mix_lr}
    decays = {"decay": weight_decay, "no_decay": 0.0, "mixes": 0.0}
    return [
        {"params": members, "lr": rates[key], "weight_decay": decays[key]}
        for key, members in groups.items()
        if members
    ]


def _declared_no_decay(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        if isinstance(module, ChannelAttention):
            for name in module.needs.no_decay:
                yield module.get_parameter(name)


def attention_parameters(model: nn.Module) -> int:
    """Number of parameters that belong to channel-attention modules, shared ones once.

    Those of a module that replaces a norm or a convolution count whole, with what they replace.
    """
    found = {
        id(p): p.numel()
        for module in model.modules()
        if isinstance(module, ChannelAttention)
        for p in module.parameters()
    }
    return sum(found.values())
