"""Fine-tunes a timm or torchvision network on a folder of images, with attention or without.

    python examples/finetune.py --model timm:resnet50 --pretrained --images FOLDER \\
        --attention spem --start identity --seed 0 --csv runs.csv --save tuned.safetensors

FOLDER holds train/<class>/ and test/<class>/. Images are prepared as the model's own transforms say
(timm's data config, the transforms of torchvision's weights), with random crops and flips in
training; `--size` takes another size. Weights come from the library (`--pretrained`) or from a file
(`--weights`: safetensors, or a checkpoint of tensors), whose head may be for other classes: it then
starts anew. Every run is a row of the CSV file; a run that stands there is not trained again, and
several commands may write into one file at the same time. Runs
that differ in the attention alone share subset, head, batches and augmentation, and can be compared
in pairs:

    spem stats runs.csv --by attention start --within subset --baseline "none, start=-"
"""

import argparse
import contextlib
import csv
import dataclasses
import datetime
import fcntl
import hashlib
import json
import os
import random
import sys
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import spem
from spem.training.environment import commit, hardware


@dataclass(frozen=True)
class Settings:
    """What decides a run; every field is an option of the command and a column of the table."""

    model: str = "timm:resnet18"
    images: str = ""
    weights: str = ""
    pretrained: bool = False
    attention: str = "none"
    start: str = "identity"
    seed: int = 0
    subset: int = 0
    epochs: int = 5
    batch: int = 64
    lr: float = 0.01
    weight_decay: float = 1e-4
    penalty: float = 0.1
    size: int = 0
    crop: float = 0.35
    test_limit: int = 0


ADDED = ("train_images", "test_images", "classes_sha256")
"""Columns that tables of older versions lack."""

COLUMNS = (
    *(field.name for field in dataclasses.fields(Settings)),
    *("classes", *ADDED, "correct", "tested", "accuracy", "train_loss", "parameters"),
    *("weights_sha256", "time_seconds", "time_date"),
    *("host_hardware", "host_torch", "host_timm", "host_commit"),
)

HELP = {
    "model": "timm:NAME or torchvision:NAME",
    "images": "folder with train/<class>/ and test/<class>/",
    "weights": "file of weights to start from",
    "pretrained": "start from the library's weights, which it fetches",
    "attention": "a spec of spem, or none",
    "start": "identity or module",
    "subset": "training images, the same number of each class; 0: all",
    "penalty": "coefficient of the penalty on learned mixes",
    "size": "side of the images in pixels; 0: the model's own",
    "crop": "least area of a random crop in training, as a share of the image",
    "test_limit": "test images, drawn once for all runs; 0: all",
}


def build(settings: Settings, classes: int) -> tuple[nn.Module, Any, Any]:
    """The network and its transforms for training and for testing."""
    library, _, name = settings.model.partition(":")
    size = settings.size
    if library == "timm":
        model = timm.create_model(name, num_classes=classes, pretrained=settings.pretrained)
        config = resolve_data_config({"input_size": (3, size, size)} if size else {}, model=model)
        training = create_transform(
            **config, is_training=True, scale=(settings.crop, 1.0), color_jitter=0.0
        )
        return model, training, create_transform(**config)
    if library != "torchvision":
        raise ValueError(f"finetune: model {settings.model!r} is neither timm:... nor torchvision:")
    kinds: Any = torchvision.models.get_model_weights(name)
    weights = kinds.DEFAULT  # names them, fetches nothing
    model = torchvision.models.get_model(name, weights=weights if settings.pretrained else None)
    last, head = [
        (key, module) for key, module in model.named_modules() if isinstance(module, nn.Linear)
    ][-1]
    model.set_submodule(last, nn.Linear(head.in_features, classes))
    testing = weights.transforms(**({"crop_size": size, "resize_size": size} if size else {}))
    training = v2.Compose(
        [
            v2.RandomResizedCrop(
                testing.crop_size,
                scale=(settings.crop, 1.0),
                interpolation=testing.interpolation,
                antialias=True,
            ),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(testing.mean, testing.std),
        ]
    )
    return model, training, testing


