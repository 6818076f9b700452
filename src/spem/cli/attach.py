"""`spem attach`: where attention goes in a timm or torchvision network, and what it costs there."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Annotated, Any

from spem.cli.network import Named, Network, Size, Start, load_network
from spem.cli.options import Json
from spem.cli.output import print_json, print_table

_REPLACE = "put it in the place of attention that the network has"
_FUSE = "run norm, attention, addition and ReLU as one operation"


def run(
    network: Named,
    attention: Annotated[str, "ATTENTION", 'such as "se(reduction=8)"'] = "spem",
    *,
    include: Annotated[str | None, "PATTERN", "only sites of such names, as layer1*"] = None,
    stages: Annotated[Sequence[int], "N", "only these stages, from 1"] = (),
    replace: Annotated[bool, _REPLACE] = False,
    start: Annotated[Start, "how gates start, at one or as the module does"] = "identity",
    fuse: Annotated[bool, _FUSE] = False,
    size: Size = None,
    dry_run: Annotated[bool, "only list the sites"] = False,
    json: Json = False,
) -> None:
    """Where attention goes in a network: names for spem.attach, maps, parameters, FLOPs.

    Without --dry-run it is put in, too, and the outputs before and after are compared.
    """
    from spem.attention import create_attention
    from spem.insert import find_sites

    found = load_network(network, size=size)
    options: dict[str, Any] = {"include": include, "replace": replace, "start": start, "fuse": fuse}
    options |= {"stages": tuple(stages) or None, "input_shape": found.shape()}
    plain = sum(p.numel() for p in found.model.parameters())
    sites = find_sites(found.model, attention, **options)
    change = None if dry_run else _change(found, attention, options)
    tails = "not fused"
    if fuse:
        site = sites[0]
        on = None if site.shape is None else (site.shape[2], site.shape[3])
        built = create_attention(attention, site.channels, size=on, device="meta").eval()
        why = built.why_composed()
        tails = "fused" if why is None else f"composed ({why})"
    if json:
        told = {"model": network, "attention": attention, "plain_parameters": plain}
        told |= {"tails": tails, "change": change}
        print_json(told | {"sites": [dataclasses.asdict(site) for site in sites]})
        return
    rows: list[list[object]] = [
        [s.name, s.stage, s.block, f"{s.how} {s.layer}".strip(), s.shape, s.parameters, s.flops]
        for s in sites
    ]
    added, flops = (sum(getattr(site, k) or 0 for site in sites) for k in ("parameters", "flops"))
    rows.append([f"{len(sites)} sites", "", "", "", "", added, flops])
    columns = ["site", "stage", "block", "how", "map", "parameters", "FLOPs"]
    print_table(columns, rows, title=f"{network}, attention {attention}")
    share = f"{100 * added / plain:.2f} %"
    print(f"\nThe plain network has {plain:,} parameters; attention adds {share}.")
    print("FLOPs: 2 per multiply-add of convolutions and matrix products, one forward pass.")
    if start == "identity":
        print("The identity start adds one number a site, alpha.")
    print(f"Tails: {tails}.")
    if change is not None:
        print(f"Outputs before and after: largest difference {change:.3g}.")


def _change(found: Network, attention: str, options: dict[str, Any]) -> float:
    """The largest difference of the outputs that attention makes, on one random input."""
    import torch

    from spem.export import difference, tensors
    from spem.insert import attach
    from spem.share import open_scales

    network = found.model
    if found.random:  # of which timm's have branches that begin closed
        open_scales(network)
    shape = options["input_shape"]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = tensors(network(x))
        attach(network, attention, **options)
        change = difference(shape, before, tensors(network(x))).largest
    if not math.isfinite(change):
        raise ValueError(
            "the outputs with attention are not finite numbers, or of another shape than before. "
            "Look at the weights, or at a smaller part with --include."
        )
    return change
