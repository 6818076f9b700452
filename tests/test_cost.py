"""Parameters, FLOPs and tails against counts made by hand and by formula."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

import spem
from spem.cli import main
from spem.cost import block_tails, count, tails_text
from spem.ops import dispatch, use_impl


def conv_flops(inputs: int, outputs: int, kernel: int, side: int) -> int:
    """2 per multiply-add of a convolution onto a side x side map."""
    return 2 * inputs * outputs * kernel * kernel * side * side


def bottleneck_flops(n: int, classes: int = 10) -> int:
    """One 32x32 image through a CIFAR bottleneck ResNet of n blocks a stage, layer by layer."""
    total = conv_flops(3, 16, 3, 32)
    width = 16
    for planes, side in ((16, 32), (32, 16), (64, 8)):
        for block in range(n):
            before = side * 2 if block == 0 and planes > 16 else side
            total += conv_flops(width, planes, 1, before)
            total += conv_flops(planes, planes, 3, side)
            total += conv_flops(planes, 4 * planes, 1, side)
            if block == 0:
                total += conv_flops(width, 4 * planes, 1, side)
            width = 4 * planes
    return total + 2 * width * classes


def test_a_small_network_by_hand() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),  # 8 x 8 x 8 outputs of 27 multiply-adds
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 1, bias=False),  # 4 x 8 x 8 outputs of 8
        nn.Flatten(),
        nn.Linear(256, 10),
    )
    cost = count(network, (1, 3, 16, 16))
    assert [row.flops for row in cost.layers] == [27648, 0, 0, 4096, 0, 5120]
    assert [row.parameters for row in cost.layers] == [224, 16, 0, 32, 0, 2570]
    assert [row.output for row in cost.layers][3:] == [(1, 4, 8, 8), (1, 256), (1, 10)]
    assert (cost.parameters, cost.flops) == (2842, 36864)
    assert (cost.attention_parameters, cost.attention_flops) == (0, 0)
    assert count(network, (5, 3, 16, 16)).flops == 5 * 36864


@pytest.mark.parametrize(
    ("depth", "plain", "with_spem"), [(11, 127_642, 129_440), (164, 1_704_154, 1_736_518)]
)
def test_the_papers_networks(depth: int, plain: int, with_spem: int) -> None:
    shape = (1, 3, 32, 32)
    expected = bottleneck_flops((depth - 2) // 9)
    without = count(spem.resnet(depth), shape)
    assert (without.parameters, without.attention_parameters) == (plain, 0)
    assert without.flops == expected
    cost = count(spem.resnet(depth, attention="spem"), shape)
    assert (cost.parameters, cost.attention_parameters) == (with_spem, with_spem - plain)
    # SPEM has neither convolutions nor matrix products, so the counter sees nothing of it
    assert (cost.flops, cost.attention_flops) == (expected, 0)
    if depth == 164:
        assert round(cost.flops / 1e9, 3) == 0.495


def test_attention_has_its_share() -> None:
    cost = count(spem.resnet(11, attention="se"), (2, 3, 32, 32))
    gates = [row for row in cost.layers if row.attention]
    # two images, two matrix products of C x C/16
    assert [row.flops for row in gates] == [2 * 2 * 2 * c * (c // 16) for c in (64, 128, 256)]
    assert cost.attention_flops == sum(row.flops for row in gates)
    assert cost.flops == 2 * bottleneck_flops(1) + cost.attention_flops
    assert [row.name for row in gates] == [f"layer{i}.0.attention" for i in (1, 2, 3)]
    assert [row.output for row in gates] == [(2, 64, 32, 32), (2, 128, 16, 16), (2, 256, 8, 8)]


def test_a_layer_that_two_hold_has_one_row() -> None:
    shared = nn.Conv2d(3, 3, 3, padding=1)
    network = nn.Sequential(nn.Sequential(shared), nn.Sequential(shared, nn.Conv2d(3, 4, 1)))
    cost = count(network, (1, 3, 8, 8))
    rows = [(row.name, row.parameters, row.flops) for row in cost.layers]
    assert rows == [("0.0", 84, 2 * 2 * 27 * 3 * 64), ("1.1", 16, 2 * 12 * 64)]
    assert (cost.parameters, cost.flops) == (100, 2 * 2 * 27 * 3 * 64 + 2 * 12 * 64)


@pytest.mark.parametrize("name", ["none", "spem", "se", "bam", "dia", "sk", "iebn", "fca", "gct"])
def test_the_rows_add_up(name: str) -> None:
    network = spem.resnet(11, attention=name)
    cost = count(network, (1, 3, 16, 16))
    assert sum(row.parameters for row in cost.layers) == cost.parameters
    assert sum(row.flops for row in cost.layers) == cost.flops
    assert cost.parameters == sum(p.numel() for p in network.parameters())
    plain = spem.resnet(11)
    replaces = None if name == "none" else spem.attention.attention_class(name).needs.replaces
    stand_ins = {None: "", "norm": "bn", "conv": "2."}[replaces]  # conv2 and bn2 make way for one
    replaced = sum(
        p.numel()
        for key, p in plain.named_parameters()
        if stand_ins and "downsample" not in key and stand_ins in key.partition(".0.")[2] + key[:2]
    )
    own = cost.parameters - count(plain, (1, 3, 16, 16)).parameters
    assert cost.attention_parameters == own + replaced
    assert cost.attention_parameters == spem.attention.attention_parameters(network)


@pytest.mark.parametrize("channels", [3, 4])
def test_the_model_is_left_as_it_was_after_an_error_too(channels: int) -> None:
    network = spem.resnet(11, attention="cbam").train()
    network.layer1.eval()
    modes = [module.training for module in network.modules()]
    state = {name: value.clone() for name, value in network.state_dict().items()}
    with nullcontext() if channels == 3 else pytest.raises(RuntimeError, match="channels"):
        count(network, (1, channels, 16, 16))
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(state[k], v) for k, v in network.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
    assert all(p.grad is None for p in network.parameters())


class Fused(nn.Module):
    """A block that uses the parts of its gate without calling the gate, and a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = spem.SE(32)
        self.weight = nn.Parameter(torch.ones(32, 32))

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.gate.fc2(self.gate.fc1(x.mean((2, 3)))))
        return (gate @ self.weight)[:, :, None, None] * x