def load(model: nn.Module, path: Path, optional: set[str]) -> None:
    """Loads weights; keys of ``optional`` (the attention's) may be missing, the head be another."""
    if path.suffix == ".safetensors":
        state = load_file(path)
    else:
        content = torch.load(path, map_location="cpu", weights_only=True)
        state = content.get("state_dict", content.get("model", content))
    own = model.state_dict()
    layers = [key for key, module in model.named_modules() if isinstance(module, nn.Linear)]
    head = layers[-1] + "." if layers else "no head"
    other = [key for key in state if key in own and state[key].shape != own[key].shape]
    if wrong := [key for key in other if not key.startswith(head)]:
        raise ValueError(
            f"finetune: {path}: {wrong[0]} has shape {list(state[wrong[0]].shape)}, the network "
            f"{list(own[wrong[0]].shape)}. Give the --model that the weights were trained with."
        )
    if other:  # a head of other classes: weight and bias both start anew
        state = {key: tensor for key, tensor in state.items() if not key.startswith(head)}
    found = model.load_state_dict(state, strict=False)
    missing = set(found.missing_keys) - optional
    missing = {key for key in missing if not (other and key.startswith(head))}
    if missing or found.unexpected_keys:
        key, which = (
            (min(missing), "lacks") if missing else (found.unexpected_keys[0], "has the unknown")
        )
        raise ValueError(
            f"finetune: {path} {which} {key}. Give the --model and --attention that the weights "
            "were trained with, or weights of the plain network."
        )


def chosen(labels: list[int], count: int, seed: int) -> list[int]:
    """Positions of ``count`` images, as many of each class, the same for all runs of a seed."""
    generator = spem.keyed_generator(seed, "subset")
    order = torch.randperm(len(labels), generator=generator).tolist()
    if not count:
        return order
    classes = max(labels) + 1
    if count % classes:
        raise ValueError(f"finetune: --subset {count} is no multiple of {classes} classes.")
    left = [count // classes] * classes
    taken: list[int] = []
    for position in order:
        if left[labels[position]] > 0:
            left[labels[position]] -= 1
            taken.append(position)
    if any(left):
        raise ValueError(
            f"finetune: --subset {count} asks for {count // classes} images a class, class "
            f"{left.index(max(left))} has {max(left)} fewer. Take a smaller subset."
        )
    return taken


def finetune(settings: Settings, save: Path | None = None) -> dict[str, Any]:
    """Trains one network and returns its row."""
    began = time.monotonic()
    train_set = ImageFolder(str(Path(settings.images) / "train"))
    test_set = ImageFolder(str(Path(settings.images) / "test"))
    if train_set.classes != test_set.classes:
        raise ValueError(f"finetune: {settings.images}: train/ and test/ have other classes.")
    torch.manual_seed(settings.seed)  # the head's weights: drawn before the attention's
    model, train_set.transform, test_set.transform = build(settings, len(train_set.classes))
    plain = set(model.state_dict())
    if settings.attention != "none":
        shape = (1, 3, settings.size, settings.size) if settings.size else None
        spem.attach(model, settings.attention, start=settings.start, input_shape=shape)
    if settings.weights:
        load(model, Path(settings.weights), set(model.state_dict()) - plain)
    loss = train(model, train_set, settings)
    correct, tested = test(model, test_set, settings)
    if save is not None:
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, save)
    return {
        **columns(settings),
        **contents(settings),
        "correct": correct,
        "tested": tested,
        "accuracy": round(100 * correct / tested, 4),
        "train_loss": round(loss, 6),
        "parameters": sum(p.numel() for p in model.parameters()),
        "weights_sha256": sha256(settings.weights),
        "time_seconds": round(time.monotonic() - began, 1),
        "time_date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "host_hardware": hardware(torch.device("cpu"), torch.get_num_threads()),
        "host_torch": torch.__version__,
        "host_timm": timm.__version__,
        "host_commit": commit() or "",
    }


def train(model: nn.Module, images: ImageFolder, settings: Settings) -> float:
    """Trains the network; the mean task loss of the last epoch."""
    subset = Subset(images, chosen(images.targets, settings.subset, settings.seed))
    order = spem.keyed_generator(settings.seed, "order")
    batches = DataLoader(subset, settings.batch, shuffle=True, drop_last=True, generator=order)
    if not len(batches):
        raise ValueError(
            f"finetune: {len(subset)} training images are less than a batch of {settings.batch}. "
            "Take a smaller --batch."
        )
    groups = spem.param_groups(model, lr=settings.lr, weight_decay=settings.weight_decay)
    optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=True)
    steps = settings.epochs * len(batches)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    torch.manual_seed(settings.seed)  # augmentation, whatever attention drew before
    random.seed(settings.seed)
    mean = float("nan")
    for _ in range(settings.epochs):
        model.train()
        total = torch.zeros(())
        for inputs, labels in batches:
            task = F.cross_entropy(model(inputs), labels)
            optimizer.zero_grad()
            (task + settings.penalty * spem.penalty(model)).backward()
            optimizer.step()
            schedule.step()
            total += task.detach()
        mean = float(total) / len(batches)
    return mean


