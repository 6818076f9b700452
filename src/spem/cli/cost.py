"""`spem cost`: parameters, FLOPs and block tails of a network, stage by stage or in full."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from spem.cli.network import add_network, load_network
from spem.cli.options import Options, integer, one_of
from spem.cli.output import print_json, print_table, say

if TYPE_CHECKING:
    from spem.cost import Cost, LayerCost, TailCost


def options() -> Options:
    """What the command takes."""
    o = Options("cost", "Count parameters and FLOPs of a network. Needs no data.")
    add_network(o, weights=False)
    o.flag("--layers", "a row for every layer, not for every stage")
    o.flag("--fuse", "give attention in networks of timm and torchvision the fused tail")
    o.add("--batch", "N", "images in the batch", kind=integer(1), default=1)
    device, precision = one_of("cpu", "cuda"), one_of("fp32", "bf16")
    o.add("--device", "cpu|cuda", "name what runs the tails there", kind=device, default="cpu")
    o.add("--precision", "fp32|bf16", "of their maps", kind=precision, default="fp32")
    return o.json()


def run(
    *,
    network: str,
    attention: str | None,
    classes: int | None,
    size: int | None,
    layers: bool,
    fuse: bool,
    batch: int,
    device: str,
    precision: str,
    json: bool,
) -> None:
    """Count, and print the table."""
    import torch

    from spem.cost import count

    found = load_network(network, attention=attention, classes=classes, size=size, fuse=fuse)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    try:
        cost = count(found.model, found.shape(batch=batch), device=device, dtype=dtype)
    except (RuntimeError, TypeError) as error:  # a network that does not take such an input
        said = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{network} does not run on an input {list(found.shape(batch=batch))}: {said}. "
            f"Give --size."
        ) from error
    place = f"{device}, {precision}"
    if json:
        print_json({"model": found.text, **dataclasses.asdict(cost), "tails_for": place})
        return
    rows = _layer_rows(cost) if layers else _stage_rows(cost)
    rows.append(["total", "", f"{cost.parameters:,}", _flops(cost.flops)])
    if any(row.attention for row in cost.layers):
        share = f"{cost.attention_parameters:,}", _flops(cost.attention_flops)
        rows.append(["of it attention", "", *share])
    columns = ["layer" if layers else "stage", "output", "parameters", "FLOPs"]
    say(f"{found.text}, input {_shape(cost.input_shape)}")
    print_table(columns, rows, align="llrr")
    print()
    if cost.attention_parameters:
        share = 100 * cost.attention_parameters / cost.parameters
        say(f"Attention holds {share:.2f} % of the parameters.")
    say(
        "FLOPs: 2 per multiply-add of convolutions and matrix products, one forward pass. Norms,",
        "pooling and gates are not counted (-), so FLOPs say little about time.",
    )
    say(*_tails(cost.tails, place))
    if not layers:
        print(f"Every layer: spem cost {network} --layers")


def _layer_rows(cost: Cost) -> list[list[str]]:
    return [
        [row.name or row.kind, _shape(row.output), f"{row.parameters:,}", _flops(row.flops)]
        for row in cost.layers
    ]


def _stage_rows(cost: Cost) -> list[list[str]]:
    """The layers summed by the first part of their names, with the output of the last of them."""
    stages: dict[str, list[LayerCost]] = {}
    for row in cost.layers:
        parts = row.name.split(".")
        # Containers such as `features` hold the whole network: their children are its stages.
        long = sum(other.name.split(".")[0] == parts[0] for other in cost.layers)
        deep = 2 * long > len(cost.layers) and len(parts) > 1
        stages.setdefault(".".join(parts[: 2 if deep else 1]), []).append(row)
    return [
        [
            name or "(itself)",
            next((_shape(row.output) for row in reversed(rows) if row.output is not None), "-"),
            f"{sum(row.parameters for row in rows):,}",
            _flops(sum(row.flops for row in rows)),
        ]
        for name, rows in stages.items()
    ]


def _tails(tails: Sequence[TailCost], place: str) -> list[str]:
    """What runs the tails, and the whole maps they move where that is known of all."""
    from spem.cost import tails_text

    lines = [f"On {place}: {tails_text(tails)}."]
    forward = [tail.forward_bytes for tail in tails if tail.forward_bytes is not None]
    backward = [tail.backward_bytes for tail in tails if tail.backward_bytes is not None]
    if tails and len(forward) == len(backward) == len(tails):
        megabytes = f"{sum(forward) / 1e6:.1f} MB forward, {sum(backward) / 1e6:.1f} MB backward"
        lines.append(f"Whole maps they read and write, by a model: {megabytes}.")
    return lines


def _flops(flops: int) -> str:
    return f"{flops:,}" if flops else "-"


def _shape(shape: tuple[int, ...] | None) -> str:
    return "-" if shape is None else " x ".join(map(str, shape))
