"""from_pretrained on folders of strangers: one sentence, nothing executed, no memory taken."""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save

import spem


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


def timm(arch: str, **options: Any) -> dict[str, Any]:
    return {"network": {"kind": "timm", "arch": arch, "options": options}}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schema": 2}, "is of layout 2, this version of spem reads 1"),
        ({"auto_map": {"AutoModel": "code.py"}}, "can not match .auto_map. to any"),
        ({"dtype": ...}, 'missing value for field "dtype"'),
        ({"dtype": "int8"}, "dtype='int8' is unknown. Known: float32,"),
        ({"attach": 3}, "config.json: .* It takes schema"),
        ({"network__kind": "pickle"}, "unknown kind 'pickle'. Known: spem.resnet, timm"),
        ({"network__kind": []}, r"unknown kind \[\]"),
        ({"network__depth": "11"}, 'field "depth" - should be "int"'),
        ({"network__depth": True}, "depth=True is not 9n"),
        ({"network__block": "wide"}, "block='wide' is unknown"),
        ({"network__attention": "__import__('os').abort()"}, "cannot read attention"),
        ({"network__attention": "se"}, "weights lack 'layer1.0.attention.attention.alpha' and 13"),
        ({"attach": []}, "also hold, and the network lacks,"),
        ({"network__classes": 4}, r"'fc.weight' has the shape \[10, 256\], the network's is"),
        ({"attach__0__part": "layer9"}, "no part 'layer9'"),
        ({"attach__0__where": "lambda m: m"}, 'field "attach.where" - should be "bool"'),
        ({"attach__0__where": True}, "where=, a rule that no file can hold"),
        ({"attach__0__start": "half"}, "start='half' is unknown"),
        ({"attach__0__input_shape": [1, 3, 10**6, 10**6]}, "is not the shape of an input"),
        ({"attach__0__input_shape": []}, "is not the shape of an input"),
        ({"attach__0__input_shape": [1, 4, 8, 8]}, "does not run on an input of"),
        ({"classes": ["a"]}, "1 names of classes for 10 outputs"),
        ({"images": {"size": 0, "mean": [0.5], "std": [1]}}, "is not a size with means"),
        ({"images": {"size": 8, "mean": [0], "std": [float("nan")]}}, "is not a size with means"),
        # sizes are checked before anything is built
        ({"network__depth": 18_002}, "depth=18002 is too large for 1"),
        ({"network__classes": 10**30}, "describes no network that can be built"),
        ({"network__attention": "cbam(kernel=300001)"}, "the weights lack 'layer1.0.attention"),
        ({"network__attention": "gsop(dims=1000000000)"}, "describes no network that can be built"),
        ({"network__attention": "cbam(pools=5)"}, "pools=5 is not a tuple of pools"),
        (timm("resnet18", num_classes=10**9), "the weights lack 'layer1.0.se.alpha'"),
        (timm("vit_giant_patch14_224") | {"attach": []}, "the weights lack 'blocks.0.attn.proj"),
        (
            timm("vit_giant_patch14_224"),
            r"attention has 1,0\d\d,\d\d\d,\d\d\d numbers, the",
        ),
        # nothing that fetches, and no option that names a file
        (timm("resnet18", pretrained=True), "take no option 'pretrained' here"),
        (timm("hf-hub:me/net"), "unknown architecture 'timm:hf-hub:me/net'"),
        (timm("resnet10t.nosuch"), "timm:resnet10t.nosuch cannot be built at all: "),
        (timm("resnet18", global_pool="bogus"), "cannot be built with {'global_pool': 'bogus'}: "),
    ],
)
def test_a_config_that_is_not_ours_is_refused(
    written: Path, fields: dict[str, Any], message: str, tmp_path: Path
):
    with pytest.raises(ValueError, match=message):
        spem.from_pretrained(put(written, to=tmp_path, **fields))


def test_weights_of_other_names_shapes_and_dtypes_are_refused(written: Path, tmp_path: Path):
    tensors = load_file(written / "model.safetensors")
    bias = tensors["fc.bias"]
    cases = {
        "lack 'fc.bias'": {k: v for k, v in tensors.items() if k != "fc.bias"},
        "lacks, 'fc.extra'": {**tensors, "fc.extra": torch.zeros(1)},
        r"'fc.bias' has the shape \[3\]": {**tensors, "fc.bias": torch.zeros(3)},
        "'fc.bias' has the dtype torch.float64": {**tensors, "fc.bias": bias.double()},
    }
    for message, content in cases.items():
        folder = put(written, to=tmp_path, weights=save(content))
        with pytest.raises(ValueError, match=message):
            spem.from_pretrained(folder)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("exploded"),)


def test_nothing_but_safetensors_is_read(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    bomb = pickle.dumps(Bomb())
    folder = put(written, to=tmp_path, weights=bomb)
    with pytest.raises(ValueError, match="is not a safetensors file"):
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
        with pytest.raises(ValueError, match=r"is not JSON|is of layout None"):
            spem.from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        spem.from_pretrained(folder)
