"""What attention costs: block tails, training steps of a ResNet-29, inference of ResNet-50.

    python benchmarks/speed.py                        # everything, half an hour
    python benchmarks/speed.py --only steps plain     # the pieces with these words in their names
    python benchmarks/speed.py --list

1.00 is plain PyTorch without attention at its fastest on this machine: for networks the fastest of
{contiguous, channels_last} x {fp32, bf16} x {eager, compiled}, which the pieces "plain" and
"compiled" find and every other piece times again beside its own; for tails norm, addition and ReLU,
the last two in place, in the layout and dtype of the row. All calls of a piece take turns, in an
order drawn for every round; ratios are medians of those within a round.

Steps are those that train (`make_step`); as `spem train` does, tails and steps in training keep
freed memory in the process. ResNet-50 is timm's, with the identity start and alpha = 0.5; in bf16
weights and images are cast, where steps run under autocast. `attached` and `composed` are torch's
operations, `fused` is the fused tail and `norm_relu`, `folded` what `spem.fold` leaves; `compiled`
goes through `torch.compile`.
"""

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from record import Row, facts, in_turns, read, write
from torch import Tensor, nn
from torch.nn import functional

import spem
from spem.insert import IdentityStart
from spem.ops import use_impl
from spem.training import OptimConfig, RuntimeConfig
from spem.training.step import keep_freed_memory, make_optimizer, make_step

RESULTS = Path(__file__).parent / "results"
ATTENTION = ("se", "eca", "spem")
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TRAINED = ("128x64x32x32", "128x128x16x16", "128x256x8x8")
INFERRED = ("256x56x56", "512x28x28", "1024x14x14", "2048x7x7")
Call = Callable[[], object]


class Piece(NamedTuple):
    """What is timed together."""

    table: str
    what: str
    dtype: str
    layout: str
    threads: int

    def __str__(self) -> str:
        return " ".join(map(str, self))


class Arm(NamedTuple):
    """One network or tail of a piece."""

    attention: str
    way: str
    dtype: str
    layout: str


def pieces(threads: int) -> list[Piece]:
    """All of them; inference first, since training keeps freed memory from then on."""
    numbers = range(1, threads + 1)
    found: list[Piece] = []
    for n, batch, layout in itertools.product(numbers, ("1", "8"), LAYOUTS):
        found.append(Piece("inference_tails", batch, "fp32", layout, n))
    for batch in ("1", "8"):
        found += network_pieces("inference", batch, threads)
    kinds = (("fp32", "contiguous"), ("fp32", "channels_last"), ("bf16", "channels_last"))
    found += [Piece("tails", "training", *given, n) for n in numbers for given in kinds]
    return found + network_pieces("steps", "128", threads)


def network_pieces(table: str, batch: str, threads: int) -> list[Piece]:
    """The plain networks first, since all others need the fastest."""
    kinds = list(itertools.product(DTYPES, LAYOUTS))
    found = [Piece(table, f"{batch} plain", "all", "all", threads)]
    found += [Piece(table, f"{batch} compiled", *kind, threads) for kind in kinds]
    if table == "inference":  # compiled code for a CPU is slow in contiguous maps
        found += [Piece(table, f"{batch} attention", *kind, threads) for kind in kinds[1::2]]
    return found + [Piece(table, batch, *kind, threads) for kind in kinds]


# Tails


def tail_rows(piece: Piece, rounds: int) -> list[Row]:
    """Tails of every map beside the plain one."""
    training = piece.table == "tails"
    if training:
        keep_freed_memory()
    rows: list[Row] = []
    for text in TRAINED if training else [f"{piece.what}x{shape}" for shape in INFERRED]:
        shape = tuple(map(int, text.split("x")))
        arms = [Arm("none", "plain", piece.dtype, piece.layout)]
        arms += [Arm(name, "fused", piece.dtype, piece.layout) for name in ("none", *ATTENTION)]
        calls = {arm: tail_call(arm, shape, training=training) for arm in arms}
        rows += rows_of(piece, text, calls, arms[0], rounds)
    return rows


