"""save_pretrained, from_pretrained: the same network again, or a sentence that says why not."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import spem
from spem.hub import read_shared
from spem.insert.attached import remembered

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def scattered(model: nn.Module) -> nn.Module:
    """The model in evaluation mode with all its numbers moved, alpha of identity starts too."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
                tensor.mul_(1 + 0.2 * noise.abs()) if "var" in name else tensor.add_(0.1 * noise)
    return model.eval()


def same(a: nn.Module, b: nn.Module) -> bool:
    one, two = a.state_dict(), b.state_dict()
    tensors = list(one) == list(two) and all(torch.equal(one[k], two[k]) for k in one)
    x = X.to(next(a.parameters()).dtype)
    return tensors and torch.equal(a(x), b(x)) and not b.training


@pytest.mark.parametrize("spec", ["none", "spem", "se(pool=mix(0.3), reduction=8)", "dia", "srm"])
def test_our_networks_come_back(spec: str, tmp_path: Path):
    block = "basic" if spec == "dia" else "bottleneck"
    depth = 20 if block == "basic" else 11
    model = scattered(spem.resnet(depth, 7, attention=spec, block=block))
    folder = spem.save_pretrained(model, tmp_path / "new" / "folder")
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    assert same(model, spem.from_pretrained(folder))
    assert same(model, spem.from_pretrained(str(folder)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_dtype_stays(dtype: torch.dtype, tmp_path: Path):
    model = scattered(spem.resnet(11, attention="spem").to(dtype))
    again = spem.from_pretrained(spem.save_pretrained(model, tmp_path))
    assert {p.dtype for p in again.parameters()} == {dtype}
    assert same(model, again)


def timm_host(**options: Any) -> nn.Module:
    timm = pytest.importorskip("timm")
    return timm.create_model("test_resnet", pretrained=False, **options)


def timm_config(model: nn.Module) -> Any:
    return model.pretrained_cfg


def test_a_timm_network_with_two_attentions_comes_back(tmp_path: Path):
    model = timm_host(num_classes=5)
    spem.attach(model, "spem", stages=[1, 2], fuse=True)
    spem.attach(model, "se(reduction=4)", stages=3, include="*.se", start="module")
    scattered(model)
    again = spem.from_pretrained(spem.save_pretrained(model, tmp_path))
    assert same(model, again)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["network"] == {
        "kind": "timm",
        "arch": "test_resnet",
        "options": {"num_classes": 5},
    }
    assert [call["attention"] for call in config["attach"]] == ["spem", "se(reduction=4)"]
    assert config["images"]["mean"] == list(timm_config(model)["mean"])
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
    scattered(model)
    arguments: dict[str, Any] = {"arch": "torchvision:mobilenet_v3_small"}
    with pytest.raises(ValueError, match=r"'classifier.3.weight' has the shape \[3, 1024\]"):
        spem.save_pretrained(model, tmp_path, **arguments)
    assert list(tmp_path.iterdir()) == []
    arguments["options"] = {"num_classes": 3}
    again = spem.from_pretrained(spem.save_pretrained(model, tmp_path, **arguments))
    assert same(model, again)


def test_attention_attached_to_a_part(tmp_path: Path):
    model = spem.resnet(11)
    spem.attach(model.layer2, "eca", where=None, input_shape=(1, 64, 8, 8))
    scattered(model)
    assert same(model, spem.from_pretrained(spem.save_pretrained(model, tmp_path)))
    assert json.loads((tmp_path / "config.json").read_text())["attach"][0]["part"] == "layer2"


def changed(model: nn.Module, change: Callable[[Any], object]) -> nn.Module:
    change(model)
    return model


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (lambda: nn.Linear(2, 2), {}, "Linear does not say what it is called. Pass arch="),
        (lambda: nn.Linear(2, 2), {"arch": "resnet5"}, "unknown architecture 'resnet5'"),
        (lambda: nn.Linear(2, 2), {"arch": "hf-hub:me/net"}, "unknown architecture"),
        (lambda: spem.resnet(11), {"arch": "resnet18"}, "has no arch= and options="),
        (
            timm_host,
            {"options": {"checkpoint_path": "x.pth"}},
            "take no option 'checkpoint_path' here. Use num_classes",
        ),
        (timm_host, {"options": {"in_chans": "3"}}, "in_chans='3' must be of type int"),
        (
            lambda: changed(spem.resnet(11), lambda m: setattr(m, "fc", nn.Linear(256, 4))),
            {},
            r"spem.resnet, built anew, is another network: 'fc.weight' has the shape \[4, 256\]",
        ),
        (
            lambda: changed(spem.resnet(11), lambda m: m.add_module("extra", nn.Linear(1, 1))),
            {},
            "hold beside those of the network 'extra.bias' and 1 more",
        ),
        (
            lambda: changed(spem.resnet(11), lambda m: m.fc.half()),
            {},
            "tensors of torch.float16 and torch.float32. Convert it",
        ),
        (
            lambda: changed(
                spem.resnet(11),
                lambda m: spem.attach(
                    m, "se", where=lambda block: getattr(block, "bn3", None), start="module"
                ),
            ),
            {},
            "attached with where=, a rule that no file can hold",
        ),
        (lambda: spem.resnet(11), {"classes": ["cat"]}, "1 names of classes for 10 outputs"),
        (lambda: spem.resnet(11), {"images": {"size": 32}}, "images lacks the field 'mean'"),
        (
            lambda: spem.resnet(11),
            {"images": {"size": 32, "mean": [0, 0, 0], "std": [1, 1, 0]}},
            "is no size with means and deviations",
        ),
    ],
)
def test_what_cannot_be_made_again_is_not_written(
    make: Callable[[], nn.Module], arguments: dict[str, Any], message: str, tmp_path: Path
):
    with pytest.raises(ValueError, match=message):
        spem.save_pretrained(make(), tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = spem.resnet(11, attention="bam")  # which leaves the blocks' tails free
    spem.attach(model, "eca", stages=1)
    return spem.save_pretrained(model, tmp_path_factory.mktemp("written"))


def put(folder: Path, *, to: Path, weights: bytes | None = None, **fields: Any) -> Path:
    """A copy of a folder with another config; a new file of weights gets its right checksum."""
    config = json.loads((folder / "config.json").read_text())
    content = (folder / "model.safetensors").read_bytes() if weights is None else weights
    config["weights_sha256"] = hashlib.sha256(content).hexdigest()
    for key, value in fields.items():
        *path, last = key.split("__")
        table = config
        for part in path:
            table = table[int(part) if part.isdecimal() else part]
        table.pop(last) if value is ... else table.__setitem__(last, value)
    (to / "config.json").write_text(json.dumps(config))
    (to / "model.safetensors").write_bytes(content)
    return to


def test_the_copy_itself_is_read(written: Path, tmp_path: Path):
    assert same(spem.from_pretrained(written), spem.from_pretrained(put(written, to=tmp_path)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schema": 2}, "is of layout 2, this version of spem reads 1"),
        ({"schema": ...}, "is of layout None"),
        ({"auto_map": {"AutoModel": "code.py"}}, "has no field 'auto_map'"),
        ({"dtype": ...}, "lacks the field 'dtype'"),
        ({"dtype": "int8"}, "dtype='int8' is unknown"),
        ({"attach": {}}, "attach={} must be of type list"),
        ({"network": []}, r"network=\[\] must be of type dict"),
        ({"network__kind": "pickle"}, "unknown kind 'pickle'. Known: spem.resnet, timm"),
        ({"network__depth": "11"}, "depth='11' must be of type int"),
        ({"network__depth": True}, "depth=True must be of type int"),
        ({"network__depth": 12}, "depth=12 is not 9n"),
        ({"network__block": "wide"}, "block='wide' is unknown"),
        ({"network__attention": "spme"}, "unknown attention 'spme'"),
        ({"network__attention": "__import__('os').abort()"}, "cannot read attention"),
        ({"network__weights": "x.pth"}, "has no field 'weights'"),
        (
            {"network__attention": "se"},
            "the weights lack 'layer1.0.attention.attention.alpha' and 13",
        ),
        ({"attach": []}, "hold beside those of the network"),
        ({"network__classes": 4}, r"'fc.weight' has the shape \[10, 256\], the network's is"),
        ({"attach__0__part": "layer9"}, "no part of that name"),
        ({"attach__0__stages": ["1"]}, r"stages=\['1'\] must be a list of int"),
        ({"attach__0__where": "lambda m: m"}, "has no field 'where'"),
        ({"attach__0__start": "half"}, "start='half' is unknown"),
        ({"classes": ["a"]}, "1 names of classes for 10 outputs"),
        ({"images": {"size": 0, "mean": [0.5], "std": [1]}}, "is no size with means"),
        (
            {"network": {"kind": "timm", "arch": "resnet18", "options": {"pretrained": True}}},
            "take no option 'pretrained' here",
        ),
        (
            {"network": {"kind": "timm", "arch": "hf-hub:me/net", "options": {}}},
            "unknown architecture 'timm:hf-hub:me/net'",
        ),
    ],
)
def test_a_config_that_is_not_ours_is_refused(
    written: Path, fields: dict[str, Any], message: str, tmp_path: Path
):
    with pytest.raises(ValueError, match=message):
        spem.from_pretrained(put(written, to=tmp_path, **fields))


def test_weights_of_other_names_shapes_and_dtypes_are_refused(written: Path, tmp_path: Path):
    tensors = load_file(written / "model.safetensors")
    cases = {
        "lack 'fc.bias'": {k: v for k, v in tensors.items() if k != "fc.bias"},
        "network 'fc.extra'": {**tensors, "fc.extra": torch.zeros(1)},
        r"'fc.bias' has the shape \[3\]": {**tensors, "fc.bias": torch.zeros(3)},
        "'fc.bias' is of torch.float64": {**tensors, "fc.bias": tensors["fc.bias"].double()},
    }
    for message, content in cases.items():
        file = tmp_path / "new.safetensors"
        save_file(content, file)
        with pytest.raises(ValueError, match=message):
            spem.from_pretrained(put(written, to=tmp_path, weights=file.read_bytes()))


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("exploded"),)


def test_nothing_but_safetensors_is_read(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    bomb = pickle.dumps(Bomb())
    folder = put(written, to=tmp_path, weights=bomb)
    with pytest.raises(ValueError, match="is no safetensors file"):
        spem.from_pretrained(folder)
    folder = put(written, to=tmp_path)
    for name in ("pytorch_model.bin", "checkpoint.pt", "modeling.py", "hubconf.py"):
        (folder / name).write_bytes(bomb)
    spem.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no model\.safetensors"):
        spem.from_pretrained(folder)
    assert not Path("exploded").exists()


def test_damaged_files_are_refused(written: Path, tmp_path: Path):
    folder = put(written, to=tmp_path)
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-100] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"SHA-256 of model\.safetensors is not the one"):
        spem.from_pretrained(folder)
    for text in ("", "{", "[1]", "null", "[" * 100_000):
        (folder / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"is no JSON|is of layout None"):
            spem.from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        spem.from_pretrained(folder)


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
