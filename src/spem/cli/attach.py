"""`spem attach`: where attention goes in a timm or torchvision network, and what it costs there."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, Literal

from spem.cli.network import NETWORK_HELP, load_network
from spem.cli.options import Options, integer, one_of
from spem.cli.output import print_json, print_table

if TYPE_CHECKING:
    from torch import nn

    from spem.insert import Site


def options() -> Options:
    """What the command takes."""
    o = Options(
        "attach",
        "Where attention goes in a network: names for spem.attach, maps, parameters, FLOPs. "
        "Without --dry-run it is put in, too, and the outputs before and after are compared.",
    )
    o.add("network", "NETWORK", NETWORK_HELP)
    o.add("attention", "ATTENTION", 'such as "se(reduction=8)"', default="spem", count="?")
    o.add("--include", "PATTERN", "only sites of such names; * stands for any characters")
    o.add("--stages", "N", "only these stages, from 1", kind=integer(1), default=(), count="+")
    o.flag("--replace", "put it in the place of attention that the network has")
    kind = one_of("identity", "module")
    o.add(
        "--start",
        "identity|module",
        "how gates start, at one or as the module does",
        kind=kind,
        default="identity",
    )
    o.flag("--fuse", "run norm, attention, addition and ReLU as one operation")
    o.add("--size", "PIXELS", "side of its images; else what it is made for", kind=integer(1))
    o.flag("--dry-run", "only list the sites")
    return o.json()


def run(
    *,
    network: str,
    attention: str,
    include: str | None,
    stages: list[int],
    replace: bool,
    start: Literal["identity", "module"],
    fuse: bool,
    size: int | None,
    dry_run: bool,
    json: bool,
) -> None:
    """List the sites, put attention in, and say what that changed."""
    from spem import insert

    found = load_network(network, size=size)
    model = found.model
    plain = sum(p.numel() for p in model.parameters())
    options: dict[str, Any] = {
        "include": include,
        "stages": tuple(stages) or None,
        "replace": replace,
        "input_shape": found.shape(),
    }
    sites = insert.find_sites(model, attention, **options)
    options |= {"start": start, "fuse": fuse}
    # A dry run too reports what attach refuses.
    insert.attach(model, attention, **options, dry_run=True)
    change = None if dry_run else _change(model, attention, options)
    tails = _tails(attention, sites[0]) if fuse else "not fused"
    if json:
        print_json(
            {
                "model": network,
                "attention": attention,
                "plain_parameters": plain,
                "tails": tails,
                "change": change,
                "sites": [dataclasses.asdict(site) for site in sites],
            }
        )
        return
    _print(f"{network}, attention {attention}", sites, plain)
    if start == "identity":
        print("The identity start adds one number a site, alpha.")
    print(f"Tails: {tails}.")
    if change is not None:
        print(f"Outputs before and after: largest difference {change:.3g}.")


def _tails(attention: str, site: Site) -> str:
    """Whether the tails of fused blocks run as one operation, and why not."""
    from spem.attention import create_attention

    size = None if site.shape is None else (site.shape[2], site.shape[3])
    built = create_attention(attention, site.channels, size=size, device="meta").eval()
    why = built.why_composed()
    return "fused" if why is None else f"composed ({why})"


def _change(network: nn.Module, attention: str, options: dict[str, Any]) -> float:
    """The largest difference of the outputs that attention makes, on one random input."""
    import torch

    from spem import insert
    from spem.export import difference, tensors

    shape = options["input_shape"]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = tensors(network(x))
        insert.attach(network, attention, **options)
        found = difference(shape, before, tensors(network(x)))
    if not math.isfinite(found.largest):
        raise ValueError(
            "the outputs with attention are not finite numbers, or of another shape than before. "
            "Look at the weights, or at a smaller part with --include."
        )
    return found.largest


def _print(title: str, sites: list[Site], plain: int) -> None:
    rows = [
        [
            site.name,
            str(site.stage),
            site.block,
            f"{site.how} {site.layer}".strip(),
            "-" if site.shape is None else " x ".join(map(str, site.shape)),
            f"{site.parameters:,}",
            "-" if site.flops is None else f"{site.flops:,}",
        ]
        for site in sites
    ]
    added = sum(site.parameters or 0 for site in sites)
    flops = sum(site.flops or 0 for site in sites)
    rows.append([f"{len(sites)} sites", "", "", "", "", f"{added:,}", f"{flops:,}"])
    columns = ["site", "stage", "block", "how", "map", "parameters", "FLOPs"]
    print_table(columns, rows, align="lrlllrr", title=title)
    print()
    print(
        f"The plain network has {plain:,} parameters; attention adds {100 * added / plain:.2f} %."
    )
    print("FLOPs: 2 per multiply-add of convolutions and matrix products, one forward pass.")
