"""How far each parametrisation lets lambda move: 300 steps, written as CSV.

    python benchmarks/lambda_moves.py --out benchmarks/results/lambda_moves.csv

Two records. `network`: a ResNet of depth 11 with SPEM in its three blocks, on scikit-learn's
digits, SGD with momentum 0.9 and rate 0.1, penalty 0.1. `pull`: a mix alone whose loss is
strength * (lambda - 0.9)^2, so that it is known where lambda should go. `travelled` is the sum of
|change of lambda| over all steps so far, `size` that of the parameter behind lambda: |p|, or |l|.
"""

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import spem

# name: parametrisation, weight decay of lambda's parameter, coefficient of the penalty, its rate
ARMS = {
    "squares, published settings": ("squares", 1e-4, 0.1, 0.1),
    "squares": ("squares", 0.0, 0.1, 0.1),
    "squares, no penalty": ("squares", 0.0, 0.0, 0.1),
    "anchored": ("anchored", 0.0, 0.1, 0.1),
    "anchored, rate 1": ("anchored", 0.0, 0.1, 1.0),
    "sigmoid": ("sigmoid", 0.0, 0.1, 0.1),
    "sigmoid, rate 1": ("sigmoid", 0.0, 0.1, 1.0),
}
TARGET = 0.9
COLUMNS = ["record", "arm", "seed", "strength", "step", "block", "lambda", "travelled", "size"]
Row = dict[str, str | int | float]


class Watch:
    """The mixes of a model, and how far each lambda has travelled."""

    def __init__(self, model: nn.Module) -> None:
        self.mixes = [mix for _, mix in spem.learned_mixes(model)]
        self.last = self._lambdas()
        self.travelled = [0.0] * len(self.mixes)

    def _lambdas(self) -> list[float]:
        return [float(mix.lam.detach()) for mix in self.mixes]

    def step(self) -> None:
        now = self._lambdas()
        moved = [abs(a - b) for a, b in zip(now, self.last, strict=True)]
        self.travelled = [a + b for a, b in zip(self.travelled, moved, strict=True)]
        self.last = now

    def rows(self, record: str, arm: str, step: int, **more: int | float) -> Iterator[Row]:
        for block, mix in enumerate(self.mixes):
            yield {
                "record": record,
                "arm": arm,
                **more,
                "step": step,
                "block": block,
                "lambda": round(self.last[block], 6),
                "travelled": round(self.travelled[block], 6),
                "size": float(f"{float(mix.magnitude.detach()):.4g}"),
            }


def optimizer_of(model: nn.Module, decay: float, rate: float) -> torch.optim.Optimizer:
    if decay:  # the published program decays everything
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=decay)
    groups = spem.param_groups(model, lr=0.1, weight_decay=1e-4, mix_lr=rate)
    return torch.optim.SGD(groups, momentum=0.9)


def network(arm: str, seed: int, steps: int, every: int) -> Iterator[Row]:
    """SPEM in a network that is trained."""
    parametrization, decay, coefficient, rate = ARMS[arm]
    digits = spem.data.load_images("digits", "train", size=16)
    images, labels = digits.images / 127.5 - 1, digits.labels
    model = spem.resnet(11, attention=f"spem(pool=mix(parametrization={parametrization}))")
    spem.initialise(model, seed)
    optimizer, watch = optimizer_of(model, decay, rate), Watch(model)
    generator = spem.keyed_generator(seed, "batches")  # the same batches for every arm
    yield from watch.rows("network", arm, 0, seed=seed)
    for step in range(1, steps + 1):
        batch = torch.randint(len(labels), (32,), generator=generator)
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        (loss + coefficient * spem.penalty(model)).backward()
        optimizer.step()
        watch.step()
        if step % every == 0:
            yield from watch.rows("network", arm, step, seed=seed)


def pull(arm: str, strength: float, steps: int, every: int) -> Iterator[Row]:
    """A mix that nothing but its penalty and a loss with a known minimum moves."""
    parametrization, decay, coefficient, rate = ARMS[arm]
    module = spem.create_attention(f"se(pool=mix(parametrization={parametrization}))", 64)
    optimizer, watch = optimizer_of(module, decay, rate), Watch(module)
    yield from watch.rows("pull", arm, 0, strength=strength)
    for step in range(1, steps + 1):
        (mix,) = watch.mixes
        loss = strength * (mix.lam - TARGET).square()
        optimizer.zero_grad()
        (loss + coefficient * spem.penalty(module)).backward()
        optimizer.step()
        watch.step()
        if step % every == 0:
            yield from watch.rows("pull", arm, step, strength=strength)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("lambda_moves.csv"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--every", type=int, default=20, help="steps between two rows")
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with options.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        for arm in ARMS:
            for seed in range(options.seeds):
                writer.writerows(network(arm, seed, options.steps, options.every))
            for strength in (1.0, 0.01):
                writer.writerows(pull(arm, strength, options.steps, options.every))
            file.flush()
            print(f"{arm}: done")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
