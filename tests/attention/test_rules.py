"""Optimiser rules: every parameter in exactly one group, the declared ones without weight decay."""

from __future__ import annotations

import pytest
import torch
from attention.drawing import randomise
from torch import nn

import spem

LR, DECAY = 0.1, 1e-4


def rules(model: nn.Module, **options: float) -> dict[str, tuple[float, float]]:
    """name -> (rate, weight decay) as SGD sees them."""
    groups = spem.param_groups(model, LR, DECAY, **options)
    optimiser = torch.optim.SGD(groups, lr=123.0, weight_decay=456.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    result: dict[str, tuple[float, float]] = {}
    for group in optimiser.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert name not in result, f"{name} twice"
            result[name] = (group["lr"], group["weight_decay"])
    assert set(result) == set(names.values())
    return result


@pytest.mark.parametrize("name", spem.list_attention())
def test_every_parameter_exactly_once(name: str) -> None:
    model = spem.resnet(11, attention=name)
    assert all(rate == LR for rate, _ in rules(model).values())


def test_srm() -> None:
    found = rules(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), spem.SRM(8)))
    free = {name for name, (_, decay) in found.items() if decay == 0.0}
    assert free == {"2.a", "2.d", "2.norm.weight", "2.norm.bias"}
    assert all(decay == DECAY for name, (_, decay) in found.items() if name not in free)


@pytest.mark.parametrize("attention", ["none", "se", "cbam", "eca", "sge", "scale"])
def test_the_host_rule_holds_for_the_others(attention: str) -> None:
    model = spem.resnet(11, attention=None if attention == "none" else attention)
    assert set(rules(model).values()) == {(LR, DECAY)}


@pytest.mark.parametrize("parametrization", ["squares", "anchored", "sigmoid"])
@pytest.mark.parametrize("module", [spem.SPEM, spem.SE, spem.SRM])
def test_mixes_have_no_weight_decay(
    module: type[spem.ChannelAttention], parametrization: str
) -> None:
    model = nn.Sequential(
        nn.Linear(2, 2), module(64, pool=spem.Mix(parametrization=parametrization))
    )
    found = rules(model)
    mixes = [name for name in found if name.rpartition(".")[2] in ("p", "logit")]
    assert len(mixes) == 1
    assert found[mixes[0]] == (LR, 0.0)
    assert found["0.weight"] == (LR, DECAY)
    if module is not spem.SRM:
        assert all(rule == (LR, DECAY) for name, rule in found.items() if name not in mixes)

    found = rules(model, mix_lr=0.003)
    assert found[mixes[0]] == (0.003, 0.0)
    assert all(rate == LR for name, (rate, _) in found.items() if name not in mixes)


def test_a_module_shared_by_two_blocks_stands_in_one_group() -> None:
    shared = spem.SRM(8)
    found = rules(nn.Sequential(shared, nn.Sequential(shared), nn.Conv2d(8, 8, 1)))
    assert found["0.a"] == (LR, 0.0)


def test_frozen_parameters_are_no_trouble() -> None:
    model = randomise(nn.Sequential(spem.SPEM(4), spem.SRM(4)), "frozen")
    model[0].w_e.requires_grad_(False)
    optimiser = torch.optim.SGD(spem.param_groups(model, LR, DECAY), lr=LR)
    before = model[0].w_e.clone()
    model(torch.randn(3, 4, 3, 3, generator=torch.Generator().manual_seed(0))).sum().backward()
    optimiser.step()
    assert torch.equal(model[0].w_e, before)
