"""Initialisation of the networks: keyed by (seed, name), equal for all attentions of one seed."""

from __future__ import annotations

import pytest
import torch
from attention.drawing import feature_map
from tolerance import TOLERANCE
from torch import Tensor, nn

import spem

ATTENTIONS = ["none", "spem", "se", "cbam", "eca", "srm", "sge", "scale"]


def backbone(model: nn.Module) -> dict[str, Tensor]:
    return {k: v for k, v in model.state_dict().items() if ".attention." not in k}


@pytest.mark.parametrize(("depth", "block"), [(11, "bottleneck"), (8, "basic")])
def test_all_attentions_of_a_seed_start_from_one_backbone(depth: int, block: str) -> None:
    reference: dict[str, Tensor] | None = None
    for attention in ATTENTIONS:
        narrow = {"sge": "sge(groups=16)"} if block == "basic" else {}
        for scope in ("backbone", "all"):
            model = spem.resnet(depth, attention=narrow.get(attention, attention), block=block)
            spem.initialise(model, 5, scope=scope)
            mine = backbone(model)
            reference = reference or mine
            assert mine.keys() == reference.keys()
            assert all(torch.equal(mine[k], reference[k]) for k in reference), attention
    other = spem.resnet(depth, block=block)
    spem.initialise(other, 6)
    drawn = [k for k, v in backbone(other).items() if v.dim() >= 2 or k == "fc.bias"]
    assert len(drawn) > 8
    assert all(not torch.equal(backbone(other)[k], reference[k]) for k in drawn)


def test_the_random_parts_of_attention_are_keyed_too() -> None:
    for attention, key in (
        ("se", "fc1.weight"),
        ("eca", "conv.weight"),
        ("cbam", "spatial.weight"),
    ):
        states = []
        for seed in (1, 1, 2):
            model = spem.resnet(11, attention=attention)
            spem.initialise(model, seed)
            states.append(model.state_dict())
        name = f"layer2.0.attention.{key}"
        assert torch.equal(states[0][name], states[1][name])
        assert not torch.equal(states[0][name], states[2][name])
        assert states[0][name].shape != states[0][
            f"layer3.0.attention.{key}"
        ].shape or not torch.equal(states[0][name], states[0][f"layer3.0.attention.{key}"])


def test_initial_values() -> None:
    model = spem.resnet(29, 10)
    spem.initialise(model, 0)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            assert module.bias is None
            weight = module.weight.detach()
            variance = 2 / (weight.shape[-1] ** 2 * weight.shape[0])
            count = weight.numel()
            # a sample variance has a relative error of sqrt(2 / count)
            assert weight.var().item() == pytest.approx(variance, rel=5 * (2 / count) ** 0.5), name
            assert abs(weight.mean().item()) < 5 * (variance / count) ** 0.5, name
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
            assert (module.running_mean == 0).all()
            assert (module.running_var == 1).all()
            assert (module.eps, module.momentum) == (1e-5, 0.1)
    for tensor in (model.fc.weight, model.fc.bias):
        assert tensor.abs().max() <= 1 / 16
    assert model.fc.weight.std().item() == pytest.approx(1 / 16 / 3**0.5, rel=0.06)


def test_attention_owns_its_initialisation() -> None:
    """The backbone's rules do not reach into the modules, unless scope="all" asks for it."""
    model = spem.resnet(11, attention="cbam")
    spem.initialise(model, 0)
    for stage in (model.layer1, model.layer2, model.layer3):
        cbam = stage[0].attention
        assert not cbam.norm.weight.any()
        assert not cbam.fc1.bias.any()
        assert not cbam.fc2.bias.any()
        assert cbam.fc1.weight.any()
    spem.initialise(model, 0, scope="all")
    for stage in (model.layer1, model.layer2, model.layer3):
        assert (stage[0].attention.norm.weight == 1).all()
        assert not stage[0].attention.fc1.bias.any()
    for attention, constant in (("srm", "a"), ("spem", "w_e"), ("sge", "w")):
        for scope in ("backbone", "all"):
            model = spem.resnet(11, attention=attention)
            spem.initialise(model, 0, scope=scope)
            module = model.layer1[0].attention
            assert not getattr(module, constant).any()
            gate = module.gate(feature_map(4, 64, 3, 3, dtype=torch.float32))
            torch.testing.assert_close(
                gate, torch.full_like(gate, module.start_gate), **TOLERANCE[torch.float32]
            )


def test_a_compiled_network_gets_the_same_start() -> None:
    plain, whole, parts = (spem.resnet(11, attention="spem(pool=srp)") for _ in range(3))
    parts.layer2 = torch.compile(parts.layer2)
    parts.layer3[0].attention = torch.compile(parts.layer3[0].attention)
    for model in (plain, torch.compile(whole), parts):
        spem.initialise(model, 2)
    for other in (whole, parts):
        states = zip(plain.state_dict().values(), other.state_dict().values(), strict=True)
        assert all(torch.equal(mine, theirs) for mine, theirs in states)


def test_the_seed_is_the_only_input() -> None:
    torch.manual_seed(1)
    first = spem.resnet(11, attention="se")
    spem.initialise(first, 2)
    torch.manual_seed(99)
    second = spem.resnet(11, attention="se").double()
    spem.initialise(second, 2)
    for (name, a), (_, b) in zip(
        first.state_dict().items(), second.state_dict().items(), strict=True
    ):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-6, atol=1e-7, msg=name)


def test_a_network_that_is_made_follows_the_generator_of_torch() -> None:
    """As every other network does; `initialise` gives the keyed start."""
    nets = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        nets.append(spem.resnet(11, attention="se").state_dict())
    drawn = [key for key in nets[0] if key.endswith(("conv1.weight", "fc1.weight", "fc.weight"))]
    assert len(drawn) >= 8
    assert all(torch.equal(nets[0][key], nets[1][key]) for key in nets[0])
    assert not any(torch.equal(nets[0][key], nets[2][key]) for key in drawn)
