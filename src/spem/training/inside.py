"""What is looked at inside a network as it trains: gradients and gates of its blocks."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from spem.attention import ChannelAttention
from spem.data import ImageSet
from spem.gates import inspect
from spem.models import blocks
from spem.training.evaluation import predict

GATE_IMAGES = 256
"""Test images, the first ones, whose gates are described."""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@torch.no_grad()
def gradient_norms(model: nn.Module) -> Tensor:
    """The norm of the gradient of each block's own convolutions, from the first block to the last.

    Those of attention modules are left out, so that networks compare the same parameters.
    """
    found: list[Tensor] = []
    for _, block in blocks(model):
        attention = [m for m in block.modules() if isinstance(m, ChannelAttention)]
        theirs = {id(p) for module in attention for p in module.parameters()}
        convs = [m for m in block.modules() if isinstance(m, nn.Conv2d)]
        kernels = [conv.weight for conv in convs if id(conv.weight) not in theirs]
        own = [w.grad for w in kernels if w.grad is not None]
        found.append(torch.stack([g.norm() for g in own]).norm() if own else torch.zeros(()))
    return torch.stack(found).to(next(model.parameters()).device)


def describe_gates(
    model: nn.Module, data: ImageSet, *, normalisation: str = "paper"
) -> list[dict[str, Any]]:
    """Describe the gates of every attention module on the first test images.

    Args:
        model: the network.
        data: the test images.
        normalisation: a key of `spem.data.NORMALISATION`.

    Returns:
        For each module, from the first block to the last: its name, `mean` and `sd` over all values
        of its gate, their quantiles `q05` to `q95`, `sd_channels` (over channels, of the mean over
        images) and `sd_images` (over images, averaged over channels): a gate whose `sd_images` is 0
        does not look at its input. A module that has no gate (it only adds) is left out.
    """
    few = replace(data, images=data.images[:GATE_IMAGES], labels=data.labels[:GATE_IMAGES])
    if not any(isinstance(module, ChannelAttention) for module in model.modules()):
        return []  # the plain network
    with inspect(model) as inside:
        predict(model, few, normalisation=normalisation, batch=GATE_IMAGES)
    return [
        {"block": seen.name, "channels": seen.module.channels, **_describe(seen.gate)}
        for seen in inside.records
        if not seen.module.needs.adds
    ]


def _describe(gate: Tensor) -> dict[str, float]:
    values = gate.cpu().double()
    values = values.flatten(2).mean(2) if values.dim() > 2 else values  # [N, C]
    quantiles = torch.quantile(values.flatten(), values.new_tensor(QUANTILES))
    numbers = {
        "mean": values.mean(),
        "sd": values.std(correction=0),
        **{f"q{100 * q:02.0f}": v for q, v in zip(QUANTILES, quantiles, strict=True)},
        "sd_channels": values.mean(0).std(correction=0),
        "sd_images": values.std(0, correction=0).mean(),
    }
    return {key: float(value) for key, value in numbers.items()}


def norm_report(model: nn.Module, count: int = 4) -> str:
    """The norm layers with NaN or with the largest running variance, for an error message."""
    found: list[tuple[float, str]] = []
    norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)
    for name, module in model.named_modules():
        if isinstance(module, norms) and module.running_var is not None:
            variance = float(module.running_var.max())
            weight = float(module.weight.detach().norm())
            badness = variance if math.isfinite(variance) else math.inf
            found.append(
                (badness, f"{name} (weight norm {weight:.3g}, largest variance {variance:.3g})")
            )
    return "; ".join(text for _, text in sorted(found, key=lambda f: -f[0])[:count])
