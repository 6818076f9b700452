"""What `to_onnx` does not write: graphs that are not the network, and inputs that make no sense."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from export.graphs import module, network
from torch import Tensor, nn

import spem
from spem.export import to_onnx


class Baked(nn.Module):
    """A mean whose graph holds the number of pixels, or of images, of an 8 x 8 example."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: Tensor) -> Tensor:
        batch = 2 if self.what == "batch" and torch.compiler.is_exporting() else x.shape[0]
        pixels = 64 if self.what == "size" and torch.compiler.is_exporting() else x[0, 0].numel()
        return x.sum((2, 3)) / pixels + batch


@pytest.mark.parametrize(
    ("what", "shape"), [("batch", r"\[1, 4, 8, 8\]"), ("size", r"\[2, 4, 40, 72\]")]
)
def test_a_graph_that_holds_the_examples_size(what: str, shape: str, tmp_path: Path) -> None:
    path = tmp_path / "baked.onnx"
    path.write_bytes(b"an older file")
    with pytest.raises(ValueError, match=f"graph of Baked on {shape} differs from PyTorch by"):
        to_onnx(Baked(what), path, (2, 4, 8, 8), dynamic_size=True)
    assert path.read_bytes() == b"an older file"
    assert list(tmp_path.iterdir()) == [path]
    fixed = to_onnx(Baked(what), path, (2, 4, 8, 8), dynamic_batch=False)
    assert [found.shape for found in fixed.differences] == [(2, 4, 8, 8)]
    assert path.stat().st_size == fixed.bytes


def test_a_network_that_gives_no_numbers(tmp_path: Path) -> None:
    model = network(module("se", 16))
    nn.init.constant_(model.fc.bias, float("nan"))
    with pytest.raises(ValueError, match=r"outputs of Network .*are not finite.*check=False"):
        to_onnx(model, tmp_path / "nan.onnx", (1, 3, 8, 8))
    assert not list(tmp_path.iterdir())


def test_a_network_that_is_tied_to_its_size(tmp_path: Path) -> None:
    tied = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 2))
    refused = r"Sequential (cannot be exported with a dynamic height|does not run on an input)"
    with pytest.raises(ValueError, match=rf"{refused}.* Leave dynamic_size=True out"):
        to_onnx(tied, tmp_path / "tied.onnx", (1, 3, 8, 8), dynamic_size=True)
    with pytest.raises(ValueError, match=r"with a dynamic batch: .* Pass dynamic_batch=False"):
        to_onnx(nn.Sequential(nn.Unflatten(0, (1, 2))), tmp_path / "t.onnx", (2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"does not run on an input \[1, 3, 8, 9\]: "):
        to_onnx(tied, tmp_path / "tied.onnx", (1, 3, 8, 9), dynamic_batch=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"precision": "int8"}, "precision='int8' is unknown. Use 'fp32' or 'fp16'"),
        ({"input_shape": (1, 4)}, r"\[1, 4\] is not the shape of an input"),
        ({"input_shape": (0, 3, 8, 8)}, r"\[0, 3, 8, 8\] is not the shape of an input"),
        ({"input_shape": (1, 5, 8, 8)}, "SE: built for channels=16, got a map with 5 channels"),
        ({"example": torch.ones(1, 16, 8, 8, dtype=torch.int64)}, "floating-point maps"),
        ({"tolerance": "1", "input_shape": (1, 16, 8, 8)}, "tolerance='1' is not a finite number"),
        ({"opset": 3, "input_shape": (1, 16, 8, 8)}, "opset=3"),
    ],
)
def test_bad_input(arguments: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        to_onnx(spem.SE(16), tmp_path / "se.onnx", **arguments)
    assert not list(tmp_path.iterdir())


def test_networks_that_cannot_be_copied(tmp_path: Path) -> None:
    """One that has kept an activation with its graph, one without values."""
    kept = network(module("se", 16))
    kept.last = kept(torch.randn(1, 3, 8, 8))
    for model in (kept, network(module("se", 16)).to("meta")):
        with pytest.raises(ValueError, match=r"to_onnx: .* cannot be copied to the CPU"):
            to_onnx(model, tmp_path / "kept.onnx", (1, 3, 8, 8))
    assert not list(tmp_path.iterdir())


def test_a_network_of_two_inputs(tmp_path: Path) -> None:
    """No option of the export is named as the remedy."""
    with pytest.raises(ValueError, match=r"Bilinear does not run on an input .*input2'\.$"):
        to_onnx(nn.Bilinear(3, 3, 3), tmp_path / "two.onnx", (1, 3, 8, 3))


def test_no_folder_and_no_module(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere"):
        to_onnx(spem.SE(16), tmp_path / "nowhere" / "se.onnx")
    with pytest.raises(TypeError, match=r"needs a torch.nn.Module, got str"):
        to_onnx("se", tmp_path / "se.onnx")


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        to_onnx(spem.SE(16), tmp_path / "se.onnx", (1, 16, 4, 4))
    assert caught.value.filename == str(tmp_path / "se.onnx")
    assert not list(tmp_path.iterdir())
