"""What a new user does, from photos of their own to a network that somebody else loads."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import spem
from spem import cli

COLOURS = {"apples $_{": (200, 40, 30), "leaves": (40, 170, 60), "\x1b[31m\u5929": (60, 90, 220)}


pytestmark = pytest.mark.usefixtures("own_folder")


def photos(folder: Path, each: int) -> None:
    """Three classes of photos, none of the size of another, no splits."""
    rng = random.Random(0)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for number in range(each):
            size = rng.randrange(20, 90), rng.randrange(20, 90)
            shade = tuple(max(0, c - rng.randrange(60)) for c in colour)
            Image.new("RGB", size, shade).save(folder / name / f"{number}.jpg")


def said(capsys: pytest.CaptureFixture[str], args: list[str]) -> str:
    assert cli.main(args) == 0, capsys.readouterr().err
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return out


def answered(capsys: pytest.CaptureFixture[str], args: list[str]) -> Any:
    return json.loads(said(capsys, [*args, "--json"]))


@pytest.mark.slow
def test_from_photos_to_a_shared_network(capsys: pytest.CaptureFixture[str]) -> None:
    """Train, evaluate, explain, export, share, load: each reads what the one before has written."""
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    photos(Path("photos"), 20)
    args = ["train", "smoke", "--data", "photos", "--size", "16", "--data.test", "0.2"]
    args += ["--attention", "spem", "--epochs", "2", "--batch", "16", "--folder", "run"]
    trained = answered(capsys, args)
    assert trained["folder"] == "run"
    before = Path("run/result.json").read_bytes()
    assert cli.main(args) == 0
    assert "finished" in "".join(capsys.readouterr())
    assert Path("run/result.json").read_bytes() == before

    evaluated = answered(capsys, ["eval", "run"])
    assert evaluated["count"] == 12
    assert evaluated["accuracy"] == pytest.approx(trained["accuracy"])

    image = "photos/leaves/3.jpg"
    text = said(capsys, ["explain", "run", image, "--out", "leaf.png"])
    assert "its middle scaled to 16x16" in text
    assert "\x1b" not in text  # the name of a class cannot steer the terminal
    assert Path("leaf.png").stat().st_size > 1000

    exported = answered(capsys, ["export", "run", "--out", "net.onnx"])
    assert exported["differences"][0]["relative"] < 1e-4
    said(capsys, ["share", "run", "--folder", "shared"])
    assert set(COLOURS) == set(json.loads(Path("shared/config.json").read_text())["classes"])

    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    network = spem.from_pretrained("shared").eval()
    with torch.no_grad():
        torch.testing.assert_close(network(x), spem.training.read_run("run").network().eval()(x))
    for network in ("run", "shared"):  # each brings the size of its images
        again = answered(capsys, ["eval", network, "--data", "photos"])
        assert (again["count"], again["accuracy"]) == (12, pytest.approx(evaluated["accuracy"]))
        folded = answered(capsys, ["export", network, "--fold", "photos", "--out", "folded.onnx"])
        assert "Sigmoid" not in folded["operators"]
        (row,) = answered(capsys, ["bench", network, "--quick"])["rows"]
        assert row["attention"] == "as trained"
    assert cli.main(["share", "shared", "--folder", "twice"]) == 2
    assert "was shared before" in capsys.readouterr().err


OWN = """
import torchvision
def small():
    return torchvision.models.resnet.ResNet(
        torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10
    )
"""


@pytest.mark.parametrize("network", ["resnet10t", "torchvision:resnet18", "own.py:small"])
def test_a_network_is_named_alike_in_every_command(
    network: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("timm", reason="timm is not installed")
    Path("own.py").write_text(OWN)
    Image.new("RGB", (50, 40), (9, 99, 199)).save("image.png")
    size, ten = ["--size", "32"], [] if network.startswith("own") else ["--classes", "10"]
    named = [network, *size]
    assert answered(capsys, ["cost", *named, "--attention", "spem"])["attention_parameters"] > 0
    assert len(answered(capsys, ["attach", network, "spem", *size])["sites"]) >= 4
    assert answered(capsys, ["eval", *named, *ten, "--data", "digits"])["count"] == 360
    told = answered(capsys, ["explain", network, "image.png", "--attention", "se", *size])
    assert len(told["blocks"]) >= 4
    given = ["export", *named, "--attention", "se", "--out", "net.onnx"]
    assert cli.main(given) == 2  # an identity start would leave nothing of it
    assert "the file would hold no attention" in capsys.readouterr().err
    written = answered(capsys, [*given, "--start", "module"])
    assert written["operators"]["Sigmoid"] >= 4
