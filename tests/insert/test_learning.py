"""An identity start learns, a module's own start changes the outputs, shortcuts are untouched."""

from __future__ import annotations

import pytest
import torch
from insert.hosts import attentions, images, models, scattered, timm
from tolerance import TOLERANCE
from torch import nn

import spem
from spem.insert import IdentityStart, find_sites

# no parameters (simam), or stands elsewhere, or one module for a stage
TAILS = [
    name
    for name in spem.list_attention()
    if spem.AttentionSpec(name).place == "tail" and not spem.AttentionSpec(name).shared
]


def network() -> nn.Module:
    return timm.models.resnet.ResNet(
        timm.models.resnet.BasicBlock, (1, 1, 1, 1), num_classes=5, channels=(64, 64, 64, 64)
    )


@pytest.mark.parametrize("fuse", [False, True], ids=["plain", "fused"])
def test_two_steps_move_alpha_and_the_attention(fuse: bool) -> None:
    model = scattered(network()).train()
    spem.attach(model, "spem", fuse=fuse)
    optimizer = torch.optim.SGD(spem.param_groups(model, 0.01, 1e-4))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(2):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images(4, 32)), torch.tensor([0, 1, 2, 3]))
        loss.backward()
        optimizer.step()
        if step == 0:
            for module in attentions(model):
                assert module.alpha != 0
    for name, parameter in model.named_parameters():
        # SPEM starts with w_e = 0, which hides lambda from its gradient for one step more.
        if ".se." in name and not name.endswith("pool.p"):
            assert not torch.equal(parameter, start[name]), name


@pytest.mark.parametrize("name", TAILS)
def test_every_module_starts_as_the_identity_and_learns(name: str) -> None:
    model = scattered(network()).eval()
    x = images(2, 256 if name == "fca" else 64)
    with torch.no_grad():
        expected = model(x)
    spem.attach(model, name, input_shape=tuple(x.shape))
    rng = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for module in attentions(model):
            for parameter in module.inner.parameters():
                parameter.normal_(0.0, 0.3, generator=rng)
        torch.testing.assert_close(model(x), expected, **TOLERANCE[torch.float32])
        for module in attentions(model):
            module.alpha.fill_(1.0)
        moved = model(x)
    # With alpha = 1 it is the module itself.
    for stage in range(1, 5):
        block = model.get_submodule(f"layer{stage}.0")
        block.se = block.se.inner
    with torch.no_grad():
        torch.testing.assert_close(moved, model(x), **TOLERANCE[torch.float32])
        assert not torch.allclose(moved, expected)


def test_a_modules_own_start_changes_the_outputs_of_trained_norms_and_warns() -> None:
    model = network().eval()
    x = images(2, 32)
    spem.attach(model, "spem", start="module")  # untrained: nobody is warned
    spem.detach(model)
    model.train()(x)
    model.eval()
    expected = model(x)
    with pytest.warns(UserWarning, match=r"start='module' on trained weights.*start='identity'"):
        spem.attach(model, "scale", start="module")
    assert attentions(model)[0].__class__ is not IdentityStart
    scattered(model)
    assert not torch.allclose(model(x), expected)


def test_old_checkpoints_that_count_no_batches_are_trained_too() -> None:
    model = scattered(network())
    assert model.bn1.num_batches_tracked == 0
    with pytest.warns(UserWarning, match="trained"):
        spem.attach(model, "spem", start="module")


def test_shortcuts_are_untouched() -> None:
    model = models.resnet18(num_classes=3)
    shortcuts = {name: m for name, m in model.named_modules() if "downsample" in name}
    assert len(shortcuts) == 9
    spem.attach(model, "spem")
    for name, module in shortcuts.items():
        assert model.get_submodule(name) is module
        assert not attentions(module)


def test_alpha_is_not_decayed_and_penalties_and_mixes_are_found() -> None:
    model = network()
    spem.attach(model, "spem")
    assert len(spem.learned_mixes(model)) == 4
    assert spem.penalty(model).item() == pytest.approx(2.0)
    alphas = {id(module.alpha) for module in attentions(model)}
    for group in spem.param_groups(model, 0.1, 1e-4):
        if alphas & {id(p) for p in group["params"]}:
            assert group["weight_decay"] == 0


def test_initialise_draws_attention_and_leaves_the_identity() -> None:
    model = network()
    spem.attach(model, "se")
    with torch.no_grad():
        for module in attentions(model):
            module.alpha.fill_(0.5)
    spem.initialise(model, 3)
    assert all(module.alpha == 0 for module in attentions(model))
    assert attentions(model)[0].inner.fc1.weight.std() > 0


def test_the_start_gate_is_one() -> None:
    start = IdentityStart(spem.SPEM(6))
    assert start.start_gate == 1.0
    x = torch.randn(2, 6, 5)  # any rank that the module takes
    assert torch.equal(start(x), x)
    assert start.name == "spem"
    assert len(find_sites(network(), "spem", input_shape=(1, 3, 32, 32))) == 4