def test_a_gate_that_is_not_called_itself() -> None:
    cost = count(Fused(), (1, 32, 4, 4))
    rows = {row.name: row for row in cost.layers}
    assert (rows["gate"].flops, rows["gate"].output) == (2 * 2 * 32 * 2, None)
    assert (rows[""].flops, rows[""].parameters) == (2 * 32 * 32, 32 * 32)
    assert cost.flops == rows["gate"].flops + rows[""].flops


@pytest.mark.parametrize("shape", [(), (0, 3, 32, 32), (1, -3, 32, 32)])
def test_a_shape_that_is_none(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="count: input_shape"):
        count(nn.ReLU(), shape)


# ---- tails


@pytest.fixture
def numba_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dispatch._INSTALLED, "numba", True)
    monkeypatch.setattr(dispatch, "_TORCH", (2, 11))


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 4), (torch.float64, 8)])
def test_fused_tails_move_what_norm_addition_and_relu_need(
    dtype: torch.dtype, width: int, numba_there: None
) -> None:
    cost = count(spem.resnet(11, attention="spem").to(dtype), (2, 3, 32, 32))
    assert [tail.name for tail in cost.tails] == [f"layer{i}.0" for i in (1, 2, 3)]
    assert {(tail.attention, tail.impl, tail.reason) for tail in cost.tails} == {
        ("spem", "numba", "")
    }
    maps = [2 * 64 * 32 * 32, 2 * 128 * 16 * 16, 2 * 256 * 8 * 8]
    assert [tail.forward_bytes for tail in cost.tails] == [4 * width * size for size in maps]
    assert [tail.backward_bytes for tail in cost.tails] == [7 * width * size for size in maps]


def test_a_composed_tail_says_why_and_is_not_modelled() -> None:
    cost = count(spem.resnet(11, attention="cbam"), (1, 3, 32, 32))
    for tail in cost.tails:
        assert (tail.impl, tail.reason) == (
            "reference",
            "cbam is not a function of plane statistics",
        )
        assert tail.forward_bytes is tail.backward_bytes is None
    assert tails_text(cost.tails) == (
        "3 block tails: reference (not fused: cbam is not a function of plane statistics)"
    )


