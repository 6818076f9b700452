"""Fine-tuning in plain PyTorch: attention in a torchvision network, on scikit-learn's digits."""

import torch
import torchvision
from torch.nn import functional as F

import spem

torch.manual_seed(0)
digits = spem.data.load_images("digits", "train", size=32)
images, labels = digits.images[:256] / 127.5 - 1, digits.labels[:256]

model = torchvision.models.resnet18(num_classes=10)  # load your weights here: keys stay the host's
spem.attach(model, "spem(pool=mix(parametrization=anchored))")

# Three groups: ordinary parameters; those that their authors train without weight decay; lambda.
groups = spem.param_groups(model, lr=0.05, weight_decay=1e-4)
optimizer = torch.optim.SGD(groups, momentum=0.9)

model.train()
for epoch in range(3):
    total = 0.0
    for batch in torch.randperm(len(labels)).split(64):
        # The penalty is a function of the model: add it to whatever loss there is.
        task = F.cross_entropy(model(images[batch]), labels[batch])
        loss = task + 0.1 * spem.penalty(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += float(task.detach()) * len(batch)
    print(f"epoch {epoch}: loss {total / len(labels):.3f}")

for name, mix in spem.learned_mixes(model)[:2]:
    print(f"{name}: lambda {float(mix.lam.detach()):.4f}")
