"""`spem cost`: parameters, FLOPs and block tails of a network, ours or of timm or torchvision."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from spem.cli.output import print_json, print_table

if TYPE_CHECKING:
    from torch import nn

    from spem.cost import Cost, TailCost
    from spem.models import ResNet


def run(args: list[str]) -> None:
    """Run `spem cost` with these arguments."""
    import tyro
    from tyro.conf import Positional

    def cost(
        model: Positional[str],
        /,
        *,
        attention: str | None = None,
        fuse: bool = False,
        classes: int | None = None,
        size: int | None = None,
        batch: int = 1,
        device: Literal["cpu", "cuda"] = "cpu",
        precision: Literal["fp32", "bf16"] = "fp32",
        json: bool = False,
    ) -> None:
        """Count parameters and FLOPs of a network, layer by layer, and name what runs its tails.

        Needs no data.

        Args:
            model: resnet164 (bottleneck blocks, depth 9n+2), resnet-basic56 (basic blocks, depth
                6n+2), a .safetensors file of weights, or an architecture of another package, with
                its name: timm:resnet50, torchvision:resnet50.
            attention: Attention of a named network, such as spem or "se(reduction=8)"; none
                without this option. `spem.attach` puts it into those of other packages.
            fuse: Give timm's and torchvision's ResNets with attention the fused tail.
            classes: Outputs of a named network; without this option 10, or what the package has.
            size: Side of the square input in pixels; without this option 32, or what the
                architecture is made for.
            batch: Images in the batch.
            device: Device for which the implementation of the block tails is named; it need not be
                there.
            precision: Of the maps in these tails; a bf16 training has bfloat16 maps.
            json: Print JSON.
        """
        import torch

        from spem.cost import count

        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        if ":" in model:
            network, shape = _other(model, attention, classes, size, fuse=fuse)
            title = f"{model}, attention {attention or 'none'}"
        elif fuse:
            raise ValueError(f"cost: {model} is fused without --fuse. Leave it out.")
        else:
            network, side = build(model, attention, classes), 32 if size is None else size
            shape = (3, side, side)
            title = _title(network)
        result = count(network, (batch, *shape), device=device, dtype=dtype)
        _print(title, result, f"{device}, {precision}", json=json)

    tyro.cli(cost, prog="spem cost", args=args)


def build(model: str, attention: str | None, classes: int | None) -> "ResNet":
    """The network that MODEL names.

    Args:
        model: `resnet<depth>`, `resnet-basic<depth>` or the path of a .safetensors file.
        attention: Text of the attention; None for the plain network. Not for a file.
        classes: Number of outputs, None for 10. Not for a file.

    Raises:
        ValueError: The name is none of these, or an option contradicts the file.
    """
    from spem.attention import AttentionSpec
    from spem.models import resnet

    if model.endswith(".safetensors"):
        from spem.training.checkpoint import load_weights

        if attention is not None or classes is not None:
            raise ValueError(
                f"cost: {model} says itself which attention and how many classes it has. "
                "Leave --attention and --classes out."
            )
        return load_weights(Path(model))[0]
    match = re.fullmatch(r"resnet(-basic)?(\d+)", model)
    if match is None:
        raise ValueError(
            f"cost: unknown model {model!r}. Use resnet<depth> (bottleneck, such as resnet164), "
            "resnet-basic<depth> (such as resnet-basic56), a .safetensors file, or timm:NAME or "
            "torchvision:NAME."
        )
    spec = AttentionSpec.parse(attention or "none")
    block = "basic" if match[1] else "bottleneck"
    return resnet(int(match[2]), classes or 10, attention=spec, block=block)


def _other(
    model: str, attention: str | None, classes: int | None, size: int | None, *, fuse: bool
) -> tuple["nn.Module", tuple[int, ...]]:
    """An architecture of another package with attention, and the shape of its images."""
    from spem.insert import architectures, attach
    from spem.insert.sites import default_input

    options = {} if classes is None else {"num_classes": classes}
    network = architectures.build(model, options, asker="cost")
    shape = default_input(network)[1:] if size is None else (3, size, size)
    if attention not in (None, "none"):
        attach(network, attention, fuse=fuse, input_shape=(1, *shape))
    elif fuse:
        raise ValueError("cost: --fuse is for attention that --attention names.")
    return network, shape


def _title(network: "ResNet") -> str:
    from spem.attention import spec_text

    attention = spec_text(network.spec)
    blocks = f"ResNet-{network.depth}, {network.block} blocks"
    return f"{blocks}, attention {attention}, {network.classes} classes"


def _print(title: str, cost: "Cost", place: str, *, json: bool) -> None:
    if json:
        print_json({"model": title, **dataclasses.asdict(cost), "tails_for": place})
        return
    rows = [
        [row.name, row.kind, _shape(row.output), f"{row.parameters:,}", f"{row.flops:,}"]
        for row in cost.layers
    ]
    rows.append(["total", "", "", f"{cost.parameters:,}", f"{cost.flops:,}"])
    if any(row.attention for row in cost.layers):
        share = f"{cost.attention_parameters:,}", f"{cost.attention_flops:,}"
        rows.append(["of it attention", "", "", *share])
    columns = ["layer", "kind", "output", "parameters", "FLOPs"]
    print_table(columns, rows, align="lllrr", title=f"{title}, input {_shape(cost.input_shape)}")
    print()
    if cost.attention_parameters:
        share = 100 * cost.attention_parameters / cost.parameters
        print(f"Attention holds {share:.2f} % of the parameters.")
    print("FLOPs: 2 per multiply-add, convolutions and matrix products only, one forward pass.")
    print("They leave out norms, pooling and gates, so they say little about time.")
    print(_tails(cost.tails, place))


def _tails(tails: "Sequence[TailCost]", place: str) -> str:
    """What runs the tails, and the whole maps they move where that is known of all."""
    from spem.cost import tails_text
    from spem.ops.dispatch import SMALL

    lines = [f"On {place}: {tails_text(tails)}."]
    if any(tail.impl == "numba" for tail in tails):
        lines.append(f"Maps of fewer than {SMALL:,} values (small batches) are composed.")
    forward = [tail.forward_bytes for tail in tails if tail.forward_bytes is not None]
    backward = [tail.backward_bytes for tail in tails if tail.backward_bytes is not None]
    if len(forward) == len(backward) == len(tails):
        megabytes = f"{sum(forward) / 1e6:.1f} MB forward, {sum(backward) / 1e6:.1f} MB backward"
        lines.append(f"Whole maps they read and write, by a model: {megabytes}.")
    return "\n".join(lines)


def _shape(shape: tuple[int, ...] | None) -> str:
    return "-" if shape is None else " x ".join(map(str, shape))
