"""spem explain: the gates and maps of one image, printed and drawn."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import spem
from spem import cli
from spem.explain import evenly, explain, number
from spem.ops import use_impl

WEIGHTS = Path(__file__).resolve().parents[1] / "data" / "weights"
IMAGE = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def network(spec: str, depth: int = 11) -> nn.Module:
    model = spem.resnet(depth, attention=spec, block="basic" if depth == 20 else "bottleneck")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def test_what_is_seen_is_what_runs():
    model = network("spem").train()
    model.get_submodule("layer1.0.bn1").eval()  # frozen, and stays so
    modes = [module.training for module in model.modules()]
    statistics = {k: v.clone() for k, v in model.named_buffers()}
    seen = explain(model, IMAGE)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(v, statistics[k]) for k, v in model.named_buffers())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    maps: list[torch.Tensor] = []
    model.eval()
    for module in model.modules():
        if isinstance(module, spem.SPEM):
            module.register_forward_pre_hook(lambda _, x: maps.append(x[0][0].detach()))
    with spem.ops.use_impl("reference"):  # as explain runs it
        answer = model(IMAGE)[0].softmax(0)
    torch.testing.assert_close(seen.probabilities, answer.detach())
    modules = {n: m for n, m in model.named_modules() if isinstance(m, spem.SPEM)}
    assert [block.name for block in seen.blocks] == list(modules)
    for block, x, module in zip(seen.blocks, maps, modules.values(), strict=True):
        assert torch.equal(block.maps, x)
        gates = module.gate(x[None])[0, :, 0, 0].detach().numpy()
        np.testing.assert_allclose(block.kept.numpy(), gates, rtol=1e-6)
        assert block.mean == pytest.approx(gates.mean(), rel=1e-5)
        assert block.closed == np.mean(gates < 0.1)
        assert block.order[0] == gates.argmax()
        assert block.order[-1] == gates.argmin()
        assert list(block.lambdas.values()) == [pytest.approx(float(module.pool.lam.detach()))]
        assert block.alpha is None
        assert not block.spatial


def test_gates_of_positions_are_shown_themselves():
    (first, *_) = explain(network("sge"), IMAGE).blocks
    assert first.spatial
    assert first.maps.shape == (64, 16, 16)
    assert torch.equal(first.kept, first.maps.mean((1, 2)))


@pytest.mark.parametrize(("spec", "count"), [("dia", 9), ("sk", 3), ("gc", 3), ("bam", 2)])
def test_modules_of_every_kind(spec: str, count: int, tmp_path: Path):
    seen = explain(network(spec, depth=20 if spec == "dia" else 11), IMAGE)
    assert len(seen.blocks) == count
    assert all(len(b.kept) == len(b.maps) == len(b.order) for b in seen.blocks)
    assert all(block.adds == (spec == "gc") for block in seen.blocks)
    if spec == "dia":
        assert [block.name for block in seen.blocks[:2]] == ["layer1.shared[0]", "layer1.shared[1]"]
    if spec == "bam":  # drawing takes longer than looking
        image, path = torch.zeros(3, 16, 16).byte(), tmp_path / "x.png"
        spem.explain.draw(seen, image, path, title="x", classes="0123456789", blocks=1, top=1)
        assert path.stat().st_size > 1000


def test_alphas_of_an_attached_network():
    model = spem.resnet(11)
    spem.attach(model, "se", input_shape=(1, 3, 16, 16))
    with use_impl("reference"):
        expected = model.eval()(IMAGE)[0].softmax(0).detach()
    seen = explain(model, IMAGE)
    torch.testing.assert_close(seen.probabilities, expected)
    assert [block.alpha for block in seen.blocks] == [0.0, 0.0, 0.0]
    assert all(torch.equal(block.kept, torch.ones_like(block.kept)) for block in seen.blocks)


def test_rows_are_taken_evenly_from_the_first_to_the_last():
    assert evenly(list(range(3)), 6) == [0, 1, 2]
    assert evenly(list(range(54)), 4) == [0, 18, 35, 53]
    assert evenly(list(range(5)), 1) == [4]
    assert [number(v) for v in (0.5, 0.031, 0.0, 1.0)] == ["0.50", "0.031", "0.00", "1.00"]


def test_bad_calls():
    with pytest.raises(ValueError, match="needs one image"):
        explain(network("se"), torch.randn(2, 3, 8, 8))
    with pytest.raises(ValueError, match="has no attention of this library"):
        explain(spem.resnet(11), IMAGE)
    seen = explain(network("se"), IMAGE)
    with pytest.raises(ValueError, match="must be at least 1"):
        spem.explain.draw(seen, IMAGE[0], Path("x.png"), title="", classes="0123456789", top=0)
    with pytest.raises(ValueError, match=r"in floating point, got torch.uint8"):
        explain(network("se"), torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("scale", "options", "message"),
    [
        (1.0, {"classes": "01"}, "answers with 10 classes; got 2 names"),
        (1.0, {"marked": 10}, "answers with 10 classes; .*marked=10"),
        (float("nan"), {}, "channels of layer1.0.attention are not finite"),
    ],
)
def test_what_cannot_be_drawn(
    scale: float, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    seen, path = explain(network("se"), scale * IMAGE), tmp_path / "x.png"
    shown = torch.zeros(3, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match=message):
        spem.explain.draw(seen, shown, path, **{"title": "", "classes": "0123456789"} | options)
    assert not path.exists()


def test_more_channels_than_there_are_and_half_precision(tmp_path: Path) -> None:
    seen = explain(network("se").bfloat16(), IMAGE)  # on the device and in the dtype of the network
    blocks = [dataclasses.replace(b, kept=b.kept[:3], maps=b.maps[:3]) for b in seen.blocks]
    seen = dataclasses.replace(seen, blocks=blocks)
    path, shown = tmp_path / "x.png", torch.zeros(3, 8, 8, dtype=torch.uint8)
    spem.explain.draw(seen, shown, path, title="", classes="0123456789", top=10**6)
    with Image.open(path) as picture:
        assert max(picture.size) < 3000


def test_a_picture_has_room_for_fifty_channels_of_a_side(tmp_path: Path) -> None:
    seen, path = explain(network("se"), IMAGE), tmp_path / "x.svg"
    seen = dataclasses.replace(seen, blocks=seen.blocks[-1:])
    shown = torch.zeros(3, 8, 8, dtype=torch.uint8)
    spem.explain.draw(seen, shown, path, title="", classes="0123456789", top=100_000)
    width = re.search(r'width="([0-9.]+)pt"', path.read_text())
    assert width is not None
    assert 50 * 72 < float(width[1]) < 110 * 72


# ---- the command, on the committed weights


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A picture that is neither square nor of the size of the training images."""
    y, x = np.mgrid[0:48, 0:80]
    pixels = np.stack([3 * x, 5 * y, np.full_like(x, 90)], axis=2).astype(np.uint8)
    path = tmp_path / "picture.png"
    Image.fromarray(pixels).save(path)
    return path


