"""Five minutes: attention in a network that exists, which keeps its outputs and still learns."""

import torch
import torchvision

import spem

model = torchvision.models.resnet18().eval()  # or a pretrained one: weights="DEFAULT"
images = torch.randn(2, 3, 64, 64)
before = model(images)
sites = spem.attach(model, "spem")  # changes the network in place
assert torch.equal(model(images), before)  # it starts as the identity
print(f"{len(sites)} sites, the first: {sites[0]}")

groups = spem.param_groups(model, lr=0.01, weight_decay=1e-4)  # each module's own rules
optimizer = torch.optim.SGD(groups, momentum=0.9)
labels = torch.randint(1000, (2,))
for step in range(2):
    model.train()
    loss = torch.nn.functional.cross_entropy(model(images), labels) + 0.1 * spem.penalty(model)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}: loss {float(loss.detach()):.3f}")
