"""The end of a residual block as one operation, with any gate."""

import torch

import spem

norm, attention = torch.nn.BatchNorm2d(64), spem.SPEM(64)
z, shortcut = torch.randn(2, 8, 64, 32, 32)
y = attention.tail(z, shortcut, norm)  # what spem.resnet does in every block
expected = torch.relu(attention(norm(z)) + shortcut)
print(f"largest difference {float((y - expected).abs().max().detach()):.1e}")

# Any gate [N, C] that is a function of the statistics of a plane, with autograd:
y = spem.ops.bn_gate_tail(z, shortcut, norm, lambda stats: torch.sigmoid(stats.max))  # pyright: ignore[reportArgumentType]  # it is there
