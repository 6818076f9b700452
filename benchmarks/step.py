"""Times the training step of every attention module against the same network without attention.

One step = forward, cross entropy (+ 0.1 x penalty where a lambda is learned), backward, SGD. All
providers take turns within one run, so that a busy moment of the machine hits them alike: the
ratios are the result, the milliseconds belong to this machine only. Before anything is timed the
providers are checked; one that computes something else than it should ends the run.

    python benchmarks/step.py                   # depth 29, batch 128, about four minutes on 2 cores
    python benchmarks/step.py --quick           # does it run? depth 11, batch 8, nothing written
"""

import argparse
import copy
import csv
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from official_way import OfficialWay, official_penalty
from torch import Tensor, nn
from torch.nn import functional as F

import spem
from spem.models import Bottleneck

OFFICIAL = "official program's way"
CODE = "spem(form=code)"
ATTENTIONS = ("none", "scale", "se", "cbam", "eca", "srm", "sge", "spem", "spem(form=figure)", CODE)
PENALTY = 0.1
IMAGE = 32
DEFAULT_OUT = Path(__file__).parent / "results" / "step_cpu.csv"


@dataclass
class Provider:
    """One network with what its training step needs."""

    name: str
    model: nn.Module
    penalty: Callable[[nn.Module], Tensor] | None
    optimizer: torch.optim.Optimizer

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        loss = F.cross_entropy(self.model(images), labels)
        return loss if self.penalty is None else loss + PENALTY * self.penalty(self.model)

    def step(self, images: Tensor, labels: Tensor) -> float:
        """Trains on the batch once and returns the milliseconds it took."""
        start = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss(images, labels).backward()
        self.optimizer.step()
        return (time.perf_counter() - start) * 1e3


def provider(name: str, depth: int, dtype: torch.dtype = torch.float32) -> Provider:
    """Builds a network by the name of its attention; the official way takes the place of `code`."""
    attention = {"none": None, OFFICIAL: CODE}.get(name, name)
    model = spem.resnet(depth, attention=attention).to(dtype)
    spem.initialise(model, seed=0)
    penalty = spem.penalty if spem.learned_mixes(model) else None
    if name == OFFICIAL:
        use_official_way(model)
        penalty = official_penalty
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    return Provider(name, model, penalty, optimizer)


def use_official_way(model: nn.Module) -> None:
    """Puts the published computation in the place of every SPEM, with the SPEM's parameters."""
    for block in blocks_of(model):
        ours = block.attention
        assert isinstance(ours, spem.SPEM)
        theirs = OfficialWay(ours.channels).to(ours.w_e.dtype)
        with torch.no_grad():
            for target, source in paired_parameters(theirs, ours):
                target.copy_(source.view_as(target))
        # It has what a block asks of its attention, a method `tail`, without being one of ours.
        block.attention = theirs  # pyright: ignore[reportAttributeAccessIssue]


def blocks_of(model: nn.Module) -> list[Bottleneck]:
    return [module for module in model.modules() if isinstance(module, Bottleneck)]


def paired_parameters(
    theirs: nn.Module, ours: nn.Module
) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """The parameters that mean the same in the published module and in ours."""
    names = {"w1": "w_e", "b1": "b_e", "w2": "w_r", "b2": "b_r", "p": "pool.p"}
    return [(theirs.get_parameter(a), ours.get_parameter(b)) for a, b in names.items()]


def batch(size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size, 3, IMAGE, IMAGE, generator=generator, dtype=torch.float32)
    return images.to(dtype), torch.randint(10, (size,), generator=generator)


def check_official_way() -> None:
    """Compares the official way with form `code` in float64: logits, loss and every gradient."""
    ours = provider(CODE, 11, torch.float64)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in ours.model.parameters():  # at its start the gate is a constant
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.2 * noise)
    theirs = Provider(OFFICIAL, copy.deepcopy(ours.model), official_penalty, ours.optimizer)
    use_official_way(theirs.model)
    images, labels = batch(4, torch.float64)
    for p in (theirs, ours):
        p.loss(images, labels).backward()
    require_close(theirs.loss(images, labels), ours.loss(images, labels))
    require_close(theirs.model(images), ours.model(images))
    pairs = [
        pair
        for a, b in zip(blocks_of(theirs.model), blocks_of(ours.model), strict=True)
        if a.attention is not None and b.attention is not None
        for pair in paired_parameters(a.attention, b.attention)
    ]
    backbone = dict(ours.model.named_parameters())
    pairs += [(v, backbone[n]) for n, v in theirs.model.named_parameters() if n in backbone]
    if len(pairs) < len(backbone):
        sys.exit("benchmark: the official way lacks parameters of the network.")
    for target, source in pairs:
        assert target.grad is not None
        assert source.grad is not None
        require_close(target.grad, source.grad.view_as(target))


def require_close(found: Tensor, expected: Tensor) -> None:
    error = (found - expected).abs().max().item() / max(1e-12, expected.abs().max().item())
    if not error < 1e-9:
        sys.exit(f"benchmark: the official way and {CODE} differ (relative error {error:.1e}).")


