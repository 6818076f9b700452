"""A network as a folder that others load: weights, config, card; nothing in it is executed."""

import tempfile

import timm
import torch

import spem

torch.manual_seed(0)
model = timm.create_model("resnet10t", num_classes=10).eval()
spem.attach(model, "eca")
with torch.no_grad():  # in place of training: alpha and last norms start at zero
    for name, parameter in model.named_parameters():
        if name.endswith("alpha"):
            parameter.fill_(0.5)
        elif parameter.dim() == 1:
            parameter.uniform_(0.5, 1.0)
with tempfile.TemporaryDirectory() as folder:
    spem.save_pretrained(model, folder, arch="timm:resnet10t", license="apache-2.0")
    again = spem.from_pretrained(folder)  # or the id of a repository: "owner/name"
images = torch.randn(2, 3, 64, 64)
with torch.no_grad():
    outputs = again(images)
    assert torch.equal(outputs, model(images))
    spem.detach(again)
    assert not torch.allclose(again(images), outputs)  # attention was at work
print("the same network, from its folder")