def tail_call(arm: Arm, shape: tuple[int, ...], *, training: bool) -> Call:
    """Forward of a tail, and backward in training."""
    generator = torch.Generator().manual_seed(0)

    def draw() -> Tensor:
        x = torch.randn(shape, generator=generator).to(DTYPES[arm.dtype])
        return x.contiguous(memory_format=LAYOUTS[arm.layout])

    z, r, dy = draw(), draw(), draw()
    norm = nn.BatchNorm2d(shape[1]).train(training)
    module = None if arm.attention == "none" else spem.create_attention(arm.attention, shape[1])
    plain = arm.way == "plain"

    def forward() -> Tensor:
        if plain:
            return functional.relu_(norm(z).add_(r))
        return spem.ops.bn_gate_tail(z, r, norm) if module is None else module.tail(z, r, norm)

    if not training:
        return torch.inference_mode()(forward)
    inputs = [z.requires_grad_(), r.requires_grad_(), *norm.parameters()]
    inputs += [] if module is None else module.parameters()
    return lambda: torch.autograd.grad(forward(), inputs, dy)


# Training steps


def step_call(arm: Arm) -> Call:
    """A training step of a ResNet-29 at batch 128."""
    attention = None if arm.attention == "none" else arm.attention
    impl = None if arm.way == "fused" else "reference"
    runtime = RuntimeConfig(
        device="cpu",
        precision=cast("Any", arm.dtype),
        step="compile" if arm.way.endswith("compiled") else "eager",
        impl=cast("Any", impl),
    )
    layout = LAYOUTS[arm.layout]
    torch.manual_seed(0)
    model = cast("Any", spem.resnet(29, attention=attention)).to(memory_format=layout).train()
    optim = OptimConfig()
    step = make_step(model, make_optimizer(model, optim), optim, runtime)
    images = torch.randn(128, 3, 32, 32).to(DTYPES[arm.dtype]).contiguous(memory_format=layout)
    labels = torch.arange(128) % 10

    def call() -> None:
        with use_impl(impl):
            step(images, labels)

    return call


# Inference


def inference_call(arm: Arm, batch: int) -> Call:
    """A forward pass of ResNet-50 at 224 pixels."""
    timm: Any = __import__("timm")
    torch.manual_seed(0)
    # A last norm that starts at 0 would leave a branch without a value.
    model: Any = timm.create_model("resnet50", zero_init_last=False)
    if arm.attention != "none":
        spem.attach(model, arm.attention, fuse=arm.way.startswith("fused"))
        for module in model.modules():
            if isinstance(module, IdentityStart):
                nn.init.constant_(module.alpha, 0.5)
    if arm.way == "folded":
        spem.fold(model, [torch.randn(4, 3, 64, 64)])
    layout, dtype = LAYOUTS[arm.layout], DTYPES[arm.dtype]
    model = model.eval().to(dtype=dtype, memory_format=layout)
    x = torch.randn(batch, 3, 224, 224).to(dtype).contiguous(memory_format=layout)
    run = torch.compile(model, dynamic=False) if arm.way.endswith("compiled") else model

    def call() -> None:
        with torch.no_grad():
            run(x)

    return call


# Both


