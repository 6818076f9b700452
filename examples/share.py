"""A network as a folder that others load: weights, config, card; nothing in it is executed."""

import tempfile

import timm
import torch

import spem

torch.manual_seed(0)
model = timm.create_model("resnet10t", num_classes=10).eval()
spem.attach(model, "eca")
with tempfile.TemporaryDirectory() as folder:
    spem.save_pretrained(model, folder, arch="timm:resnet10t", license="apache-2.0")
    again = spem.from_pretrained(folder)  # or the id of a repository: "owner/name"
images = torch.randn(2, 3, 64, 64)
with torch.no_grad():
    assert torch.equal(again(images), model(images))
print("the same network, from its folder")
