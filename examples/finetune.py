"""Fine-tune a timm network on a folder of photos, with attention or without.

    python examples/finetune.py --images FOLDER --model resnet18 --attention eca --seed 0

FOLDER holds train/<class>/ and test/<class>/. Run it for several seeds with `--attention none` and
with a module, and compare: `spem stats finetune.csv --by attention --within lr`. Runs of one seed
share the order of images and the start of the head, so they are pairs. Try two learning rates for
`none` first: a better rate often gains more than a module.
"""

import argparse
import csv
import random
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

import spem


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=Path, required=True, help="train/<class>/, test/<class>/")
    parser.add_argument("--model", default="resnet18", help="a name that timm knows")
    parser.add_argument("--pretrained", action="store_true", help="download timm's weights")
    parser.add_argument("--attention", default="eca", help='a module, or "none"')
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--csv", type=Path, default=Path("finetune.csv"))
    parser.add_argument("--save", type=Path, help="file for the trained weights (safetensors)")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train: Any = ImageFolder(str(options.images / "train"))
    test: Any = ImageFolder(str(options.images / "test"))

    # The plain network first: its head is the same whatever is attached.
    torch.manual_seed(options.seed)
    model = timm.create_model(
        options.model, pretrained=options.pretrained, num_classes=len(train.classes)
    )
    prepared = resolve_data_config({}, model=model)
    train.transform = create_transform(**prepared, is_training=True)
    test.transform = create_transform(**prepared)
    if options.attention != "none":
        sites = spem.attach(model, options.attention)  # outputs are unchanged until you train
        print(f"attached to {len(sites)} sites, from {sites[0]} to {sites[-1]}")
    model.to(device)

    # Seeded on its own, so that every module sees the same batches.
    order = torch.Generator().manual_seed(options.seed)
    batches = DataLoader(train, options.batch, shuffle=True, drop_last=True, generator=order)
    if not len(batches):
        raise SystemExit(f"{len(train)} training images do not fill a batch: use a smaller --batch")
    groups = spem.param_groups(model, lr=options.lr, weight_decay=1e-4)
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs * len(batches))

    torch.manual_seed(options.seed)  # augmentation, whatever the attention has drawn before
    random.seed(options.seed)
    for epoch in range(options.epochs):
        model.train()
        total = 0.0
        for images, labels in batches:
            task = F.cross_entropy(model(images.to(device)), labels.to(device))
            optimizer.zero_grad()
            (task + 0.1 * spem.penalty(model)).backward()  # the penalty is 0 without a learned mix
            optimizer.step()
            schedule.step()
            total += task.item()
        print(f"epoch {epoch + 1} of {options.epochs}: loss {total / len(batches):.3f}")

    model.eval()
    correct = 0
    with torch.no_grad():
        for images, labels in DataLoader(test, 256):
            correct += int((model(images.to(device)).argmax(1).cpu() == labels).sum())
    accuracy = 100 * correct / len(test)
    print(f"{options.attention}, seed {options.seed}: {accuracy:.2f} % of {len(test)} test images")

    row = {"model": options.model, "attention": options.attention, "seed": options.seed}
    row |= {"lr": options.lr, "epochs": options.epochs, "accuracy": round(accuracy, 4)}
    new = not options.csv.exists()
    with options.csv.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)
    if options.save:
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, options.save)


if __name__ == "__main__":
    main()
