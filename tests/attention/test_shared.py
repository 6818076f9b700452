"""Modules that the blocks of a stage share, and the state that one hands from block to block."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from attention import oracles
from attention.drawing import arrays, feature_map, randomise
from tolerance import TAIL, TOLERANCE
from torch import Tensor, nn

import spem
from spem import attention
from spem.models import blocks
from spem.ops import use_impl

MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
F64 = TOLERANCE[torch.float64]


def drawn(spec: str, depth: int = 20, *, training: bool = True) -> spem.ResNet:
    model = spem.resnet(depth, attention=spec)
    return randomise(model.double(), "places", spec).train(training)


def branch_ends(model: spem.ResNet) -> tuple[dict[str, Tensor], list[object]]:
    """What the last norm of every block gives, and the hooks that collect it."""
    seen: dict[str, Tensor] = {}
    hooks: list[object] = [
        block.last_norm.register_forward_hook(
            lambda _m, _i, out, name=name: seen.__setitem__(name, out.detach())
        )
        for name, block in blocks(model)
    ]
    return seen, hooks


def block_outputs(model: spem.ResNet, x: Tensor) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """Block by block: its name, what its last norm and its shortcut give, and its output."""
    seen, _ = branch_ends(model)
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    for name, block in blocks(model):
        block.register_forward_hook(
            lambda _m, args, out, name=name: (
                (
                    inputs.__setitem__(name, args[0].detach()),
                    outputs.__setitem__(name, out.detach()),
                )[2:]
                or None
            )
        )
    model(x)
    for name, block in blocks(model):
        shortcut = inputs[name]
        if block.downsample is not None:
            shortcut = copy.deepcopy(block.downsample)(shortcut)
        yield name, seen[name], shortcut.detach(), outputs[name]


@MODES
def test_ean_is_the_same_module_in_every_block(training: bool) -> None:
    model = drawn("ean", 29, training=training)
    for name, x, shortcut, out in block_outputs(model, feature_map(3, 3, 16, 16)):
        shared = model.get_submodule(name[:6]).shared
        assert type(shared) is attention.EAN
        torch.testing.assert_close(out, torch.relu(shared(x) + shortcut), **F64)


@MODES
@pytest.mark.parametrize("spec", ["dia", "dia(pool=mix())"])
def test_dia_hands_its_state_from_block_to_block(spec: str, training: bool) -> None:
    """Against the oracle, walked through the blocks; each stage begins again."""
    model = drawn(spec, 29, training=training)
    pool = "squares" if "mix" in spec else "avg"
    state, stage = None, ""
    for name, x, shortcut, out in block_outputs(model, feature_map(3, 3, 16, 16)):
        state = state if name[:6] == stage else None
        stage = name[:6]
        parameters = arrays(model.get_submodule(stage).shared)
        gate, state = oracles.dia(parameters, x.numpy(), state, pool=pool)
        expected = np.maximum(x.numpy() * gate + shortcut.numpy(), 0.0)
        np.testing.assert_allclose(out.numpy(), expected, **F64)
        if name.endswith(".2"):
            first, _ = oracles.dia(parameters, x.numpy(), None, pool=pool)
            assert np.abs(first - gate).max() > 1e-3


def test_a_step_of_dia_is_a_pure_function() -> None:
    module = randomise(attention.DIA(8).double(), "dia")
    x = feature_map(2, 8, 3, 4)
    y, state = module(x, ())
    assert torch.equal(y, module(x))
    assert [part.shape for part in state] == [(2, 8), (2, 8)]
    again, _ = module(x, state)
    assert not torch.allclose(again, y)
    assert torch.equal(again, x * module.gate(x, state))
    assert torch.equal(again, module(x, state)[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(part.dtype == torch.float32 for part in module.float()(x.float(), ())[1])


def walked(spec: str, impl: str) -> list[Tensor]:
    """Outputs and all gradients of three tails of one module, each fed by the one before."""
    module = randomise(spem.create_attention(spec, 8).double(), spec)
    norms = [randomise(nn.BatchNorm2d(8).double(), "norm", i) for i in range(3)]
    x = feature_map(3, 8, 6, 5).requires_grad_()
    residual = feature_map(3, 8, 6, 5, key="residual").requires_grad_()
    with use_impl(impl):
        tail, y = module.begin(), x
        for norm in norms:
            y = tail(y.sin(), residual, norm)
        (y * feature_map(3, 8, 6, 5, key="weights")).sum().backward()
    leaves = [x, residual, *module.parameters(), *(p for norm in norms for p in norm.parameters())]
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    assert len(gradients) == len(leaves)
    return [y.detach(), *gradients, *(b.double() for norm in norms for b in norm.buffers())]


@pytest.mark.parametrize("impl", ["formula", "numba"])
@pytest.mark.parametrize(
    "spec", ["dia(reduction=1)", "dia(pool=mix(), reduction=1)", "ean(reduction=1)"]
)
def test_a_shared_module_runs_in_the_fused_tail(spec: str, impl: str) -> None:
    """A state's gradient flows back through the statistics of the blocks before."""
    if impl == "numba":
        pytest.importorskip("numba")
    assert spem.create_attention(spec, 8).why_composed() is None
    for actual, expected in zip(walked(spec, impl), walked(spec, "reference"), strict=True):
        size = expected.abs().max()
        assert (actual - expected).abs().max() <= TAIL[torch.float64] * size


def test_hooks_see_every_block() -> None:
    model = drawn("dia", training=False)
    x = feature_map(2, 3, 16, 16)
    expected, seen = model(x), []
    shared = model.layer1.shared
    shared.register_forward_hook(lambda m, args, out: seen.append(m.gate(*args) * args[0] - out[0]))
    assert "hooks" in str(shared.why_composed())
    torch.testing.assert_close(model(x), expected, **F64)
    assert len(seen) == 2
    assert all(torch.equal(rest, torch.zeros_like(rest)) for rest in seen)