def network_rows(piece: Piece, rounds: int, kept: Sequence[Row]) -> list[Row]:
    """The plain networks, or those with attention beside the fastest plain one."""
    batch, _, kind = piece.what.partition(" ")
    network = "cifar:29" if piece.table == "steps" else "resnet50"
    if piece.table == "steps":
        keep_freed_memory()
    torch.compiler.reset()  # else the networks of several pieces reach dynamo's limit
    if kind == "plain":
        arms = [Arm("none", "plain", *way) for way in itertools.product(DTYPES, LAYOUTS)]
    elif kind == "compiled":
        arms = [fastest(piece, batch, kept, {"plain"})]
        arms.append(Arm("none", "plain, compiled", piece.dtype, piece.layout))
    else:
        arms = [fastest(piece, batch, kept, {"plain", "plain, compiled"})]
        ways, other = ("attached", "fused"), ("spem", "folded")
        if piece.table == "steps":
            ways, other = ("composed", "fused"), ("none", "fused")
        elif kind == "attention":
            ways, other = ("attached, compiled", "fused, compiled"), ("none", "plain")
        added = [*itertools.product(ATTENTION, ways), other]
        arms += [Arm(*way, piece.dtype, piece.layout) for way in added]
    if piece.table == "steps":
        calls = {arm: step_call(arm) for arm in arms}
    else:
        calls = {arm: inference_call(arm, int(batch)) for arm in arms}
    return rows_of(piece, network, calls, None if kind == "plain" else arms[0], rounds, batch)


def fastest(piece: Piece, batch: str, kept: Iterable[Row], ways: set[str]) -> Arm:
    """The fastest plain network of this machine, from the pieces that look for it."""
    machine = facts(torch.device("cpu"))["hardware"]
    known = [
        row
        for row in kept
        if (row["table"], row["batch"], row["hardware"]) == (piece.table, batch, machine)
        and row["way"] in ways
        and row["piece"].split()[2] in ("plain", "compiled")
    ]
    if not known:
        raise SystemExit(
            f"speed: no plain network has been timed on this machine for {piece}. First run "
            f"python benchmarks/speed.py --only {piece.table} {batch} plain"
        )
    row = min(known, key=lambda row: float(row["to_plain"]))
    return Arm(*(row[name] for name in Arm._fields))


def rows_of(
    piece: Piece,
    subject: str,
    calls: dict[Arm, Call],
    base: Arm | None,
    rounds: int,
    batch: str = "",
) -> list[Row]:
    """Rows of one map or network; without a base it is the fastest."""
    times = in_turns(calls, rounds)
    base = base or min(times, key=lambda arm: statistics.median(times[arm]))
    rows: list[Row] = []
    for arm, own in times.items():
        ratios = sorted(a / b for a, b in zip(own, times[base], strict=True))
        rows.append(
            {
                "table": piece.table,
                "subject": subject,
                "batch": batch or subject.partition("x")[0],
                **arm._asdict(),
                "threads": str(piece.threads),
                "time_ms": f"{statistics.median(own):.4g}",
                "to_plain": f"{statistics.median(ratios):.3f}",
                "to_plain_low": f"{ratios[len(ratios) // 5]:.3f}",
                "to_plain_high": f"{ratios[-1 - len(ratios) // 5]:.3f}",
                "plain": f"{base.way} {base.dtype} {base.layout}",
                "rounds": str(rounds),
                "piece": str(piece),
                **facts(torch.device("cpu")),
            }
        )
        shown = [rows[-1][k] for k in ("subject", *Arm._fields, "threads", "time_ms", "to_plain")]
        print(*shown, flush=True)
    return rows