def test_the_command_on_committed_weights(
    image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out.png"
    weights = WEIGHTS / "spem-seed0.safetensors"
    assert cli.main(["explain", str(weights), str(image), "--out", str(out), "--class", "cat"]) == 0
    printed = capsys.readouterr().out
    text = " ".join(printed.split())
    assert "picture.png (80x48, its middle scaled to 32x32)" in text
    assert "ResNet-11, attention spem" in text
    assert f"picture: {out}" in printed
    for name in ("layer1.0.attention", "layer2.0.attention", "layer3.0.attention", "lambda"):
        assert name in text
    assert "cat 0." in text
    with Image.open(out) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape[0] > 600
    assert pixels.shape[1] > 1200
    # something is drawn from end to end: no quarter of the picture is one colour
    half, middle = pixels.shape[0] // 2, pixels.shape[1] // 2
    for quarter in (pixels[:half, :middle], pixels[:half, middle:], pixels[half:, middle:]):
        assert len(np.unique(quarter.reshape(-1, 3), axis=0)) > 50


def test_json_and_shared_folders(image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    weights, folder = WEIGHTS / "se-seed0.safetensors", tmp_path / "shared"
    assert cli.main(["share", str(weights), "--folder", str(folder)]) == 0
    capsys.readouterr()
    found = []
    for source in (weights, folder):
        small = ["--out", str(tmp_path / "out.png"), "--blocks", "1", "--top", "1"]
        assert cli.main(["explain", str(source), str(image), *small, "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    one, two = found
    assert one["blocks"] == two["blocks"]
    assert one["answers"] == two["answers"]
    first = one["blocks"][0]
    assert len(first["gates"]) == 64
    assert first["most"][0] == int(np.argmax(first["gates"]))
    assert sum(answer["probability"] for answer in one["answers"]) <= 1


def test_a_test_image_by_its_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from spem.training import ModelConfig, RunConfig, save_weights
    from spem.training.recipes import smoke

    config: RunConfig = smoke("simam")
    weights = tmp_path / "digits.safetensors"
    save_weights(network("simam"), config, weights)
    assert config.model == ModelConfig(config.model.depth, "simam")
    out = str(tmp_path / "out.png")
    small = ["--blocks", "1", "--top", "1"]
    assert cli.main(["explain", str(weights), "test:5", "--out", out, *small]) == 0
    text = capsys.readouterr().out
    assert "test image 5 (" in text
    assert "count by their mean" in text
    assert cli.main(["explain", str(weights), "test:360", "--out", out]) == 2
    assert "have the numbers 0 to 359" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("weights", "arguments", "message"),
    [
        ("none-seed0.safetensors", [], "has no attention to explain. It was trained without any."),
        ("se-seed0.safetensors", ["--class", "catt"], "unknown class 'catt'. Did you mean cat?"),
        ("gone.safetensors", [], "there is no file"),
    ],
)
def test_what_cannot_be_explained(
    weights: str,
    arguments: list[str],
    message: str,
    image: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    out = tmp_path / "out.png"
    call = ["explain", str(WEIGHTS / weights), str(image), "--out", str(out), *arguments]
    assert cli.main(call) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_what_is_no_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    wrong = tmp_path / "x.png"
    wrong.write_text("no image")
    weights = str(WEIGHTS / "se-seed0.safetensors")
    for path, message in (
        (wrong, "not an image of a known kind"),
        (tmp_path / "y.png", "there is no image"),
    ):
        assert cli.main(["explain", weights, str(path), "--out", str(tmp_path / "o.png")]) == 2
        assert message in capsys.readouterr().err


def test_an_attention_inside_another_one_is_part_of_it():
    class Outer(spem.SE):
        def __init__(self, channels: int) -> None:
            super().__init__(channels, reduction=2)
            self.before = spem.ECA(channels)

        def gate(self, x: torch.Tensor) -> torch.Tensor:
            return super().gate(self.before(x))

    network = nn.Sequential(nn.Conv2d(3, 8, 3), Outer(8), nn.Flatten(), nn.LazyLinear(4))
    shown = explain(network, torch.randn(1, 3, 8, 8))
    assert [block.name for block in shown.blocks] == ["1"]
