"""What folding costs a trained network, and what one more epoch gives back.

    python benchmarks/folding.py                     # weights of seed 0, some minutes each
    python benchmarks/folding.py --weights FOLDER

Each network is scored on CIFAR-10's test images as it is and with its gates folded (each held at
its mean over 1,000 training images). Both are then trained for one more epoch, at the last rate of
their run, and scored again. Rows go into results/cifar10/folding.csv.
"""

import argparse
import copy
import sys
from dataclasses import replace
from pathlib import Path

import torch
from record import Row, facts, write

import spem
from spem.data import NORMALISATION, load_images, normalise
from spem.training import evaluate
from spem.training.folder import read_weights
from spem.training.sets import epoch_batches
from spem.training.step import make_optimizer, make_step, map_dtype, set_rate

STUDY = Path(__file__).parents[1] / "results" / "cifar10"
SHOWN = 1000


def main() -> int:
    """Score, fold, train and score."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--weights", type=Path, default=STUDY / "weights")
    parser.add_argument("--root", help="folder that holds cifar10/ (default: $SPEM_DATA)")
    parser.add_argument("--out", type=Path, default=STUDY / "folding.csv")
    given = parser.parse_args()
    train = load_images("cifar10", "train", root=given.root)
    test = load_images("cifar10", "test", root=given.root)
    rows: list[Row] = []
    for path in sorted(given.weights.glob("*.safetensors")):
        found = read_weights(path)
        config, how = found.config, NORMALISATION[found.config.data.normalisation]
        if not any(isinstance(m, spem.attention.ChannelAttention) for m in found.network.modules()):
            continue
        # On a CPU, in the precision and at the rate with which training ended.
        runtime = replace(config.runtime, device="cpu", step="eager", impl=None)
        dtype = map_dtype(runtime)
        whole = found.network.eval().to(memory_format=torch.channels_last)
        folded = copy.deepcopy(whole)
        shown = normalise(train.images[:SHOWN], *how, torch.float32)
        report = spem.fold(folded, shown.contiguous(memory_format=torch.channels_last).split(250))
        for kind, model in (("attention", whole), ("folded", folded)):
            before = evaluate(model.eval(), test, normalisation=how).top1
            optimizer = make_optimizer(model.train(), config.optim)
            set_rate(optimizer, config.optim, config.optim.epochs - 1)
            step = make_step(model, optimizer, config.optim, runtime)
            batches = epoch_batches(
                train, config.data, config.seed, config.optim.epochs, batch=config.optim.batch
            )
            for images, labels in batches:
                x = normalise(images, *how, dtype)
                step(x.contiguous(memory_format=torch.channels_last), labels)
            after = evaluate(model.eval(), test, normalisation=how).top1
            rows.append(
                {
                    "network": path.stem,
                    "kind": kind,
                    "accuracy": f"{before:.2f}",
                    "accuracy_after_one_epoch": f"{after:.2f}",
                    "agreement": f"{report.agreement:.3f}" if kind == "folded" else "",
                    **facts(torch.device("cpu")),
                }
            )
            print(*list(rows[-1].values())[:5], flush=True)
            write(rows, given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
