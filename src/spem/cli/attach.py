"""`spem attach`: where attention goes in a timm or torchvision network, and what it costs there."""

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

from spem.cli.output import print_json, print_table

if TYPE_CHECKING:
    from torch import nn

    from spem.insert import Site


def run(args: list[str]) -> None:
    """Run `spem attach` with these arguments."""
    import tyro
    from tyro.conf import Positional

    def attach(
        arch: Positional[str],
        attention: Positional[str] = "spem",
        /,
        *,
        include: str | None = None,
        stages: tuple[int, ...] = (),
        replace: bool = False,
        start: Literal["identity", "module"] = "identity",
        fuse: bool = False,
        size: int | None = None,
        dry_run: bool = False,
        json: bool = False,
    ) -> None:
        """List the sites of a network: names for spem.attach, maps, parameters and FLOPs.

        Without --dry-run attention is put in too, into random weights, and the outputs before and
        after are compared. Needs no data and loads no weights.

        Args:
            arch: Architecture of timm or torchvision, such as resnet50; torchvision:resnet50 names
                one of torchvision that timm has too.
            attention: Attention, such as spem or "se(reduction=8)".
            include: Wildcard pattern of site names.
            stages: Stages, from 1.
            replace: Put it in the place of the attention layers that the network has.
            start: How gates start, at one or as the module itself does.
            fuse: Run norm, attention, addition and ReLU as one operation.
            size: Side of the input in pixels; without it, what the architecture is made for.
            dry_run: Only list.
            json: Print JSON.
        """
        from spem import insert

        network = build(arch)
        plain = sum(p.numel() for p in network.parameters())
        options: dict[str, Any] = {
            "include": include,
            "stages": stages or None,
            "replace": replace,
            "input_shape": None if size is None else (1, 3, size, size),
        }
        sites = insert.find_sites(network, attention, **options)
        options |= {"start": start, "fuse": fuse}
        # What attach refuses is told in a dry run too.
        insert.attach(network, attention, **options, dry_run=True)
        change = None if dry_run else _change(network, attention, options)
        tails = _tails(attention, sites[0]) if fuse else "not fused"
        if json:
            rows = [dataclasses.asdict(site) for site in sites]
            print_json(
                {
                    "model": arch,
                    "attention": attention,
                    "plain_parameters": plain,
                    "tails": tails,
                    "change": change,
                    "sites": rows,
                }
            )
            return
        _print(f"{arch}, attention {attention}", sites, plain)
        if start == "identity":
            print("The identity start adds one number a site, alpha.")
        print(f"Tails: {tails}.")
        if change is not None:
            print(f"Outputs before and after, random weights: largest difference {change:.3g}.")

    tyro.cli(attach, prog="spem attach", args=args)


def build(arch: str) -> "nn.Module":
    """An architecture of timm or torchvision with random weights, in evaluation mode.

    Raises:
        ValueError: Neither knows the name; the message lists the nearest.
    """
    from spem.insert.architectures import build

    return build(arch, asker="attach")


def _tails(attention: str, site: "Site") -> str:
    """Whether the tails of fused blocks run as one operation, and why not."""
    from spem.attention import create_attention

    size = None if site.shape is None else (site.shape[2], site.shape[3])
    built = create_attention(attention, site.channels, size=size, device="meta").eval()
    why = built.why_composed()
    return "fused" if why is None else f"composed ({why})"


def _change(network: "nn.Module", attention: str, options: dict[str, Any]) -> float:
    """The largest difference of the outputs that attention makes, on one random input."""
    import torch

    from spem import insert
    from spem.insert.sites import default_input

    shape = options["input_shape"] or default_input(network)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = _tensors(network(x))
        insert.attach(network, attention, **options)
        after = _tensors(network(x))
    pairs = zip(before, after, strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs if a.numel() and a.shape == b.shape)


def _tensors(output: Any) -> list[Any]:
    """The tensors of an output, however it holds them."""
    from torch import Tensor

    if isinstance(output, Tensor):
        return [output.float()]
    values = output.values() if isinstance(output, dict) else output
    return [tensor for value in values for tensor in _tensors(value)]


def _print(title: str, sites: "list[Site]", plain: int) -> None:
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
    print("FLOPs: 2 per multiply-add, convolutions and matrix products only, one forward pass.")
