"""After training, gates become constants inside the norms: the plain network, at its speed."""

import torch

import spem

model = spem.resnet(11, classes=10, attention="se").eval()
spem.initialise(model, seed=0)
images = torch.randn(64, 3, 32, 32)  # yours: a few hundred training images
plain = sum(p.numel() for p in spem.resnet(11, classes=10).parameters())

report = spem.fold(model, images.split(32))
print(report)
assert sum(p.numel() for p in model.parameters()) == plain  # no attention is left
