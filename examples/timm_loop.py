"""Fine-tuning with timm: its model, its scheduler, our attention and our optimiser groups."""

import timm
import torch
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch.nn import functional as F

import spem

torch.manual_seed(0)
digits = spem.data.load_images("digits", "train", size=32)
images, labels = digits.images[:256] / 127.5 - 1, digits.labels[:256]

# A pretrained network gets attention that starts as the identity.
model = timm.create_model("resnet10t", num_classes=10)  # pretrained=True fetches weights
spem.attach(model, "eca")

# A network that is trained from the start can be built with it, as the module itself starts.
fresh = timm.create_model("resnet18", block_args={"attn_layer": spem.attn_layer("spem")})

epochs, batches = 3, 4
groups = spem.param_groups(model, lr=0.05, weight_decay=1e-4)
optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=True)
scheduler = CosineLRScheduler(optimizer, t_initial=epochs * batches, warmup_t=2)

model.train()
step = 0
for epoch in range(epochs):
    total = 0.0
    for batch in torch.randperm(len(labels)).split(len(labels) // batches):
        task = F.cross_entropy(model(images[batch]), labels[batch])
        loss = task + 0.1 * spem.penalty(model)  # zero for ECA, which learns no lambda
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        scheduler.step(step)
        total += float(task.detach()) * len(batch)
    print(f"epoch {epoch}: loss {total / len(labels):.3f}")
