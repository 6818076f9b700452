"""What `spem.attach` does to thirty architectures: sites, parameters, and how far outputs move.

    python benchmarks/attach_table.py            # goes on where it stopped
    python benchmarks/attach_table.py --retry    # also the rows that hold an error

Every parameter and running statistic of a host is drawn at random first, last norms included (some
libraries start those at zero, which hides every error in a branch), and so are the parameters of
the attention. `identity_difference` is the largest difference that attention makes with
start="identity", relative to the largest output; `onnx_difference` that between PyTorch and
onnxruntime once alpha is not zero.
A cell that a module cannot fill holds its error message. Nothing is timed.
"""
# ruff: noqa: BLE001  # an error of any type is a cell: the other rows are measured all the same

import argparse
import copy
import sys
import tempfile
import warnings
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from record import Row, read, write
from torch import Tensor, nn

import spem
from spem.architectures import build
from spem.export import difference, tensors, to_onnx
from spem.insert import IdentityStart
from spem.training.environment import commit

RESULTS = Path(__file__).parent / "results"
ATTENTIONS = ("spem", "se", "eca")
ARCHITECTURES = (
    "timm:resnet18",
    "torchvision:resnet50",
    "torchvision:resnext50_32x4d",
    "timm:seresnext26t_32x4d",
    "timm:resnetv2_18",
    "timm:res2net50_26w_4s",
    "timm:resnest14d",
    "timm:regnetx_002",
    "timm:regnety_002",
    "torchvision:regnet_y_400mf",
    "timm:densenet121",
    "timm:vgg11_bn",
    "timm:mobilenetv2_050",
    "timm:mobilenetv3_small_050",
    "timm:mobilenetv4_conv_small",
    "timm:efficientnet_b0",
    "timm:tf_efficientnetv2_b0",
    "timm:ghostnet_050",
    "timm:convnext_atto",
    "timm:dla46_c",
    "timm:hrnet_w18_small",
    "timm:cspresnet50",
    "timm:cspdarknet53",
    "timm:repvgg_a0",
    "timm:gernet_s",
    "timm:dpn48b",
    "timm:inception_v3",
    "timm:legacy_xception",
    "torchvision:shufflenet_v2_x0_5",
    "torchvision:squeezenet1_1",
)
CELLS = (
    *("plain_parameters", "sites", "added_parameters"),
    *("identity_difference", "onnx_difference"),
)
SIZES = {"timm:inception_v3": 96, "timm:legacy_xception": 96}
"""Sides of inputs larger than 64 pixels, where 64 leaves no map at the end."""


def scattered(model: nn.Module, seed: int) -> nn.Module:
    """The network with every parameter and running statistic drawn; maps stay of size one."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2 and parameter[0].numel() > 1:
                parameter.normal_(0.0, parameter[0].numel() ** -0.5, generator=rng)
            else:
                parameter.uniform_(0.4, 1.0, generator=rng)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0.0, 0.2, generator=rng)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5, generator=rng)
    return model


def measured(host: nn.Module, attention: str, size: int) -> Row:
    """The cells of one row; the host is left as it is."""
    plain = sum(p.numel() for p in host.parameters())
    row = {"plain_parameters": str(plain)}
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    before = outputs(host, x)
    model = copy.deepcopy(host)
    try:
        sites = spem.attach(model, attention, input_shape=(1, 3, size, size))
    except Exception as error:
        message = error_text(error)
        return row | dict.fromkeys(CELLS[1:], message)
    starts = [module for module in model.modules() if isinstance(module, IdentityStart)]
    for number, start in enumerate(starts):
        scattered(start.inner, number)
    row["sites"] = str(len(sites))
    row["added_parameters"] = str(sum(p.numel() for p in model.parameters()) - plain)
    try:
        moved = difference(x.shape, before, outputs(model, x)).relative
        row["identity_difference"] = f"{moved:.2g}"
    except Exception as error:
        row["identity_difference"] = error_text(error)
    row["onnx_difference"] = onnx_cell(model, starts, x) if attention == "spem" else ""
    return row


def onnx_cell(model: nn.Module, starts: list[IdentityStart], x: Tensor) -> str:
    """The largest relative difference between PyTorch and onnxruntime, with attention at work."""
    rng = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for start in starts:
            start.alpha.uniform_(0.4, 1.0, generator=rng)
    with tempfile.TemporaryDirectory() as folder:
        try:
            exported = to_onnx(model, Path(folder) / "model.onnx", example=x)
        except Exception as error:
            return error_text(error)
    return f"{max(found.relative for found in exported.differences):.2g}"


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return tensors(model(x))


def error_text(error: Exception) -> str:
    """An error as a cell: one line, with its type unless it is one of our own sentences."""
    text = " ".join(str(error).split())
    return text if type(error) is ValueError else f"{type(error).__name__}: {text}"


def isnumber(text: str) -> bool:
    """Whether a cell holds a finite number; messages begin with a name."""
    return text[:1].isdigit()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Plain)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of attach.csv")
    parser.add_argument("--retry", action="store_true", help="run rows with an error again")
    parser.add_argument("--only", nargs="*", help="these architectures alone")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # what the hosts' libraries say about names of their own
    path: Path = given.out / "attach.csv"
    rows = [row for row in read(path) if not (given.retry and row["note"])]
    done = {(row["architecture"], row["attention"]) for row in rows}
    for arch in given.only or ARCHITECTURES:
        wanted = [name for name in ATTENTIONS if (arch, name) not in done]
        if not wanted:
            continue
        size = SIZES.get(arch, 64)
        host: nn.Module | Exception
        try:
            host = scattered(build(arch, {"num_classes": 10}), 0).eval()
        except Exception as error:
            host = error
        for attention in wanted:
            try:
                if isinstance(host, Exception):
                    raise host
                cells = measured(host, attention, size)
            except Exception as error:
                cells = dict.fromkeys(CELLS, error_text(error))
            failed = not all(isnumber(cells[name]) or not cells[name] for name in cells)
            rows.append(
                {
                    "architecture": arch,
                    "attention": attention,
                    "size": str(size),
                    **cells,
                    "note": "failed" if failed else "",
                    **{name: version(name) for name in ("torch", "timm", "torchvision", "onnx")},
                    "onnxruntime": version("onnxruntime"),
                    "commit": commit() or "installed",
                    "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
                }
            )
            order = {(a, t): i for i, (a, t) in enumerate(_all())}
            rows.sort(
                key=lambda row: order.get((row["architecture"], row["attention"]), len(order))
            )
            write(rows, path)
            print(arch, attention, *cells.values(), flush=True)
    return 0


def _all() -> list[tuple[str, str]]:
    return [(arch, attention) for arch in ARCHITECTURES for attention in ATTENTIONS]


class Plain(argparse.RawDescriptionHelpFormatter):
    """The text above as it is written."""


if __name__ == "__main__":
    sys.exit(main())
