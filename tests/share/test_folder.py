"""save_pretrained, from_pretrained: the same network again, or a sentence that says why not."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from insert.hosts import scattered
from torch import nn

import spem
from spem.insert.attach import remembered
from spem.share import FILES, read_shared

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def same(a: nn.Module, b: nn.Module) -> bool:
    one, two = a.state_dict(), b.state_dict()
    tensors = list(one) == list(two) and all(torch.equal(one[k], two[k]) for k in one)
    x = X.to(next(a.parameters()).dtype)
    return tensors and torch.equal(a(x), b(x)) and not b.training


@pytest.mark.parametrize(
    ("spec", "dtype"),
    [
        ("none", torch.float16),
        ("spem", torch.bfloat16),
        ("se(pool=mix(0.3), reduction=8)", torch.float64),
        ("dia", torch.float32),
    ],
)
def test_our_networks_come_back(spec: str, dtype: torch.dtype, tmp_path: Path):
    depth, block = (20, "basic") if spec == "dia" else (11, "bottleneck")
    model = scattered(spem.resnet(depth, 7, attention=spec, block=block).to(dtype).eval())
    folder = spem.save_pretrained(model, tmp_path / "new" / "folder")
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    again = spem.from_pretrained(str(folder))
    assert {p.dtype for p in again.parameters()} == {dtype}
    assert same(model, again)


@pytest.mark.parametrize("wrap", [torch.compile, torch.nn.DataParallel])
def test_a_wrapped_network_is_the_one_inside(wrap: Any, tmp_path: Path):
    model = spem.resnet(11, 7, attention="se").eval()
    spem.save_pretrained(wrap(model), tmp_path)
    assert same(model, spem.from_pretrained(str(tmp_path)))


def timm_host(name: str = "test_resnet", **options: Any) -> Any:
    return pytest.importorskip("timm").create_model(name, pretrained=False, **options)


def test_a_timm_network_with_two_attentions_comes_back(tmp_path: Path):
    model = timm_host(num_classes=5)
    spem.attach(model, "spem", stages=[1, 2], fuse=True)
    spem.attach(model, "se(reduction=4)", stages=3, include="*.se", start="module")
    scattered(model.eval())
    before = torch.random.get_rng_state()
    again = spem.from_pretrained(spem.save_pretrained(model, tmp_path))
    assert torch.equal(before, torch.random.get_rng_state())  # no random numbers are drawn
    assert same(model, again)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["network"] == {
        "kind": "timm",
        "arch": "test_resnet",
        "options": {"num_classes": 5, "in_chans": 3, "global_pool": "avg"},
    }
    assert [call["attention"] for call in config["attach"]] == ["spem", "se(reduction=4)"]
    assert config["images"]["mean"] == list(model.pretrained_cfg["mean"])
    # what was rebuilt can be shared in its turn, and attention taken out is forgotten
    assert same(model, spem.from_pretrained(spem.save_pretrained(again, tmp_path / "again")))
    assert len(spem.detach(again)) > 0
    assert remembered(again) == []
    spem.save_pretrained(again, tmp_path / "plain")
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["attach"] == []


def test_a_torchvision_network_whose_layers_were_replaced_comes_back(tmp_path: Path):
    models = pytest.importorskip("torchvision.models")
    model = models.mobilenet_v3_small(num_classes=3)
    spem.attach(model, "se(pool=mix())", replace=True)
    scattered(model.eval())
    arguments: dict[str, Any] = {"arch": "torchvision:mobilenet_v3_small"}
    with pytest.raises(ValueError, match=r"'classifier.3.weight' has the shape \[3, 1024\]"):
        spem.save_pretrained(model, tmp_path, **arguments)
    assert list(tmp_path.iterdir()) == []
    arguments["options"] = {"num_classes": 3}
    again = spem.from_pretrained(spem.save_pretrained(model, tmp_path, **arguments))
    assert same(model, again)
    other = models.mobilenet_v3_small(num_classes=3).eval()
    with pytest.warns(UserWarning, match="do not go over"):
        spem.attach(other, "eca", replace=True)
    spem.from_pretrained(spem.save_pretrained(other, tmp_path, **arguments))  # without a warning


def test_attention_attached_to_a_part(tmp_path: Path):
    model = spem.resnet(11)
    spem.attach(model.layer2, "eca", where=None, input_shape=(1, 64, 8, 8))
    scattered(model.eval())
    assert same(model, spem.from_pretrained(spem.save_pretrained(model, tmp_path)))
    assert json.loads((tmp_path / "config.json").read_text())["attach"][0]["part"] == "layer2"


def changed(change: Callable[[Any], object]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = spem.resnet(11)
        change(model)
        return model

    return make


def by_rule(model: nn.Module) -> None:
    spem.attach(model, "se", where=lambda block: getattr(block, "bn3", None), start="module")


ours: Callable[[], nn.Module] = partial(spem.resnet, 11)
linear: Callable[[], nn.Module] = partial(nn.Linear, 2, 2)
ZERO = {"size": 32, "mean": [0, 0, 0], "std": [1, 1, 0]}


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (linear, {}, "Linear does not say what it is called. Pass arch="),
        (linear, {"arch": "resnet5"}, "unknown architecture 'resnet5'"),
        (linear, {"arch": "hf-hub:me/net"}, "unknown architecture"),
        (ours, {"arch": "resnet18"}, "has no arch= and options="),
        (timm_host, {"options": {"checkpoint_path": "x"}}, "no option 'checkpoint_path' here. Use"),
        (timm_host, {"options": {"in_chans": "3"}}, "in_chans='3' must be of type int"),
        (
            changed(lambda m: setattr(m, "fc", nn.Linear(256, 4))),
            {},
            r"spem.resnet, rebuilt, is another network: 'fc.weight' has the shape \[4, 256\]",
        ),
        (
            changed(lambda m: m.add_module("extra", nn.Linear(1, 1))),
            {},
            "also hold, and the network lacks, 'extra.bias' and 1 more",
        ),
        (changed(lambda m: m.fc.half()), {}, "torch.float16 and torch.float32. Convert it"),
        (changed(by_rule), {}, "attached with where=, a rule that no file can hold"),
        (ours, {"classes": ["cat"]}, "1 names of classes for 10 outputs"),
        (ours, {"images": {"size": 32}}, "images: missing value .*mean"),
        (ours, {"images": ZERO}, "is not a size with means and deviations"),
    ],
)
def test_what_cannot_be_made_again_is_not_written(
    make: Callable[[], nn.Module], arguments: dict[str, Any], message: str, tmp_path: Path
):
    with pytest.raises(ValueError, match=message):
        spem.save_pretrained(make(), tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_what_somebody_else_wrote_is_not_replaced(tmp_path: Path):
    for name, content in (("README.md", "mine"), ("config.json", "{}"), ("config.json", "[")):
        folder = tmp_path / f"{name}{content}"
        folder.mkdir()
        (folder / name).write_text(content)
        with pytest.raises(ValueError, match=rf"{name} is there and was not written by"):
            spem.save_pretrained(spem.resnet(11), folder)
        assert [path.name for path in folder.iterdir()] == [name]
        assert (folder / name).read_text() == content
    (tmp_path / "notes.txt").write_text("may stay")
    for classes in (3, 4):  # what it wrote itself it replaces
        spem.save_pretrained(spem.resnet(11, classes), tmp_path)
        assert spem.from_pretrained(tmp_path).classes == classes


def test_the_config_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """So a folder that has one is whole, whenever writing was interrupted."""
    names: list[str] = []
    replace = Path.replace

    def watched(self: Path, target: Path) -> Path:
        names.append(target.name)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    spem.save_pretrained(spem.resnet(11), tmp_path)
    assert names == ["model.safetensors", "README.md", "config.json"]


def test_equal_networks_give_equal_files(tmp_path: Path):
    """Byte for byte; safetensors alone orders its metadata anew in each call."""
    network = spem.resnet(11, attention="se")
    for number in range(5):
        spem.save_pretrained(network, tmp_path / f"{number}")
    for name in FILES:
        assert len({(tmp_path / f"{number}" / name).read_bytes() for number in range(5)}) == 1


@pytest.mark.filterwarnings("ignore")  # what torch says of its quantisation
def test_what_could_not_be_read_is_not_written(tmp_path: Path):
    numbers: Any = range(10)
    with pytest.raises(ValueError, match=r"save_pretrained: .*wrong value type for .*classes"):
        spem.save_pretrained(spem.resnet(11), tmp_path, classes=numbers)
    # Its state holds what is no tensor.
    smaller = torch.ao.quantization.quantize_dynamic(spem.resnet(11).eval(), {torch.nn.Linear})
    with pytest.raises(ValueError, match=r"save_pretrained: .* the weights lack"):
        spem.save_pretrained(smaller, tmp_path)
    assert not list(tmp_path.iterdir())


def test_class_names_are_counted(tmp_path: Path):
    models = pytest.importorskip("torchvision.models")
    nets = [(timm_host(num_classes=5), None, 5)]
    nets += [(models.mobilenet_v3_small(), "torchvision:mobilenet_v3_small", 1000)]
    for model, arch, count in nets:
        out = tmp_path / str(count)
        with pytest.raises(ValueError, match=f"2 names of classes for {count} outputs"):
            spem.save_pretrained(model, out, arch=arch, classes=["a", "b"])
        names = [str(k) for k in range(count)]
        spem.save_pretrained(model, out, arch=arch, classes=names)
        assert len(read_shared(out).classes) == count
        config = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(json.dumps({**config, "classes": ["a"]}))
        with pytest.raises(ValueError, match=f"1 names of classes for {count} outputs"):
            read_shared(out)


def test_what_the_images_and_classes_are_comes_back(tmp_path: Path):
    names = [f"class {k}" for k in range(4)]
    images = {"size": None, "mean": [0.5, 0.4, 0.3], "std": [1, 2, 3]}
    spem.save_pretrained(spem.resnet(11, 4), tmp_path, images=images, classes=names)
    shared = read_shared(tmp_path)
    assert shared.classes == tuple(names)
    assert shared.images is not None
    assert (shared.images.size, shared.images.mean, shared.images.std) == (
        None,
        (0.5, 0.4, 0.3),
        (1, 2, 3),
    )


# ---- outputs are compared: what has no parameters may not get lost either


def test_pooling_and_channels_are_read_off_the_network(tmp_path: Path):
    options = {"num_classes": 3, "in_chans": 4, "global_pool": "max"}
    model = scattered(timm_host(**options).eval())
    again = spem.from_pretrained(spem.save_pretrained(model, tmp_path))
    x = torch.randn(2, 4, 64, 64)
    assert torch.equal(model(x), again(x))
    assert json.loads((tmp_path / "config.json").read_text())["network"]["options"] == options


class SimAM(nn.Module):
    """Attention without parameters, by its formula."""

    def __init__(self, channels: int, **_: Any) -> None:
        super().__init__()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        square = (x - x.mean((2, 3), keepdim=True)) ** 2
        return x * torch.sigmoid(square / (4 * square.mean((2, 3), keepdim=True) + 4e-4) + 0.5)


def hidden_pool(model: Any) -> None:
    model.global_pool = nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten())


def blind_starts(model: Any) -> None:
    """Lets attention gate by another rule than it says."""
    spem.attach(model, "simam")
    for module in model.modules():
        if isinstance(module, spem.SimAM):
            module.gate = lambda x, module=module: spem.SimAM.gate(module, x) ** 2


def hook(model: Any) -> None:
    model.layer3.register_forward_hook(lambda *a: a[2].relu() + 1)


def epsilon(model: Any) -> None:
    model.layer4[0].bn1.eps = 1e-2


@pytest.mark.parametrize(
    ("name", "options", "change", "drawn"),
    [
        ("test_resnet", {}, hidden_pool, True),
        ("test_resnet", {}, blind_starts, True),
        ("test_resnet", {}, hook, True),
        ("test_resnet", {}, epsilon, True),
        ("test_resnet", {"act_layer": "silu"}, None, True),
        ("test_resnet", {"block_args": {"attn_layer": SimAM}}, None, True),
        # behind last norms of zero, and behind a layer scale of 1e-6
        ("test_resnet", {"block_args": {"attn_layer": SimAM}}, None, False),
        ("convnext_atto", {"act_layer": "silu"}, None, False),
    ],
)
def test_what_would_load_as_another_network_is_not_written(
    name: str, options: dict[str, Any], change: Any, drawn: bool, tmp_path: Path
):
    model = timm_host(name, **options).eval()
    if drawn:
        scattered(model)
    if change is not None:
        change(model)
    with pytest.raises(ValueError, match=r"computes other outputs: pass options= as it was built"):
        spem.save_pretrained(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
