"""ResNet-50 at 224 pixels with attention: plain, timm's own layers, attached, attached and fused.

    python benchmarks/resnet50.py            # batch 1 and 32, inference and training
    python benchmarks/resnet50.py --quick    # 64 pixels, batch 2: shows that everything runs

All networks are timm's resnet50 with 1000 classes. `timm` has its attention from timm's own
attn_layer, after the last norm of a block; `attached` is what `spem.attach` puts there, with the
identity start, alpha at 0.5; `fused` is the same with `fuse=True`.
Both must give the same outputs before they are timed. The networks take turns within every round,
in an order drawn anew; ratios to the plain network are stated as that of the medians and as the
median of those within a round. A training step is forward, cross-entropy, backward, SGD with
momentum. All nine networks are held at once, gradients and maps of one alone.
"""

import argparse
import copy
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from attach_table import Plain
from record import Row, facts, in_turns, time_columns, write
from torch import Tensor, nn
from torch.nn import functional as F

import spem
from spem.insert import IdentityStart

RESULTS = Path(__file__).parent / "results"
COMPOSED, TIMM, ATTACHED, FUSED = "composed", "timm", "attached", "fused"


class Subject(NamedTuple):
    """An attention, and how it came into the network."""

    attention: str
    way: str

    def __str__(self) -> str:
        return f"{self.attention}, {self.way}"


SUBJECTS = (
    Subject("none", COMPOSED),
    *(Subject(name, TIMM) for name in ("se", "eca")),
    *(Subject(name, way) for name in ("spem", "se", "eca") for way in (ATTACHED, FUSED)),
)
MODES = ("inference", "training")
GIB_HELD, GIB_AN_IMAGE = 3.0, 0.2
"""Weights and momentum of all networks; what a training step of one keeps of a 224 x 224 image."""


def network(subject: Subject) -> nn.Module:
    """A network with attention at work; the seed is the same for all."""
    timm: Any = __import__("timm")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"block_args": {"attn_layer": subject.attention}} if subject.way == TIMM else {}
        # Last norms that start at zero would hide a branch from the comparison below.
        model: nn.Module = timm.create_model("resnet50", zero_init_last=False, **options)
    if subject.way != TIMM and subject.attention != "none":
        spem.attach(model, subject.attention, fuse=subject.way == FUSED)
        for module in model.modules():
            if isinstance(module, IdentityStart):
                nn.init.constant_(module.alpha, 0.5)
    return model


def compare(networks: dict[Subject, nn.Module]) -> None:
    """Ends the run if a fused network is not the composed one."""
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    for subject, fused in networks.items():
        if subject.way != FUSED:
            continue
        attached = networks[Subject(subject.attention, ATTACHED)]
        for training in (True, False):
            # Copies: running statistics of what is timed stay as they are.
            pair = [copy.deepcopy(model).train(training)(x).detach() for model in (attached, fused)]
            apart = float((pair[0] - pair[1]).abs().max() / pair[0].abs().max())
            if not apart < 1e-3:
                raise SystemExit(f"resnet50: {subject} differs from attached by {apart:.2g}.")


def call(model: nn.Module, x: Tensor, mode: str) -> Callable[[], object]:
    """What is timed: a forward pass, or a step whose gradients are given back at its end."""
    labels = torch.arange(len(x))
    groups = spem.param_groups(model, lr=1e-6, weight_decay=1e-4)
    optimizer = torch.optim.SGD(groups, momentum=0.9)

    def infer() -> None:
        model.eval()
        with torch.no_grad():
            model(x)

    def step() -> None:
        model.train()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step if mode == "training" else infer


def measured(
    networks: dict[Subject, nn.Module], mode: str, batch: int, size: int, rounds: int
) -> list[Row]:
    """The rows of one mode and batch."""
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(2))
    calls = {str(subject): call(model, x, mode) for subject, model in networks.items()}
    times = in_turns(calls, rounds)
    plain = times[str(Subject("none", COMPOSED))]
    told = {**facts(torch.device("cpu")), "timm": version("timm")}
    return [
        {
            "attention": subject.attention,
            "way": subject.way,
            "mode": mode,
            "batch": str(batch),
            "image": str(size),
            "parameters": str(sum(p.numel() for p in model.parameters())),
            **time_columns(times[str(subject)], plain),
            "rounds": str(rounds),
            **told,
        }
        for subject, model in networks.items()
    ]


def need_memory(batch: int, size: int) -> None:
    """Ends the run before it starts where memory will not do; says nothing where none is told."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return
    told = dict(line.split(":") for line in lines)
    free = int(told["MemAvailable"].split()[0]) / 2**20
    need = GIB_HELD + GIB_AN_IMAGE * batch * (size / 224) ** 2
    if free < need:
        raise SystemExit(
            f"resnet50: some {need:.0f} GiB are needed, {free:.0f} are free. "
            f"Give smaller --batches."
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Plain)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of resnet50_cpu.csv")
    parser.add_argument("--rounds", type=int, default=7, help="timed calls of each network")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32], help="images a call")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's choice")
    parser.add_argument("--quick", action="store_true", help="64 pixels, batch 2, 2 rounds")
    given = parser.parse_args(arguments)
    if given.rounds < 2 or min(given.batches) < 1:
        parser.error("--rounds must be at least 2, --batches at least 1")
    size, batches, rounds = 224, given.batches, given.rounds
    if given.quick:
        size, batches, rounds = 64, [2], 2
    need_memory(max(batches), size)
    if importlib.util.find_spec("numba") is None:
        raise SystemExit("resnet50: nothing here is fused: numba is not installed.")
    if given.threads:
        torch.set_num_threads(given.threads)
    path: Path = given.out / "resnet50_cpu.csv"
    rows: list[Row] = []
    networks = {subject: network(subject) for subject in SUBJECTS}
    compare(networks)
    for mode in MODES:
        for batch in batches:
            rows += measured(networks, mode, batch, size, rounds)
            write(rows, path)
            for row in rows[-len(networks) :]:
                cells = [row[k] for k in ("attention", "way", "mode", "batch")]
                print(*cells, row["time_ms_median"], row["to_plain_rounds_median"], flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
