"""What `spem.attach` does to networks of other libraries: sites, and how far outputs move.

    pip install segmentation-models-pytorch transformers diffusers monai ultralytics
    python benchmarks/attach_elsewhere.py

None of these libraries is a dependency; a network whose library is missing keeps the row it had.
`identity_difference` is the largest difference that attention makes with start="identity", relative
to the largest output, `folded_difference` the one that the library's own folding of norms makes in
the maps that the head gets once the attention acts, `restored` whether the network after `detach`
has the keys and the outputs it had. Nothing is timed.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from attach_table import outputs, scattered
from record import Row, read, write
from torch import Tensor, nn

import spem
from spem.export import difference
from spem.insert import IdentityStart
from spem.insert.sites import tensors
from spem.training.environment import commit

PATH = Path(__file__).parent / "results" / "attach_elsewhere.csv"
PHOTO, SCAN = (2, 3, 128, 128), (2, 1, 32, 32, 32)
Made = tuple[str, str, str, tuple[int, ...], Callable[[Any], nn.Module]]


def _transformers(kind: str, **options: Any) -> Callable[[Any], nn.Module]:
    def make(package: Any) -> nn.Module:
        config = getattr(package, f"{kind}Config")(num_labels=10, **options)
        return getattr(package, f"{kind}ForImageClassification")(config)

    return make


def _autoencoder(package: Any) -> nn.Module:
    down, up = (f"{way}Block2D" for way in ("DownEncoder", "UpDecoder"))
    return package.AutoencoderKL(
        block_out_channels=(32, 64), down_block_types=(down, down), up_block_types=(up, up)
    )


def _smp(kind: str, encoder: str) -> Made:
    def make(package: Any) -> nn.Module:
        return getattr(package, kind)(encoder, encoder_weights=None, classes=2)

    library = "segmentation-models-pytorch", "segmentation_models_pytorch"
    return (*library, f"{kind}, {encoder}", PHOTO, make)


def _hf(kind: str, **options: Any) -> Made:
    return "transformers", "transformers", kind, PHOTO, _transformers(kind, **options)


def _monai(name: str, make: Callable[[Any], nn.Module]) -> Made:
    return "monai", "monai.networks.nets", name, SCAN, make


def _yolo(name: str) -> Made:
    def make(package: Any) -> nn.Module:
        return package.DetectionModel(f"{name}.yaml", verbose=False)

    return "ultralytics", "ultralytics.nn.tasks", name, PHOTO, make


NETWORKS: tuple[Made, ...] = (
    _smp("Unet", "resnet34"),
    _smp("FPN", "efficientnet-b0"),
    _smp("DeepLabV3Plus", "mobilenet_v2"),
    _hf("ResNet"),
    _hf("RegNet"),
    _hf("ConvNext", depths=[1, 1, 3, 1]),
    _hf("MobileNetV2"),
    _hf("Bit"),
    ("diffusers", "diffusers", "AutoencoderKL", (2, 3, 32, 32), _autoencoder),
    _monai("UNet", lambda m: m.UNet(3, 1, 2, (8, 16, 32), (2, 2), num_res_units=2)),
    _monai("resnet18", lambda m: m.resnet18(spatial_dims=3, n_input_channels=1, num_classes=2)),
    _monai("SegResNet", lambda m: m.SegResNet(3, 8, 1, 2)),
    _monai("DynUNet", lambda m: m.DynUNet(3, 1, 2, [3] * 3, [1, 2, 2], [2, 2], res_block=True)),
    *(_yolo(name) for name in ("yolov8n", "yolo11n", "yolo12n", "yolo26n", "rtdetr-resnet50")),
)


def measured(host: nn.Module, shape: tuple[int, ...]) -> Row:
    """The cells of one row; the host is left as it is."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    before, model = outputs(host, x), copy.deepcopy(host)
    sites = spem.attach(model, "spem", input_shape=(1, *shape[1:]))
    starts = [module for module in model.modules() if isinstance(module, IdentityStart)]
    for number, start in enumerate(starts):
        scattered(start.inner, number)
    moved = difference(x.shape, before, outputs(model, x)).relative
    folded = ""
    if hasattr(model, "fuse"):
        acting = copy.deepcopy(model)
        for module in acting.modules():
            if isinstance(module, IdentityStart):
                nn.init.constant_(module.alpha, 0.5)
        expected = to_the_head(acting, x)
        acting.fuse(verbose=False)  # pyright: ignore[reportCallIssue]  # a method of these hosts
        folded = f"{difference(x.shape, expected, to_the_head(acting, x)).relative:.2g}"
    spem.detach(model)
    same = list(model.state_dict()) == list(host.state_dict())
    same &= difference(x.shape, before, outputs(model, x)).relative == 0
    cells = len(sites), sites[0], f"{moved:.2g}", folded, "yes" if same else "no"
    names = ("sites", "first_site", "identity_difference", "folded_difference", "restored")
    return dict(zip(names, map(str, cells), strict=True))


def to_the_head(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The maps that the head of a detector gets; what it makes of them is sorted and cut off."""
    layers = next(model.children())
    assert isinstance(layers, nn.Sequential)
    seen: list[Tensor] = []
    look: Callable[..., None] = lambda _, inputs: seen.extend(tensors(inputs))  # noqa: E731
    with layers[-1].register_forward_pre_hook(look):
        outputs(model, x)
    return seen


def main() -> int:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # what the hosts' libraries say about names of their own
    kept = {(row["library"], row["network"]): row for row in read(PATH)}
    rows: list[Row] = []
    for library, module, name, shape, make in NETWORKS:
        try:
            package = import_module(module)
        except ImportError as error:
            print(f"{library}: {error}", file=sys.stderr)
            rows += [kept[library, name]] if (library, name) in kept else []
            continue
        torch.manual_seed(0)
        row = {"library": library, "version": version(library), "network": name}
        row |= {"input": " x ".join(map(str, shape)), **measured(make(package).eval(), shape)}
        row |= {"torch": version("torch"), "commit": commit() or "installed"}
        rows.append(row | {"date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")})
        print(*row.values(), flush=True)
    write(rows, PATH)
    return 0


if __name__ == "__main__":
    sys.exit(main())
