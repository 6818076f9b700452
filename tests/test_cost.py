"""Parameters and FLOPs against counts made by hand and by formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import spem
from spem.cost import count


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


@pytest.mark.parametrize("name", ["none", *spem.list_attention()])
def test_the_rows_add_up(name: str) -> None:
    network = spem.resnet(11, attention=name)
    cost = count(network, (1, 3, 16, 16))
    assert sum(row.parameters for row in cost.layers) == cost.parameters
    assert sum(row.flops for row in cost.layers) == cost.flops
    assert cost.parameters == sum(p.numel() for p in network.parameters())
    plain = spem.resnet(11)
    assert cost.attention_parameters == cost.parameters - count(plain, (1, 3, 16, 16)).parameters


def test_the_model_is_left_as_it_was() -> None:
    network = spem.resnet(11, attention="cbam").train()
    network.layer1.eval()
    modes = [module.training for module in network.modules()]
    state = {name: value.clone() for name, value in network.state_dict().items()}
    count(network, (1, 3, 16, 16))
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(state[k], v) for k, v in network.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
    assert all(p.grad is None for p in network.parameters())


def test_the_model_is_left_as_it_was_after_an_error() -> None:
    network = spem.resnet(11).train()
    with pytest.raises(RuntimeError, match="channels"):
        count(network, (1, 4, 16, 16))
    assert network.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


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


def test_a_network_in_float64() -> None:
    assert count(spem.resnet(11).double(), (1, 3, 32, 32)).flops == bottleneck_flops(1)


@pytest.mark.parametrize("shape", [(), (0, 3, 32, 32), (1, -3, 32, 32)])
def test_a_shape_that_is_none(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="count: input_shape"):
        count(nn.ReLU(), shape)
