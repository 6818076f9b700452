"""An identity start learns, a module's own start changes the outputs, timm's attn_layer."""

from __future__ import annotations

import pickle

import pytest
import torch
from insert.hosts import attentions, draw_inner, images, scattered, set_alpha, small_timm, timm
from tolerance import TOLERANCE
from torch import nn

import spem
from spem.insert import IdentityStart

TAILS = [
    name
    for name in spem.list_attention()
    if spem.AttentionSpec(name).place == "tail" and not spem.AttentionSpec(name).shared
]


def network(**options: object) -> nn.Module:
    return small_timm(channels=(64, 64, 64, 64), **options)


@pytest.mark.parametrize("fuse", [False, True], ids=["plain", "fused"])
def test_two_steps_move_alpha_and_the_attention(fuse: bool) -> None:
    model = scattered(network()).train()
    spem.attach(model, "spem", fuse=fuse)
    optimizer = torch.optim.SGD(spem.param_groups(model, 0.01, 1e-4))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(2):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images(4, 32)), torch.tensor([0, 1, 2, 3]))
        loss.backward()
        optimizer.step()
        assert all(module.alpha != 0 for module in attentions(model))
    for name, parameter in model.named_parameters():
        # SPEM starts with w_e = 0, which hides lambda from its gradient for one step more.
        if ".se." in name and not name.endswith("pool.p"):
            assert not torch.equal(parameter, start[name]), name


@pytest.mark.parametrize("name", TAILS)
def test_every_module_starts_as_the_identity_learns_and_is_an_attn_layer(name: str) -> None:
    model = scattered(network()).eval()
    x = images(2, 256 if name == "fca" else 64)
    with torch.no_grad():
        expected = model(x)
    spem.attach(model, name, input_shape=tuple(x.shape))
    draw_inner(model, 0.3)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, **TOLERANCE[torch.float32])
        set_alpha(model, 1.0)
        moved = model(x)
    # With alpha = 1 it is the module itself.
    for stage in range(1, 5):
        block = model.get_submodule(f"layer{stage}.0")
        block.se = block.se.inner
    with torch.no_grad():
        torch.testing.assert_close(moved, model(x), **TOLERANCE[torch.float32])
        assert not torch.allclose(moved, expected)
    if name != "fca":  # which must know the sizes of its maps
        other = network(output_stride=8, block_args={"attn_layer": spem.attn_layer(name)})
        assert [module.name for module in attentions(other)] == [name] * 4
        other(images(2, 64)).sum().backward()
        assert all(p.grad is not None for m in attentions(other) for p in m.parameters())


def test_a_modules_own_start_changes_the_outputs_of_trained_norms_and_warns() -> None:
    model = network().eval()
    x = images(2, 32)
    spem.attach(model, "spem", start="module")  # untrained: nobody is warned
    spem.detach(model)
    model.train()(x)
    model.eval()
    expected = model(x)
    with pytest.warns(
        UserWarning, match=r"start='module' changes the outputs of trained.*start='identity'"
    ):
        spem.attach(model, "scale", start="module")
    assert attentions(model)[0].__class__ is not IdentityStart
    scattered(model)
    assert not torch.allclose(model(x), expected)
    # Old checkpoints count no batches.
    model = scattered(network())
    assert model.bn1.num_batches_tracked == 0
    with pytest.warns(UserWarning, match="trained"):
        spem.attach(model, "spem", start="module")


def test_alpha_is_not_decayed_and_penalties_mixes_and_starts_are_found() -> None:
    model = network()
    spem.attach(model, "spem")
    assert len(spem.learned_mixes(model)) == 4
    assert spem.penalty(model).item() == pytest.approx(2.0)
    alphas = {id(module.alpha) for module in attentions(model)}
    for group in spem.param_groups(model, 0.1, 1e-4):
        if alphas & {id(p) for p in group["params"]}:
            assert group["weight_decay"] == 0
    spem.detach(model)
    spem.attach(model, "se")
    set_alpha(model, 0.5)
    spem.initialise(model, 3)
    assert all(module.alpha == 0 for module in attentions(model))
    assert attentions(model)[0].inner.fc1.weight.std() > 0
    start = IdentityStart(spem.SPEM(6))
    assert (start.start_gate, start.name) == (1.0, "spem")
    x = torch.randn(2, 6, 5)  # any rank that the module takes
    assert torch.equal(start(x), x)


def test_timms_device_dtype_and_hints() -> None:
    layer = pickle.loads(pickle.dumps(spem.attn_layer("se(reduction=8)")))  # noqa: S301
    module = layer(32, device="meta", dtype=torch.float64, rd_ratio=0.25, act_layer=torch.nn.ReLU)
    assert module.fc1.weight.dtype == torch.float64
    assert module.fc1.weight.device.type == "meta"
    assert module.fc1.out_features == 4
    with torch.device("meta"):
        network = timm.create_model("resnet50", block_args={"attn_layer": spem.attn_layer("spem")})
    channels = [module.channels for module in attentions(network)]
    assert channels == [256] * 3 + [512] * 4 + [1024] * 6 + [2048] * 3


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("none", "attn_layer: 'none' is the plain network"),
        ("speem", "unknown attention 'speem'. Did you mean spem"),
        ("iebn", "attn_layer: iebn goes in place of every norm"),
        ("ean", "attn_layer: ean is shared by the blocks of a stage"),
        ("fca", r"FCA: .*size"),  # each stage has maps of its own size, which timm does not pass on
    ],
)
def test_attn_layer_refuses(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spem.attn_layer(spec)(64)
