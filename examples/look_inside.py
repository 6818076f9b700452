"""The gates that a network's attention computes, recorded without changing its outputs."""

import torch

import spem

model = spem.resnet(11, attention="spem").eval()
spem.initialise(model, seed=0)
images = torch.randn(2, 3, 32, 32)
with torch.no_grad():
    before = model(images)
    with spem.inspect(model) as inside:
        answer = model(images)
assert torch.equal(answer, before)
for name, gate in inside.gates.items():
    print(f"{name}: {list(gate.shape)}, mean {float(gate.mean()):.4f}")
for name, lam in inside.lambdas.items():
    print(f"{name}: lambda {lam:.2f}")
