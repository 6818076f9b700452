"""spem.inspect: the gates a network computes, without a bit of difference to its outputs."""

from __future__ import annotations

import contextlib
import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import spem
from spem.insert import IdentityStart
from spem.ops import use_impl

X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def scattered(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with all parameters and running statistics moved at random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator)
                tensor.mul_(1 + 0.2 * noise.abs()) if "var" in name else tensor.add_(0.1 * noise)
    return model


def network(spec: str) -> nn.Module:
    return scattered(spem.resnet(11, attention=spec))


def step(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Output and, in training, gradients."""
    y = model(x)
    if not model.training:
        return [y]
    F.cross_entropy(y, torch.arange(len(x)) % y.shape[1]).backward()
    return [y, *(p.grad for p in model.parameters() if p.grad is not None)]


class Compiled(nn.Module):
    """What torch.compile returns, without its imports: it holds the network as `_orig_mod`."""

    def __init__(self) -> None:
        super().__init__()
        self._orig_mod = spem.SE(16)


def untouched(model: nn.Module) -> bool:
    put = {"gate", "gate_from", "step", "begin"}
    return all(not m._forward_pre_hooks and not put & set(vars(m)) for m in model.modules())


@pytest.mark.parametrize("spec", [*spem.list_attention(), "se(pool=srp)", "gc(fusion=both)"])
def test_outputs_gradients_and_statistics_stay_bit_for_bit(spec: str):
    """With two passes before one backward: nothing that autograd kept is written to."""
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    plain = scattered(spem.resnet(11, attention=spec))
    seen = copy.deepcopy(plain)
    for train in (True, False):
        random = torch.random.get_rng_state()
        found: list[list[torch.Tensor]] = []
        for model in (plain, seen):
            model.train(train).zero_grad()
            buffers = {name: id(buffer) for name, buffer in model.named_buffers()}
            torch.random.set_rng_state(random)
            with spem.inspect(model) if model is seen else contextlib.nullcontext() as inside:
                outputs = [model(x), model(x.flip(0))]
                (outputs[0].square().mean() + outputs[1].mean()).backward()
            assert buffers == {name: id(buffer) for name, buffer in model.named_buffers()}
            found.append([*outputs, *(p.grad for p in model.parameters() if p.grad is not None)])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        assert not inside.silent
        assert all(torch.isfinite(record.gate).all() for record in inside.records)
        assert all(not record.gate.requires_grad for record in inside.records)
    states = zip(plain.state_dict().values(), seen.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in states)
    assert untouched(seen)


@pytest.mark.parametrize("train", [True, False])
def test_fused_tails_stay_fused(train: bool, caplog: pytest.LogCaptureFixture):
    pytest.importorskip("numba")
    plain = network("spem").train(train)
    seen = copy.deepcopy(plain)
    with use_impl("numba"):
        expected = step(plain, X)
        # A hook, which composes the tails, rounds otherwise: so equal bits mean fused tails.
        hooked = copy.deepcopy(plain)
        for module in hooked.modules():
            module.register_forward_pre_hook(lambda *_: None)
        with spem.inspect(seen) as inside:
            found = step(seen, X)
        assert not torch.equal(hooked(X), plain(X))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert [tuple(g.shape) for g in inside.gates.values()] == [(4, 64), (4, 128), (4, 256)]


def test_spem_gates_are_those_of_the_formula():
    model = network("spem").eval().double()
    maps: dict[str, np.ndarray] = {}
    clone = copy.deepcopy(model)
    for name, module in clone.named_modules():
        if isinstance(module, spem.SPEM):
            keep = lambda m, x, name=name: maps.__setitem__(name, x[0].detach().numpy())  # noqa: E731
            module.register_forward_pre_hook(keep)
    clone(X.double())
    with spem.inspect(model) as inside:
        model(X.double())
    assert list(inside.gates) == list(maps) == inside.names
    for name, x in maps.items():
        own = {k: p.detach().numpy() for k, p in model.get_submodule(name).named_parameters()}
        p0, p1 = own["pool.p"]
        lam = p0**2 / (p0**2 + p1**2)
        high, low = x.max((2, 3)), x.min((2, 3))
        excite = own["w_e"] * (lam * high + (1 - lam) * low) + own["b_e"]
        reweight = own["w_r"] * (high + low) + 2 * own["b_r"]
        expected = 1 / (1 + np.exp(-excite)) / (1 + np.exp(-reweight))
        np.testing.assert_allclose(inside.gates[name].numpy(), expected, rtol=1e-10)
        assert inside.lambdas[f"{name}.pool"] == pytest.approx(lam, rel=1e-12)
    assert inside.alphas == {}


def test_a_gate_is_what_the_map_is_multiplied_by():
    """x * gate + shift is the module's own answer, whatever shape its gate has."""
    for spec in spem.list_attention():
        module = spem.create_attention(spec, 64, size=8)
        if module.needs.replaces is not None:
            continue
        scattered(module).eval()
        x = torch.randn(2, 64, 8, 8, generator=torch.Generator().manual_seed(2))
        with spem.inspect(module) as inside:
            y = module(x)
        (record,) = inside.records
        assert inside.lambdas.keys() == {name for name, _ in spem.learned_mixes(module)}
        assert record.gate.shape in ((2, 64), (2, 64, 8, 8))
        gate, shift = record.gate, record.shift
        gate = gate[..., None, None] if gate.dim() == 2 else gate
        again = x * gate if shift is None else x * gate + shift[..., None, None]
        torch.testing.assert_close(again, y, rtol=1e-5, atol=1e-6)
        assert (shift is None) == (spec != "gc")


def test_the_blocks_that_share_an_attention_are_numbered_anew_in_every_pass():
    model = spem.resnet(20, attention="dia", block="basic").eval()
    with spem.inspect(model) as inside:
        model(X)
        model(X)
    names = [f"layer{stage}.shared[{block}]" for stage in (1, 2, 3) for block in (0, 1, 2)]
    assert list(inside.gates) == names
    assert [record.name for record in inside.records] == names * 2
    assert inside.names == ["layer1.shared", "layer2.shared", "layer3.shared"]
    # a state goes from block to block, so the gates differ
    assert not torch.equal(inside.gates[names[0]], inside.gates[names[1]])
    inside.clear()
    assert inside.gates == {}
    assert inside.silent == inside.names


@pytest.mark.parametrize("fuse", [False, True])
def test_attention_in_other_networks(fuse: bool):
    models = pytest.importorskip("torchvision.models")
    model = scattered(models.resnet18(weights=None)).eval()
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    sites = spem.attach(model, "spem", fuse=fuse)
    with torch.no_grad():
        for number, module in enumerate(m for m in model.modules() if isinstance(m, IdentityStart)):
            module.alpha.fill_(0.1 * number)
    expected = model(x)
    with spem.inspect(model) as inside:
        found = model(x)
    assert torch.equal(expected, found)
    assert inside.names == [f"{site}.attention" for site in sites]
    assert list(inside.alphas.values()) == pytest.approx([0.1 * n for n in range(8)])
    assert list(inside.alphas) == inside.names
    for number, record in enumerate(inside.records):
        assert record.own.shape == record.gate.shape == (2, record.module.channels)
        assert isinstance(record.module, spem.SPEM)
        by_hand = 1 + 0.1 * number * (record.own.double() - 1)
        torch.testing.assert_close(record.gate.double(), by_hand, rtol=1e-6, atol=1e-6)
    assert set(inside.lambdas) == {f"{name}.inner.pool" for name in inside.names}


def test_an_identity_start_that_mixes_maps():
    module = IdentityStart(scattered(spem.GC(32, fusion="both"))).eval()
    with torch.no_grad():
        module.alpha.fill_(0.3)
    x = torch.randn(2, 32, 6, 6, generator=torch.Generator().manual_seed(2))
    with spem.inspect(module) as inside:
        y = module(x)
    (record,) = inside.records
    assert record.shift is not None
    again = x * record.gate[..., None, None] + record.shift[..., None, None]
    torch.testing.assert_close(again, y, rtol=1e-5, atol=1e-6)


def test_a_layer_that_was_taken_over_from_the_host():
    timm = pytest.importorskip("timm")
    model = timm.create_model("mobilenetv3_small_050", pretrained=False).eval()
    sites = spem.attach(model, "se(pool=mix(0.3))", replace=True)
    expected = model(X)
    with spem.inspect(model) as inside:
        found = model(X)
    assert torch.equal(expected, found)
    assert inside.names == sites
    assert not inside.silent
    assert set(inside.lambdas.values()) == {0.3}


def test_nothing_stays_behind_an_exception_or_a_second_inspection():
    model = network("sk").train()
    inside = spem.inspect(model)

    def run_and_fail() -> None:
        with inside:
            model(X)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_and_fail()
    assert untouched(model)
    assert len(inside.records) == 3
    model = network("spem").eval()
    with spem.inspect(model) as outer:
        with spem.inspect(model) as inner:
            model(X)
        model(X)
    assert (len(outer.records), len(inner.records)) == (6, 3)
    assert untouched(model)
    with outer:
        model(X)
        with pytest.raises(RuntimeError, match="is running"), outer:
            pass
        model(X)
    assert len(outer.records) == 12
    assert untouched(model)


def test_attention_that_has_not_run_is_silent():
    model = nn.ModuleDict({"used": spem.SE(16), "idle": spem.SE(16)})
    with spem.inspect(model) as inside:
        model["used"](torch.randn(1, 16, 4, 4))
    assert inside.names == ["used", "idle"]
    assert inside.silent == ["idle"]


def test_what_cannot_be_inspected_says_so():
    with pytest.raises(ValueError, match="ResNet has no attention of this library"):
        spem.inspect(spem.resnet(11))
    with pytest.raises(TypeError, match=r"needs a torch\.nn\.Module, got str"):
        spem.inspect("spem")
    with pytest.raises(ValueError, match="the network is compiled"):
        spem.inspect(Compiled())


@pytest.mark.parametrize("attention", ["se", "iebn", "gc(reduction=4)"])
def test_a_host_that_names_the_argument(attention: str) -> None:
    class Host(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = spem.create_attention(attention, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attention(x=x)

    host, x = Host().eval(), X.repeat(1, 6, 1, 1)[:, :16]
    with spem.inspect(host) as inside:
        y = host(x)
    assert list(inside.gates) == ["attention"]
    assert torch.equal(y, host.attention(x))
    with pytest.raises(TypeError, match="'x'"):
        host.attention()
