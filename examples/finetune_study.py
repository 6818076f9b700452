"""Does attention help a network that is fine-tuned? CIFAR-100 to subsets of CIFAR-10, paired seeds.

    python examples/finetune_study.py --data DIR --work runs/finetune --out results/finetune

DIR holds cifar10/ and cifar100/ (parquet files; `$SPEM_DATA` if left out). Both are written once as
image folders into the work folder; a plain network is trained on CIFAR-100, then fine-tuned on
subsets of CIFAR-10 by `finetune.py`: plain, with SPEM and with SE, each starting as the identity
and as the module itself. All arms of a seed share subset, head, batches and augmentation. Finished
runs stand in runs.csv and are not repeated; summary.md is made from it anew each time.
"""

import argparse
import contextlib
import io
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from finetune import Settings, read, run
from PIL import Image

from spem.cli import main as spem_command
from spem.data import ImageSet, load_images

ARMS = [
    ("none", "identity"),
    ("spem", "identity"),
    ("spem", "module"),
    ("se", "identity"),
    ("se", "module"),
]
BASELINE = "none, start=-"


def write_folder(images: ImageSet, folder: Path) -> None:
    """Writes a split as one PNG an image, sorted into one folder a class."""
    for name in images.classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
    pixels = images.images.permute(0, 2, 3, 1).numpy()
    for index, label in enumerate(images.labels.tolist()):
        Image.fromarray(pixels[index]).save(folder / images.classes[label] / f"{index:05}.png")


def image_folder(name: str, source: str | None, work: Path) -> Path:
    """The image folder of a set, made once; a folder that is there is whole."""
    folder = work / Path(name).name
    if folder.is_dir():
        return folder
    part = work / f"{Path(name).name}.part"
    root = Path(source) if source and name in ("cifar10", "cifar100") else None
    for split in ("train", "test"):
        write_folder(load_images(name, split, root=root), part / split)
    return part.rename(folder)


def summary(table: Path, first: str) -> str:
    """The report: paired differences to the plain network, by the statistics of `spem stats`."""
    arguments = ["stats", str(table), "--by", "attention", "start", "--value", "accuracy"]
    arguments += ["--pair", "seed", "--within", "subset", "--baseline", BASELINE, "--json"]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        if spem_command(arguments):
            raise ValueError(f"finetune_study: spem {' '.join(arguments)} failed.")
    document: dict[str, Any] = json.loads(said.getvalue())
    one = read(table)[0]
    parts = [
        "# Fine-tuning with attention\n",
        f"`{one['model']}` at {one['size']} pixels, trained on {first} without attention, then on "
        f"subsets of {one['images']} ({one['epochs']} epochs, batch {one['batch']}, rate "
        f"{one['lr']}). Accuracy in percent on {one['tested']} test images after the last epoch; "
        "differences to the plain network of the same seed. All runs start from the weights of one "
        f"training on {first}, so nothing here tells how much another such training would change. "
        "Made by `examples/finetune_study.py` from runs.csv.\n",
    ]
    for part in document["tables"]:
        parts.append(f"## {part['within']['subset']} training images\n")
        parts.append(
            "| attention, start | n | mean | sd | difference, points | 95 % interval | p | Holm p |"
        )
        parts.append("|---|---:|---:|---:|---:|---|---:|---:|")
        parts += [line(group) for group in part["groups"]]
        parts.append("")
        parts += [f"- {sentence}" for sentence in part["reading"]]
        parts.append("")
    return "\n".join(parts).replace(BASELINE, "plain").replace("start=", "")


def line(group: dict[str, Any]) -> str:
    """A group as a row of the table."""
    cells = [f"`{group['group']}`", str(group["n"]), f"{group['mean']:.2f}"]
    cells.append("-" if group["sd"] is None else f"{group['sd']:.2f}")
    low, high, adjusted = group["low"], group["high"], group["p_holm"]
    cells.append("-" if group["difference"] is None else f"{group['difference']:+.2f}")
    cells.append("-" if low is None else f"[{low:+.2f}, {high:+.2f}]")
    cells.append("-" if group["p"] is None else f"{group['p']:.3f}")
    cells.append("-" if adjusted is None else f"{adjusted:.3f}")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    usage, raw = (__doc__ or "").partition("\n")[0], argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=usage, formatter_class=raw)
    parser.add_argument("--data", default=os.environ.get("SPEM_DATA"), help="holds both sets")
    parser.add_argument("--first", default="cifar100", help="set, or folder, trained on first")
    parser.add_argument("--second", default="cifar10", help="set, or folder, fine-tuned on")
    parser.add_argument("--work", type=Path, default=Path("runs/finetune"), help="images, weights")
    parser.add_argument("--out", type=Path, default=Path("results/finetune"), help="tables")
    parser.add_argument("--model", default="timm:resnet10t", help="timm:NAME or torchvision:NAME")
    parser.add_argument("--size", type=int, default=32, help="side of the images")
    parser.add_argument("--first-epochs", type=int, default=3, help="epochs on the first set")
    parser.add_argument("--epochs", type=int, default=8, help="epochs of fine-tuning")
    parser.add_argument("--batch", type=int, default=64, help="images a step of fine-tuning")
    parser.add_argument("--subsets", type=int, nargs="+", default=[500, 2000], help="images")
    parser.add_argument("--seeds", type=int, default=6, help="paired seeds")
    parser.add_argument("--lr", type=float, default=0.01, help="rate of fine-tuning")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)

    weights = options.work / "first.safetensors"
    first = Settings(
        model=options.model,
        images=str(image_folder(options.first, options.data, options.work)),
        size=options.size,
        epochs=options.first_epochs,
        batch=min(128, options.batch * 2),
        lr=0.1,
        weight_decay=5e-4,
    )
    row = run(first, options.out / "first.csv", weights)
    first_name = row["images"]
    print(f"{first_name}: {row['accuracy']} % after {row['epochs']} epochs", flush=True)

    tuned = replace(
        first,
        images=str(image_folder(options.second, options.data, options.work)),
        weights=str(weights),
        epochs=options.epochs,
        batch=options.batch,
        lr=options.lr,
        weight_decay=1e-4,
    )
    table = options.out / "runs.csv"
    for seed in range(options.seeds):  # whole seeds first: what is there can be compared
        for subset in options.subsets:
            for attention, start in ARMS:
                settings = replace(
                    tuned, attention=attention, start=start, subset=subset, seed=seed
                )
                row = run(settings, table)
                print(
                    f"{subset} images, seed {seed}, {attention} {row['start']}: "
                    f"{row['accuracy']} % ({row['time_seconds']} s)",
                    flush=True,
                )
    (options.out / "summary.md").write_text(summary(table, first_name), encoding="utf-8")
    print(f"wrote {options.out / 'summary.md'}")


if __name__ == "__main__":
    main()
