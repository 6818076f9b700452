"""Observing changes nothing: hooks, inspections and profilers, of all modules, in both layouts.

The maps are large enough for the fused tail, whose bits differ from those of composed modules.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import pytest
import torch
from attention.cases import ALL, sampled
from attention.drawing import feature_map, randomise
from torch import Tensor, nn

import spem
from spem.insert import IdentityStart


def network(name: str, layout: torch.memory_format) -> nn.Module:
    model = randomise(spem.resnet(11, attention=name), "observed", name).eval()
    return model.to(memory_format=layout)


def attentions(model: nn.Module) -> list[spem.ChannelAttention]:
    return [m for m in model.modules() if isinstance(m, spem.ChannelAttention)]


def hooked(model: nn.Module, run: Callable[[], Tensor], **kinds: list[nn.Module]) -> Tensor:
    handles = [m.register_forward_hook(lambda *_: None) for m in kinds.get("forward", [])]
    handles += [m.register_forward_pre_hook(lambda *_: None) for m in kinds.get("pre", [])]
    out = run()
    for handle in handles:
        handle.remove()
    return out


@pytest.mark.parametrize(
    ("name", "layout"), sampled(ALL, (torch.contiguous_format, torch.channels_last), each=1)
)
def test_outputs_are_the_same_bits(name: str, layout: torch.memory_format) -> None:
    model = network(name, layout)
    x = feature_map(32, 3, 32, 32, dtype=torch.float32).contiguous(memory_format=layout)
    found = attentions(model)
    every = list(model.modules())
    with torch.no_grad():
        plain = model(x)
        with spem.inspect(model) as inside:
            watched = model(x)
        assert not inside.silent
        assert torch.equal(watched, plain)
        assert torch.equal(hooked(model, lambda: model(x), forward=found), plain)
        assert torch.equal(hooked(model, lambda: model(x), forward=every, pre=every), plain)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
            profiled = model(x)
        assert torch.equal(profiled, plain)


@pytest.mark.parametrize("name", ["spem", "se", "srm", "eca", "dia", "ean", "cbam"])
def test_hooks_see_what_a_composed_network_would_show(name: str) -> None:
    model = network(name, torch.channels_last)
    seen: list[tuple[spem.ChannelAttention, tuple[object, ...], object]] = []
    for module in attentions(model):
        module.register_forward_hook(lambda m, args, out: seen.append((m, args, out)))
    x = feature_map(32, 3, 32, 32, dtype=torch.float32)
    with torch.no_grad():
        model(x)
        fused, seen = seen, []
        with spem.ops.use_impl("reference"):
            model(x)
    assert len(fused) == len(seen) >= 3
    for (module, args, out), (other, wanted_args, wanted) in zip(fused, seen, strict=True):
        assert module is other
        torch.testing.assert_close((args, out), (wanted_args, wanted), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["se", "dia", "cbam"])
def test_a_hook_that_changes_the_output_is_obeyed(name: str) -> None:
    model = network(name, torch.contiguous_format)
    x = feature_map(32, 3, 32, 32, dtype=torch.float32)
    with torch.no_grad():
        plain = model(x)
        for module in attentions(model):
            module.register_forward_hook(
                lambda _m, _a, out: (out[0] * 2, out[1]) if isinstance(out, tuple) else out * 2
            )
        doubled = model(x)
    with torch.enable_grad():  # composed
        expected = model(x)
    assert not torch.allclose(doubled, plain)
    torch.testing.assert_close(doubled, expected, rtol=1e-4, atol=1e-4)


def test_a_norm_whose_hook_changes_its_output_is_obeyed() -> None:
    model = network("se", torch.contiguous_format)
    x = feature_map(32, 3, 32, 32, dtype=torch.float32)
    with torch.no_grad():
        plain = model(x)
        model.layer1[0].bn3.register_forward_hook(lambda _m, _a, out: out + 1)
        changed = model(x)
    torch.testing.assert_close(changed, model(x).detach(), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(changed, plain)


@pytest.mark.parametrize("spec", ["se", "srm", "cbam", "ge(form=theta)", "dia", "gc"])
def test_observers_are_given_every_gate_once(spec: str) -> None:
    module = randomise(spem.create_attention(spec, 32, size=8), spec)
    given: list[tuple[Tensor, int]] = []
    unobserved = copy.deepcopy(module)
    handle = module.observe_gates(lambda gate, images: given.append((gate, images)))
    x = feature_map(4, 32, 8, 8, dtype=torch.float32)
    expected = unobserved.gate(x)
    module.gate(x)
    [(gate, images)] = given
    assert images == 4
    torch.testing.assert_close(gate.reshape(expected.shape), expected)
    handle.remove()
    module.gate(x)
    assert len(given) == 1


def test_gates_that_two_threads_compute_at_once_are_both_observed() -> None:
    """The second call begins, and ends, while the first one is inside its layer."""
    module = randomise(spem.SE(32), "se")
    x = feature_map(2, 32, 4, 4, dtype=torch.float32)
    inside, done = threading.Event(), threading.Event()

    def wait(*_: object) -> None:
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            assert done.wait(10)

    module.fc1.register_forward_pre_hook(wait)
    seen: list[int] = []
    module.observe_gates(lambda _, images: seen.append(images))
    other = threading.Thread(target=module.gate, args=(x[:1],))
    other.start()
    assert inside.wait(10)
    module.gate(x)
    assert seen == [2]
    done.set()
    other.join()
    assert seen == [2, 1]


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("spec", ["spem", "se(reduction=4)", "srm"])
def test_hooks_of_an_identity_start_change_no_bit(spec: str, grad: bool) -> None:
    """Of the start itself, which with gradients mean a composed tail, and of what it starts.

    That is asked for its gate alone, and not called.
    """
    start = randomise(IdentityStart(spem.create_attention(spec, 64)), spec).eval()
    norm = randomise(torch.nn.BatchNorm2d(64), "norm").eval()
    z = feature_map(8, 64, 16, 16, dtype=torch.float32)
    with torch.set_grad_enabled(grad):
        for module in (start, start.inner):
            plain = start.tail(z, z, norm)
            seen: list[Tensor] = []
            handle = module.register_forward_hook(lambda _m, _a, out, seen=seen: seen.append(out))
            hooked = start.tail(z, z, norm)
            assert ("hooks" in str(start.why_composed())) == (module is start)
            handle.remove()
            assert len(seen) == (module is start)
            if grad:
                torch.testing.assert_close(hooked, plain, rtol=1e-4, atol=1e-4)
            else:
                assert torch.equal(hooked, plain)
