"""`spem cost`: parameters, FLOPs and block tails of a network, stage by stage or in full."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any, Literal

from spem.cli.network import Named, load_network
from spem.cli.options import Json
from spem.cli.output import print_json, print_table, say, shown

if TYPE_CHECKING:
    from spem.cost import Cost, LayerCost


def run(
    network: Named,
    *,
    layers: Annotated[bool, "a row for every layer, not for every stage"] = False,
    fuse: Annotated[bool, "give blocks of timm and torchvision the fused tail"] = False,
    batch: Annotated[int, "N", "images in the batch"] = 1,
    device: Annotated[Literal["cpu", "cuda"], "name what runs the tails there"] = "cpu",
    precision: Annotated[Literal["fp32", "bf16"], "of their maps"] = "fp32",
    json: Json = False,
    **named: Annotated[Any, load_network],
) -> None:
    """Count parameters and FLOPs of a network. Needs no data."""
    import torch

    from spem.cost import count, tails_text

    found = load_network(network, fuse=fuse, **named)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    cost = count(found.model, found.shape(batch), device=device, dtype=dtype)
    place = f"{device}, {precision}"
    if json:
        print_json({"model": found.text, **dataclasses.asdict(cost), "tails_for": place})
        return
    parts = {row.name or row.kind: [row] for row in cost.layers} if layers else _stages(cost)
    rows: list[list[object]] = []
    for name, part in parts.items():
        output = next((row.output for row in reversed(part) if row.output is not None), None)
        flops = sum(row.flops for row in part) or None
        rows.append([name, output, sum(row.parameters for row in part), flops])
    rows.append(["total", "", cost.parameters, cost.flops or None])
    if any(row.attention for row in cost.layers):
        own = cost.attention_parameters, cost.attention_flops or None
        rows.append(["of it attention", "", *own])
    say(f"{found.text}, input {shown(cost.input_shape)}")
    print_table(["layer" if layers else "stage", "output", "parameters", "FLOPs"], rows)
    print()
    if cost.attention_parameters:
        share = 100 * cost.attention_parameters / cost.parameters
        say(f"Attention holds {share:.2f} % of the parameters.")
    say(
        "FLOPs: 2 per multiply-add of convolutions and matrix products, one forward pass. Norms,",
        "pooling and gates are not counted (-), so FLOPs say little about time.",
    )
    lines = [f"On {place}: {tails_text(cost.tails)}."]
    ahead, back = [t.forward_bytes for t in cost.tails], [t.backward_bytes for t in cost.tails]
    if cost.tails and None not in (*ahead, *back):
        forward, backward = (sum(filter(None, way)) / 1e6 for way in (ahead, back))
        megabytes = f"{forward:.1f} MB forward, {backward:.1f} MB backward"
        lines.append(f"Whole maps they read and write, by a model: {megabytes}.")
    say(*lines)
    if not layers:
        print(f"Every layer: spem cost {network} --layers")


def _stages(cost: Cost) -> dict[str, list[LayerCost]]:
    """The layers by the first part of their names, or two where it holds most of the network."""
    firsts = [row.name.partition(".")[0] for row in cost.layers]
    stages: dict[str, list[LayerCost]] = {}
    for row, first in zip(cost.layers, firsts, strict=True):
        # Containers such as `features` hold the whole network: their children are its stages.
        most = 2 * firsts.count(first) > len(firsts)
        name = ".".join(row.name.split(".")[: 2 if most else 1])
        stages.setdefault(name or "(itself)", []).append(row)
    return stages