def test(model: nn.Module, images: ImageFolder, settings: Settings) -> tuple[int, int]:
    """How many of how many test images are answered correctly."""
    limit = settings.test_limit or len(images)
    order = torch.randperm(len(images), generator=spem.keyed_generator(0, "test"))[:limit]
    model.eval()
    correct = 0
    with torch.no_grad():
        for inputs, labels in DataLoader(Subset(images, order.tolist()), 256):
            correct += int((model(inputs).argmax(1) == labels).sum())
    return correct, len(order)


def columns(settings: Settings) -> dict[str, Any]:
    """The settings as cells; paths by their last part, and no start where nothing is attached."""
    row = dataclasses.asdict(settings)
    row["images"] = Path(settings.images).name
    row["weights"] = Path(settings.weights).name if settings.weights else ""
    row["start"] = "-" if settings.attention == "none" else settings.start
    return row


def sha256(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else ""


def contents(settings: Settings) -> dict[str, Any]:
    """What lies in the image folder: two folders of the same name are not the same images."""
    cells: dict[str, Any] = {}
    classes: list[str] = []
    for split in ("train", "test"):
        images = ImageFolder(str(Path(settings.images) / split))
        classes = images.classes
        cells[f"{split}_images"] = len(images)
    names = hashlib.sha256(json.dumps(classes).encode()).hexdigest()
    return {"classes": len(classes), **cells, "classes_sha256": names}


def run(settings: Settings, table: Path, save: Path | None = None) -> dict[str, str]:
    """The row of a run: from the table if it stands there, else trained and appended.

    A table without the columns of ADDED is taken up as it is: in its rows, where these cells are
    empty, images are known by the name of their folder alone.
    """
    identity = {**columns(settings), **contents(settings)}
    identity["weights_sha256"] = sha256(settings.weights)
    wanted = {key: str(cell) for key, cell in identity.items()}
    found = [row for row in read(table) if same(row, wanted)]
    if found and (save is None or save.exists()):
        return found[0]
    row = {key: str(cell) for key, cell in finetune(settings, save).items()}
    with locked(table):
        # Read anew: other commands have written while this one trained.
        rows = [other for other in read(table) if not same(other, wanted)]
        part = table.with_name(f".{table.name}.{os.getpid()}.part")
        with part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows([*rows, row])
        part.replace(table)  # a kill leaves the old table or the new one
    return row


def same(row: dict[str, str], wanted: dict[str, str]) -> bool:
    """Whether a row is that of a run; what an older table does not say is not compared."""
    return all(row[key] == cell or (key in ADDED and not row[key]) for key, cell in wanted.items())


@contextlib.contextmanager
def locked(table: Path) -> Generator[None]:
    """Alone among the commands that write into this folder."""
    folder = os.open(table.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)  # which ends the lock, as the end of the process does


def read(table: Path) -> list[dict[str, str]]:
    """The rows of a table; those of ADDED that an older one lacks are empty."""
    if not table.exists():
        return []
    with table.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        there = list(reader.fieldnames or [])
        if set(there) - set(COLUMNS) or set(COLUMNS) - set(there) - set(ADDED):
            odd = sorted(set(there) ^ set(COLUMNS) - set(ADDED))
            raise ValueError(
                f"finetune: {table} is no table of this program: {', '.join(odd)} stand in one of "
                "the two only. Name another --csv."
            )
        return [dict.fromkeys(COLUMNS, "") | row for row in reader]


def main() -> None:
    usage, raw = (__doc__ or "").partition("\n")[0], argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=usage, formatter_class=raw)
    for field in dataclasses.fields(Settings):
        flag, text = "--" + field.name.replace("_", "-"), HELP.get(field.name, " ")
        if field.type is bool:
            parser.add_argument(flag, action="store_true", help=text)
        else:
            parser.add_argument(flag, type=type(field.default), default=field.default, help=text)
    parser.add_argument("--csv", type=Path, default=Path("finetune.csv"), help="table of runs")
    parser.add_argument("--save", type=Path, help="file for the trained weights (safetensors)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: as many as torch's")
    options = vars(parser.parse_args())
    table, save, threads = options.pop("csv"), options.pop("save"), options.pop("threads")
    if threads:
        torch.set_num_threads(threads)
    try:
        row = run(Settings(**options), table, save)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    print(f"{row['attention']} {row['start']}: {row['accuracy']} % of {row['tested']} test images")


if __name__ == "__main__":
    main()