def check_networks(providers: Sequence[Provider], blocks: int) -> None:
    """Every network has the plain one's backbone, and its attention in every block."""
    plain = providers[0].model.state_dict()
    for p in providers:
        state = p.model.state_dict()
        if not all(torch.equal(state[name], value) for name, value in plain.items()):
            sys.exit(f"benchmark: the backbone of {p.name} differs from the plain network's.")
        count = sum(block.attention is not None for block in blocks_of(p.model))
        if count != (0 if p.name == "none" else blocks):
            sys.exit(f"benchmark: {p.name} has {count} attention modules in {blocks} blocks.")


def measure(
    providers: Sequence[Provider], size: int, rounds: int, warm_up: int
) -> dict[str, list[float]]:
    """Round robin: one step of each provider per round, every round starts one further on."""
    images, labels = batch(size)
    times: dict[str, list[float]] = {p.name: [] for p in providers}
    for turn in range(-warm_up, rounds):
        shift = turn % len(providers)
        for p in [*providers[shift:], *providers[:shift]]:
            elapsed = p.step(images, labels)
            if turn >= 0:
                times[p.name].append(elapsed)
        note = "warming up" if turn < 0 else f"round {turn + 1} of {rounds}"
        print(f"\r{note}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    for p in providers:
        if not torch.isfinite(p.loss(images, labels)):
            sys.exit(f"benchmark: the loss of {p.name} is not finite, its times mean nothing.")
    return times


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The 20, 50 and 80 % quantiles."""
    q20, _, _, q80 = statistics.quantiles(values, n=5, method="inclusive")
    return q20, statistics.median(values), q80


def rows(
    providers: Sequence[Provider], times: dict[str, list[float]], facts: dict[str, object]
) -> list[dict[str, object]]:
    plain = times["none"]
    plain_parameters = parameters(providers[0].model)
    table = []
    for p in providers:
        low, middle, high = quantiles(times[p.name])
        per_round = [a / b for a, b in zip(times[p.name], plain, strict=True)]
        ratio_low, ratio_middle, ratio_high = quantiles(per_round)
        table.append(
            {
                "attention": p.name,
                "attention_parameters": parameters(p.model) - plain_parameters,
                "time_ms_q20": f"{low:.2f}",
                "time_ms_median": f"{middle:.2f}",
                "time_ms_q80": f"{high:.2f}",
                "ratio_of_medians": f"{middle / statistics.median(plain):.3f}",
                "round_ratio_q20": f"{ratio_low:.3f}",
                "round_ratio_median": f"{ratio_middle:.3f}",
                "round_ratio_q80": f"{ratio_high:.3f}",
                **facts,
            }
        )
    return table


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def facts_of_run(arguments: argparse.Namespace) -> dict[str, object]:
    return {
        "depth": arguments.depth,
        "batch": arguments.batch,
        "image": IMAGE,
        "precision": "fp32",
        "device": "cpu",
        "rounds": arguments.rounds,
        "threads": torch.get_num_threads(),
        "hardware": processor(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def processor() -> str:
    """The processor's name where the system tells it, else its architecture."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """The commit that is checked out, marked where the sources differ from it."""
    folder = Path(__file__).parent

    def git(*command: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *command], capture_output=True, text=True, check=False
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    name = git("rev-parse", "--short=12", "HEAD")
    changed = git("status", "--porcelain", "--", "../src", ".")
    return (name or "unknown") + ("+changes" if changed else "")


def show(table: Sequence[dict[str, object]]) -> None:
    columns = (
        ("attention", 24),
        ("time_ms_q20", 13),
        ("time_ms_median", 16),
        ("time_ms_q80", 13),
        ("ratio_of_medians", 18),
        ("round_ratio_median", 20),
    )
    print(
        "".join(f"{name:<{w}}" if i == 0 else f"{name:>{w}}" for i, (name, w) in enumerate(columns))
    )
    for row in table:
        cells = [(str(row[name]), width) for name, width in columns]
        print("".join(f"{c:<{w}}" if i == 0 else f"{c:>{w}}" for i, (c, w) in enumerate(cells)))


def write(table: Sequence[dict[str, object]], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    print(f"written: {out}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--depth", type=int, default=29)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15, help="timed steps per network")
    parser.add_argument("--warm-up", type=int, default=2, help="steps per network before those")
    parser.add_argument("--threads", type=int, default=0, help="0: what torch chooses")
    parser.add_argument("--out", type=Path, default=None, help=f"default: {DEFAULT_OUT.name}")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    found = parser.parse_args(arguments)
    if found.quick:
        found.depth, found.batch, found.rounds, found.warm_up = 11, 8, 3, 1
    elif found.out is None:
        found.out = DEFAULT_OUT
    if found.rounds < 2:
        parser.error(f"--rounds {found.rounds}: quantiles need at least 2 rounds")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = parse(arguments)
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    check_official_way()
    providers = [provider(name, chosen.depth) for name in (*ATTENTIONS, OFFICIAL)]
    check_networks(providers, blocks=(chosen.depth - 2) // 3)
    table = rows(
        providers,
        measure(providers, chosen.batch, chosen.rounds, chosen.warm_up),
        facts_of_run(chosen),
    )
    show(table)
    if chosen.out is not None:
        write(table, chosen.out)


if __name__ == "__main__":
    main()
