"""`spem attach`."""

from __future__ import annotations

import json

import pytest
from insert.hosts import timm

from spem import cli

assert timm


def call(args: list[str]) -> int:
    return cli.main(["attach", *args])


def test_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["resnet18", "se", "--dry-run", "--size", "64", "--stages", "3", "4"]) == 0
    out = capsys.readouterr().out
    assert "layer3.0.se" in out
    assert "1 x 256 x 4 x 4" in out
    assert "layer1" not in out
    assert "4 sites" in out
    assert f"{2 * 256 * 16 + 16 + 256:,}" in out
    assert "Tails: not fused." in out
    assert "before and after" not in out


def test_outputs_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["torchvision:resnet18", "--size", "32", "--fuse", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["change"] < 1e-4
    assert document["tails"] == "fused"
    assert document["sites"][0]["name"] == "layer1.0.bn2"
    assert call(["resnet18", "cbam", "--size", "32", "--fuse", "--include", "layer1*"]) == 0
    out = capsys.readouterr().out
    assert "Tails: composed (cbam is not a function of plane statistics)." in out
    assert "largest difference 0" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["resnet5"], "attach: unknown architecture 'resnet5'. Did you mean resnet"),
        (["torchvision:resnest50d"], "unknown architecture 'torchvision:resnest50d'"),
        (["qqqq"], "timm.list_models() lists them"),
        (["vit_tiny_patch16_224"], "none joins a branch of convolutions"),
        (["resnet18", "speem"], "unknown attention 'speem'"),
        (["mobilenetv2_050", "spem", "--fuse", "--dry-run", "--size", "32"], "Leave --fuse out"),
    ],
)
def test_refused(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(args) == 2
    assert message in capsys.readouterr().err
