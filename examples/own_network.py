"""Attention in a network of your own: found in one forward pass, or placed by a rule of yours."""

import torch
from torch import Tensor, nn

import spem


class Block(nn.Module):
    """A residual block on signals: one spatial axis."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, 9, padding=4, bias=False)
        self.norm = nn.BatchNorm1d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.norm(self.conv(x)))


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv1d(2, 32, 9), Block(32), Block(32), nn.AdaptiveAvgPool1d(1))


# Give the shape of an input: attach follows one forward pass and finds the ends of the branches.
model = network()
print(spem.attach(model, "eca", input_shape=(1, 2, 256)))


# Or say where: `where` is called with every module and returns what the attention follows, or None.
def after_norm(module: nn.Module) -> nn.Module | None:
    return module.norm if isinstance(module, Block) else None


model = network()
print(spem.attach(model, "eca", where=after_norm))
