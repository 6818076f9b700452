"""`spem export`."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from export.graphs import expected, loaded, maps, ran
from insert.hosts import scattered
from safetensors.torch import save_file
from torch import nn

import spem
from spem import cli
from spem.architectures import build
from spem.training import read_weights, save_weights

WEIGHTS = REPOSITORY / "tests" / "data" / "weights" / "spem-seed0.safetensors"


def call(args: list[str]) -> int:
    return cli.main(["export", *args])


def test_trained_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run's folder, and JSON."""
    (tmp_path / "model.safetensors").write_bytes(WEIGHTS.read_bytes())
    out = tmp_path / "model.onnx"
    assert call([str(tmp_path), "--out", str(out), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["operators"]["ReduceMax"] == 3
    assert document["differences"][0]["shape"] == [1, 3, 32, 32]
    model = read_weights(WEIGHTS).network
    x = maps(2, 3, 32, 32)
    error = abs(ran(out, x) - expected(model, x)).max()
    assert error < 1e-4 * abs(expected(model, x)).max()
    about = {entry.key: entry.value for entry in loaded(out).metadata_props}
    assert about["spem_data"] == "cifar10"
    assert about["spem_mean"].count(",") == 2


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The arguments that `to_onnx` is called with; nothing is exported."""
    found: dict[str, Any] = {}

    def record(model: nn.Module, path: Path, shape: object, **options: object) -> object:
        found.update(model=model, path=path, shape=shape, **options)
        difference = spem.export.Difference((1, 3, 8, 8), 1e-6, 2e-7)
        return spem.export.Exported(path, 1234, "fp32", 20, {"Conv": 3}, (difference,))

    monkeypatch.setattr("spem.export.to_onnx", record)
    return found


def test_an_architecture(
    told: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With attention, and with weights of the plain network, or of the one with attention."""
    pytest.importorskip("timm", reason="timm is not installed")
    arch, weights = "timm:mobilenetv3_small_050", tmp_path / "w.safetensors"
    model = scattered(build(arch))
    save_file(model.state_dict(), weights)
    out = str(tmp_path / "model.onnx")
    args = [arch, "--attention", "eca", "--out", out, "--weights", str(weights)]
    more = ["--dynamic-size", "--size", "64", "--opset", "18", "--start", "module"]
    assert call([*args, *more]) == 0
    assert (told["shape"], told["dynamic_size"], told["opset"]) == ((1, 3, 64, 64), True, 18)
    assert told["dynamic_batch"]
    assert len([part for part in told["model"].modules() if isinstance(part, spem.ECA)]) == 11
    text, notes = capsys.readouterr()
    assert notes == f"note: attention has no weights in {weights}, it is random\n"
    assert "1,234 bytes, fp32, opset 20" in text
    assert "operators: Conv 3" in text
    assert "largest difference 1e-06, 2e-07 of the largest output" in text

    # trained with an identity start, which the weights tell
    spem.attach(model, "eca", input_shape=(1, 3, 64, 64))
    alphas = [key for key, _ in model.named_parameters() if key.endswith("alpha")]
    for key in alphas:
        nn.init.constant_(model.get_parameter(key), 0.5)
    state = model.state_dict()
    save_file(state, weights)
    assert call([*args, "--fixed-batch"]) == 0
    assert (told["shape"], told["dynamic_batch"]) == ((1, 3, 224, 224), False)
    x = maps(1, 3, 64, 64)
    assert (expected(told["model"], x) == expected(model, x)).all()
    assert capsys.readouterr().err == ""
    for left_out, extra, message in (
        (alphas[0], [], f"lack {alphas[0]}. Name"),
        (None, ["--classes", "7"], "--classes that it was trained with"),
        (None, ["--attention", "none"], "hold blocks.0.0.bn2.attention."),
        ("bn1", [], "lack b"),
    ):
        part = {key: value for key, value in state.items() if (left_out or " ") not in key}
        save_file(part, weights)
        assert call([*args, *extra]) == 2
        assert message in capsys.readouterr().err


def test_packages_log_nothing_beside_the_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert call([str(WEIGHTS), "--opset", "9", "--out", str(tmp_path / "x.onnx")]) == 2
    assert "cannot be written with --opset 9, only with 18." in capsys.readouterr().err
    assert not [each for each in caplog.records if each.levelno >= logging.WARNING]


def test_what_is_not_trained_is_said(
    told: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("timm", reason="timm is not installed")
    args = ["timm:resnet10t", "--classes", "7", "--out", str(tmp_path / "x.onnx"), "--json"]
    assert call([*args, "--attention", "se"]) == 2  # an identity start: it would not be there
    assert "the file would hold no attention. Give --weights" in capsys.readouterr().err
    assert call([*args, "--attention", "se", "--start", "module"]) == 0
    assert told["model"].get_classifier().out_features == 7
    out, err = capsys.readouterr()
    assert json.loads(out)["bytes"] == 1234
    assert err == "note: timm:resnet10t has random weights\n"
    weights = tmp_path / "plain.safetensors"
    save_file(build("timm:resnet10t", {"num_classes": 7}).state_dict(), weights)
    with_weights = [*args, "--weights", str(weights)]
    assert call([*with_weights, "--attention", "se"]) == 2
    assert f"has no weights in {weights}" in capsys.readouterr().err
    assert call([*with_weights, "--attention", "se", "--start", "module"]) == 0
    assert "it is random" in capsys.readouterr().err
    assert call(with_weights) == 0
    assert call([*with_weights, "--attention", "simam", "--start", "module"]) == 0
    assert capsys.readouterr().err == ""  # no parameters, nothing that could be random


def test_the_size_that_a_set_has(
    told: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = read_weights(WEIGHTS)
    for name, side in (("digits", 16), ("cifar100", 32), ("mine", None)):
        data = dataclasses.replace(found.config.data, name=name, size=None)
        weights = tmp_path / f"{name}.safetensors"
        save_weights(found.network, dataclasses.replace(found.config, data=data), weights)
        args = [str(weights), "--out", str(tmp_path / "x.onnx")]
        if side is None:
            assert call(args) == 2
            assert "how large the images of mine were. Give --size" in capsys.readouterr().err
            args, side = [*args, "--size", "24"], 24
        assert call(args) == 0
        assert told["shape"] == (1, 3, side, side)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["resnet5"], "spem export: unknown architecture 'resnet5'. Did you mean resnet"),
        (["no.safetensors"], "spem export: there is no file no.safetensors"),
        (["{tmp}/out"], "this folder holds no run"),
        (["{tmp}/damaged.safetensors"], "is damaged"),
        ([str(WEIGHTS), "--attention", "se"], "--attention is for a named network"),
        (["resnet18", "--classes", "0"], "--classes: '0' is not a whole number"),
        (["resnet18", "--attention", "see"], "unknown attention 'see'"),
        (["resnet18", "--weights", "{tmp}/damaged.safetensors"], "no safetensors file"),
        ([str(WEIGHTS), "--opset", "4"], "--opset 4"),
    ],
)
def test_refused(
    args: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("timm", reason="timm is not installed")
    (tmp_path / "damaged.safetensors").write_bytes(b"nothing")
    folder = tmp_path / "out"
    folder.mkdir()
    given = [arg.replace("{tmp}", str(tmp_path)) for arg in args]
    assert call([*given, "--out", str(folder / "x.onnx")]) == 2
    assert message in capsys.readouterr().err
    assert not list(folder.iterdir())