def test_a_composed_plain_tail_is_modelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_TORCH", (2, 11))
    monkeypatch.setitem(dispatch._INSTALLED, "triton", True)
    cost = count(spem.resnet(11), (1, 3, 32, 32), device="cuda", dtype=torch.bfloat16)
    assert {tail.reason for tail in cost.tails} == {
        "Triton kernels are faster only in CUDA graphs, with a gate"
    }
    size = 2 * 64 * 32 * 32
    assert (cost.tails[0].forward_bytes, cost.tails[0].backward_bytes) == (8 * size, 8 * size)


def test_tails_follow_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    network = spem.resnet(11, attention="spem")
    with use_impl("formula"):
        assert {tail.impl for tail in block_tails(network)} == {"formula"}
        assert count(network, (1, 3, 16, 16)).tails[0].backward_bytes == 8 * 4 * 64 * 16 * 16
    with use_impl("triton"), pytest.raises(ValueError, match="needs a CUDA tensor"):
        count(network, (1, 3, 16, 16))


def test_a_hooked_norm_composes_its_tail_and_others_are_told_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dispatch, "_TORCH", (2, 11))
    monkeypatch.setitem(dispatch._INSTALLED, "triton", True)
    network = spem.resnet(11, attention="se")
    network.layer2[0].bn3.register_forward_hook(lambda *_: None)
    tails = block_tails(network, device="cuda", dtype=torch.float16)
    assert tails[1].reason == "cannot call the hooks of BatchNorm2d"
    text = tails_text(tails)
    assert "2 block tails: reference (not fused: Triton" in text
    assert "; 1 block tail: reference (not fused: cannot call the hooks" in text


def test_other_networks_have_no_tails() -> None:
    assert count(nn.Sequential(nn.Linear(3, 5)), (2, 3)).tails == ()
    assert tails_text(()) == "no block tails"


def test_the_command_names_the_tails(capsys: pytest.CaptureFixture[str], numba_there: None) -> None:
    main(["cost", "cifar:11", "--attention", "spem"])
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        "On cpu, fp32: 3 block tails: numba (fused batch norm + spem + add + ReLU). "
        "Whole maps they read and write, by a model: 1.8 MB forward, 3.2 MB backward." in shown
    )
    main(["cost", "cifar:11", "--attention", "cbam", "--device", "cuda", "--precision", "bf16"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "On cuda, bf16: 3 block tails: reference (not fused: cbam is not a function" in shown
    assert "Whole maps" not in shown
    main(["cost", "cifar:11", "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert answer["tails_for"] == "cpu, fp32"
    assert [tail["name"] for tail in answer["tails"]] == [f"layer{i}.0" for i in (1, 2, 3)]
    assert answer["tails"][0]["impl"] == "numba"


@pytest.mark.parametrize(("fuse", "fused"), [(False, 0), (True, 8)])
def test_other_peoples_blocks_are_fused_when_asked(fuse: bool, fused: int) -> None:
    """ResNet-18 has 8 blocks; each has one tail, whether attention is fused into it or not."""
    models = pytest.importorskip("torchvision.models")
    network = models.resnet18(num_classes=3).eval()
    assert block_tails(network) == ()
    spem.attach(network, "se", fuse=fuse)
    with use_impl("formula"):
        tails = block_tails(network)
    assert [tail.attention for tail in tails] == ["se"] * 8
    assert sum(tail.impl == "formula" for tail in tails) == fused
    text = tails_text(tails)
    if not fuse:
        apart = "not fused: attention is separate from norm and addition"
        assert text == f"8 block tails: reference ({apart})"


@pytest.mark.parametrize("attention", ["bam", "sk", "iebn", "gct(placement=conv)", "dia", "eca"])
def test_our_own_networks_have_a_tail_a_block(attention: str) -> None:
    depth, block = (8, "basic") if attention == "eca" else (11, "bottleneck")
    tails = block_tails(spem.resnet(depth, attention=attention, block=block))
    assert [tail.name for tail in tails] == [f"layer{i}.0" for i in (1, 2, 3)]


def test_the_command_takes_other_architectures(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm")
    call = ["cost", "timm:resnet10t", "--attention", "spem", "--size", "32", "--classes", "3"]
    assert main(call) == 0
    assert "4 block tails: reference (not" in capsys.readouterr().out
    assert main([*call, "--fuse"]) == 0
    assert "not fused" not in capsys.readouterr().out
    assert main(["cost", "timm:resnet10t", "--fuse"]) == 2
    assert main(["cost", "cifar:11", "--fuse"]) == 2
    assert main(["cost", "timm:resnot10t"]) == 2
