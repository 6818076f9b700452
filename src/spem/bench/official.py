"""SPEM computed the way the published program computes it: the yardstick of the benchmarks.

The same function of the same parameters as `SPEM(form="code")`, but step by step as published: an
adaptive max pooling and two successive minima, both pools through the map (w2, b2), mixed by
normalised squares, two sigmoids, and a last product with the feature map. Nothing here is shared
with the library.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spem.attention import SPEM

PAIRS = {"w1": "w_e", "b1": "b_e", "w2": "w_r", "b2": "b_r", "p": "pool.p"}
"""The parameters of the published module, and those of ours that mean the same."""


class OfficialWay(nn.Module):
    """The published module for maps [N, C, H, W], its parameters as in its checkpoints."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        shape = (1, channels, 1, 1)
        self.pool = nn.AdaptiveMaxPool2d(1)
        self.w1 = nn.Parameter(torch.zeros(shape))
        self.b1 = nn.Parameter(torch.full(shape, -1.0))
        self.w2 = nn.Parameter(torch.zeros(shape))
        self.b2 = nn.Parameter(torch.full(shape, -1.0))
        self.p = nn.Parameter(torch.full((2,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        """The gated map."""
        rows = x.min(dim=-1, keepdim=True).values
        low = rows.min(dim=-2, keepdim=True).values  # [N, C, 1, 1]
        high = self.pool(x)
        mapped_high = self.w2 * high + self.b2
        mapped_low = self.w2 * low + self.b2
        share = self.p.square() / self.p.square().sum()
        mixed = share[0] * mapped_high + share[1] * mapped_low
        excitation = torch.sigmoid(self.w1 * mixed + self.b1)
        reweight = torch.sigmoid(mapped_high + mapped_low)
        # In half precision the parameters are float32, and so is the gate; the map stays as it is.
        return x * (excitation * reweight).to(x.dtype)

    def tail(self, z: Tensor, residual: Tensor, norm: nn.Module) -> Tensor:
        """The end of the published block, with its in-place sum and ReLU."""
        out = self(norm(z))
        out += residual
        return out.relu_()


def official(ours: SPEM) -> OfficialWay:
    """The published module with the parameters of one of ours, of form ``code``."""
    theirs = OfficialWay(ours.channels).to(ours.w_e)
    with torch.no_grad():
        for a, b in PAIRS.items():
            target, source = theirs.get_parameter(a), ours.get_parameter(b)
            target.copy_(source.view_as(target))
    return theirs


def use_official(model: nn.Module) -> None:
    """Puts the published computation in the place of every SPEM of a network."""
    for block in model.modules():
        ours = getattr(block, "attention", None)
        if isinstance(ours, SPEM):
            # It has what a block asks of its attention, a method `tail`.
            block.attention = official(ours)


def our_name(name: str) -> str:
    """The name of a parameter of a network with the official way, in a network of ours.

    >>> our_name("layer1.0.attention.w1"), our_name("conv1.weight")
    ('layer1.0.attention.w_e', 'conv1.weight')
    """
    head, _, last = name.rpartition(".")
    return f"{head}.{PAIRS[last]}" if head.endswith("attention") and last in PAIRS else name


def official_penalty(model: nn.Module) -> Tensor:
    """The sum of p0^2 + p1^2 over the model's modules, without its coefficient."""
    terms = [m.p.square().sum() for m in model.modules() if isinstance(m, OfficialWay)]
    return torch.stack(terms).sum()