def figure(rows: Sequence[Row], path: Path) -> None:
    """Ratios of every table; tails as the geometric mean over their maps."""
    import matplotlib as mpl

    from spem.reproduce.figures import colour

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "spem"
    from matplotlib import pyplot as plt

    titles = {
        "tails": "Block tails in training",
        "steps": "Training step, ResNet-29, batch 128",
        "inference_tails": "Block tails in inference",
        "inference": "Inference, ResNet-50 at 224",
    }
    names = ("none", *ATTENTION)
    markers = {"fused": "o", "composed": "x", "attached": "x", "folded": "s"}
    markers |= dict.fromkeys(("plain", "plain, compiled"), "|")
    markers |= dict.fromkeys(("attached, compiled", "fused, compiled"), "D")
    panels = {title: own for table, title in titles.items() if (own := _ratios(rows, table))}
    lines = [len({group for group, *_ in ratios}) for ratios in panels.values()]
    size = (6, 0.32 * sum(lines) + 3)
    figures, grid = plt.subplots(
        len(lines), squeeze=False, figsize=size, height_ratios=lines, layout="constrained"
    )
    axes = grid[:, 0]
    for ax, (title, ratios) in zip(axes, panels.items(), strict=True):
        groups = list(dict.fromkeys(group for group, *_ in ratios))
        for (group, name, way), values in ratios.items():
            # Compiled steps of a CPU are off the scale.
            x = min(statistics.geometric_mean(values), 3.0)
            y = groups.index(group) + 0.15 * (names.index(name) - 1.5)
            ax.plot(x, y, markers[way], color=colour(name), markersize=5)
        ax.axvline(1.0, color="0.3", linewidth=0.8)
        ax.set(title=title, yticks=range(len(groups)), yticklabels=groups, xlim=(0.3, 3.05))
        ax.invert_yaxis()
    axes[-1].set_xlabel("time / fastest plain (3 and more at 3)")
    for name in names:
        label = "no attention" if name == "none" else name
        axes[0].plot([], [], "o", color=colour(name), label=label)
    for label, marker in (("composed", "x"), ("compiled", "D"), ("folded", "s"), ("plain", "|")):
        axes[0].plot([], [], marker, color="0.3", linestyle="", label=label)
    figures.legend(loc="outside lower center", ncols=4, frameon=False)
    figures.savefig(path, metadata={"Date": None})
    plt.close(figures)


def _ratios(rows: Sequence[Row], table: str) -> dict[tuple[str, str, str], list[float]]:
    """Of each line of a panel, attention and way: the ratios of its maps."""
    found: dict[tuple[str, str, str], list[float]] = {}
    # Pieces that look for the fastest plain network have the fastest eager one as 1.00.
    looking = [row for row in rows if row["piece"].split()[2] in ("plain", "compiled")]
    for row in rows:
        if row["table"] == table and not (table.endswith("tails") and row["way"] == "plain"):
            scale = 1.0
            if row in looking:
                same = (r for r in looking if (r["table"], r["batch"]) == (table, row["batch"]))
                scale = min(float(r["to_plain"]) for r in same)
            group = f"{row['dtype']} {row['layout']}"
            if table.endswith("tails"):
                group += f", {row['threads']} thread{'s' * (row['threads'] != '1')}"
            if table.startswith("inference"):
                group = f"{row['batch']} image{'s' * (row['batch'] != '1')}, {group}"
            found.setdefault((group, row["attention"], row["way"]), []).append(
                float(row["to_plain"]) / scale
            )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Times what was asked for; rows of other pieces stay."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of speed.csv, speed.svg")
    parser.add_argument("--only", nargs="+", default=[], help="words that a piece's name has")
    parser.add_argument("--skip", nargs="+", default=[], help="words that it does not have")
    parser.add_argument("--list", action="store_true", help="show the pieces and end")
    parser.add_argument("--rounds", type=int, default=11, help="timed calls of each")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of networks")
    parser.add_argument("--figure", action="store_true", help="draw what there is and end")
    given = parser.parse_args(arguments)
    if given.rounds < 2 or given.threads < 1:
        parser.error("--rounds must be at least 2, --threads at least 1")
    only, skip = set(given.only), set(given.skip)
    words = {piece: set(str(piece).split()) for piece in pieces(given.threads)}
    chosen = [piece for piece, own in words.items() if only <= own and not skip & own]
    if not chosen:
        parser.error("no piece has the words of --only and none of --skip. See --list")
    if given.list:
        print(*chosen, sep="\n")
        return 0
    path: Path = given.out / "speed.csv"
    for piece in [] if given.figure else chosen:
        kept = read(path)
        torch.set_num_threads(piece.threads)
        print(f"-- {piece}", flush=True)
        if piece.table.endswith("tails"):
            rows = tail_rows(piece, given.rounds)
        else:
            rows = network_rows(piece, given.rounds, kept)
        write([*(row for row in kept if row["piece"] != str(piece)), *rows], path)
    figure(read(path), path.with_suffix(".svg"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
