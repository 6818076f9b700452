"""A detector: attention in the stages of a torchvision Faster R-CNN that are trained."""

from typing import Any

import torch
from torchvision.models.detection import fasterrcnn_resnet50_fpn

import spem

torch.manual_seed(0)
model = fasterrcnn_resnet50_fpn(
    weights=None,  # "DEFAULT" fetches COCO's
    weights_backbone=None,
    num_classes=3,
    min_size=64,
    max_size=64,
)
body: Any = model.backbone.body
for part in (body.conv1, body.bn1, body.layer1, body.layer2):
    part.requires_grad_(False)  # as is usual with a pretrained backbone
# The stages that are trained, by the names of their sites; `spem attach ... --dry-run` lists all.
sites = spem.attach(model, "eca", include=["backbone.body.layer3.*", "backbone.body.layer4.*"])
print(f"{len(sites)} sites, {sites[0]} to {sites[-1]}")

# Parameters that are frozen (requires_grad=False) are in no group.
optimizer = torch.optim.SGD(spem.param_groups(model, lr=0.002, weight_decay=1e-4), momentum=0.9)
images = [torch.rand(3, 64, 64)]
targets = [{"boxes": torch.tensor([[8.0, 8.0, 40.0, 48.0]]), "labels": torch.tensor([1])}]
model.train()
for step in range(2):
    losses = model(images, targets)
    loss = torch.stack(list(losses.values())).sum() + 0.1 * spem.penalty(model)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}: loss {float(loss.detach()):.3f}")
