"""A module by itself: built by its class or from a text, on maps of any size."""

import torch

import spem

attention = spem.SPEM(64)  # the channel count first, options as keywords
attention = spem.create_attention("se(pool=mix(0.3), reduction=8)", 64)  # the same as text
maps = torch.randn(8, 64, 32, 32)
assert attention(maps).shape == maps.shape  # dtype and memory format stay, too
gate = attention.gate(maps)  # at least float32, under autocast and in half precision
print(f"gates from {float(gate.detach().min()):.3f} to {float(gate.detach().max()):.3f}")
