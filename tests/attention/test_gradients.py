"""Gradients: numerically, and where the extremum of a plane is not unique."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from attention.cases import CASES, CHANNELS, Case, spread
from attention.drawing import distinct_map, feature_map, generator, randomise
from attention.registered import ALL, sampled
from tolerance import GRADCHECK
from torch import Tensor, nn
from torch.func import functional_call

import spem

LAYOUTS = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
EXTREMA = ("max", "min", "mix0.3", "squares", "anchored", "sigmoid")


def laid_out(x: Tensor, layout: str) -> Tensor:
    """A copy of its own in the layout."""
    memory = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    return x.clone(memory_format=memory)


def gradcheck(module: nn.Module, x: Tensor, stopped: tuple[str, ...] = ()) -> None:
    """Of all parameters but those whose gradient leaves something out by definition."""
    checked = {name: p for name, p in module.named_parameters() if name not in stopped}
    names = list(checked)
    values = [parameter.detach().clone().requires_grad_() for parameter in checked.values()]

    def forward(x: Tensor, *values: Tensor) -> Tensor:
        return functional_call(module, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(forward, (x.requires_grad_(), *values), **GRADCHECK)


@pytest.mark.parametrize("case", spread(4), ids=lambda case: case.label)
def test_gradcheck(case: Case) -> None:
    # without batch statistics evaluation is the same function as training
    for training in (True, False) if case.batch_statistics else (True,):
        module = randomise(case.module(2, 3).double(), "gradcheck", case.label).train(training)
        gradcheck(module, distinct_map(2, CHANNELS, 2, 3, key=case.label), case.stopped)
    every_parameter_receives_a_gradient(case)


def test_every_registered_module_has_cases() -> None:
    assert {case.label.split("-")[0] for case in CASES} == set(ALL)


def every_parameter_receives_a_gradient(case: Case) -> None:
    module = randomise(case.module(4, 5).double(), case.label)
    x = feature_map(3, CHANNELS, 4, 5, key=case.label).requires_grad_()
    (module(x) * feature_map(3, CHANNELS, 4, 5, key="weights")).sum().backward()
    assert x.grad is not None
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        if name in case.idle:
            assert parameter.grad.abs().max() < 1e-12, name
        else:
            assert parameter.grad.abs().max() > 1e-9, name


def tied_map(kind: str, *shape: int) -> Tensor:
    """A map [N, C, H, W] in whose planes extrema repeat."""
    if kind == "few values":
        return torch.randint(0, 3, shape, generator=generator(kind, shape)).double()
    if kind == "constant":
        planes = torch.randn(shape[:2], generator=generator(kind, shape), dtype=torch.float64)
        return planes[..., None, None].expand(shape).contiguous()
    if kind == "zero":
        return torch.zeros(shape, dtype=torch.float64)
    if kind == "last maximum first minimum":
        x = torch.zeros(shape, dtype=torch.float64)
        x[..., -1, -1] = 1.0
        return x
    raise AssertionError(kind)


KINDS = pytest.mark.parametrize(
    "kind", ["few values", "constant", "zero", "last maximum first minimum"]
)


def first_extrema(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Row-major index of the first maximum and of the first minimum of every plane, [N, C]."""
    flat = x.contiguous().flatten(2).numpy()
    return flat.argmax(-1), flat.argmin(-1)  # numpy gives the first one


@LAYOUTS
@KINDS
def test_statistics_send_the_gradient_to_the_first_extremum(kind: str, layout: str) -> None:
    shape = (3, 6, 5, 4)
    x = tied_map(kind, *shape)
    leaf = laid_out(x, layout).requires_grad_()
    stats = spem.ops.plane_stats(leaf, which=("max", "min"))
    high = torch.randn(shape[:2], generator=generator("high"), dtype=torch.float64)
    low = torch.randn(shape[:2], generator=generator("low"), dtype=torch.float64)
    ((stats.max * high) + (stats.min * low)).sum().backward()
    expected = torch.zeros(3, 6, 20, dtype=torch.float64)
    first_max, first_min = (torch.from_numpy(i)[..., None] for i in first_extrema(x))
    expected.scatter_add_(2, first_max, high[..., None])
    expected.scatter_add_(2, first_min, low[..., None])
    assert torch.equal(leaf.grad.contiguous().flatten(2), expected)


@pytest.mark.parametrize("shape", [(2, 3, 9), (2, 3, 2, 3, 4)])
def test_statistics_of_lines_and_volumes_do_so_too(shape: tuple[int, ...]) -> None:
    leaf = torch.randint(0, 3, shape, generator=generator("rank", shape)).double().requires_grad_()
    spem.ops.plane_stats(leaf, which=("max",)).max.sum().backward()
    flat = leaf.detach().flatten(2)
    expected = torch.zeros_like(flat).scatter_(
        2, torch.from_numpy(flat.numpy().argmax(-1))[..., None], 1.0
    )
    assert torch.equal(leaf.grad.flatten(2), expected)


def gate_gradient(module: nn.Module, x: Tensor, layout: str) -> Tensor:
    leaf = laid_out(x, layout).requires_grad_()
    gate = module.gate(leaf)
    (
        gate * torch.randn(gate.shape, generator=generator("upstream"), dtype=torch.float64)
    ).sum().backward()
    return leaf.grad.contiguous().flatten(2)


def extremal_cases() -> list[Case]:
    """Modules whose gate is a function of maxima and minima alone."""
    return [
        case
        for case in CASES
        if case.label.startswith(("spem", "se-", "eca-")) and case.label.endswith(EXTREMA)
    ]


@pytest.mark.parametrize(
    ("case", "kind", "layout"),
    sampled(extremal_cases()[::2], KINDS.args[1], LAYOUTS.args[1], each=1),
    ids=lambda value: value.label if isinstance(value, Case) else value,
)
def test_modules_send_the_gradient_to_the_first_extremum(
    case: Case, kind: str, layout: str
) -> None:
    module = randomise(case.make().double(), "first extremum", case.label)
    x = tied_map(kind, 3, CHANNELS, 5, 4)
    gradient = gate_gradient(module, x, layout)
    first_max, first_min = (torch.from_numpy(i)[..., None] for i in first_extrema(x))
    allowed = torch.zeros_like(gradient, dtype=torch.bool)
    allowed.scatter_(2, first_max, True)
    allowed.scatter_(2, first_min, True)
    assert not gradient[~allowed].any()
    assert gradient.any()

    # the same extrema at the same places, now unique: the gradient must be the same
    if kind in ("constant", "zero"):
        return
    flat = x.flatten(2)
    high, low = flat.amax(-1, keepdim=True), flat.amin(-1, keepdim=True)
    unique = low + (high - low) * (
        0.25 + 0.5 * torch.rand(flat.shape, generator=generator("rest"), dtype=torch.float64)
    )
    unique = unique.scatter(2, first_max, high).scatter(2, first_min, low).reshape(x.shape)
    assert torch.equal(gradient, gate_gradient(module, unique, layout))


@pytest.mark.parametrize("case", spread(2), ids=lambda case: case.label)
def test_ties_and_layouts(case: Case) -> None:
    """Constant planes have finite gradients; at ties both layouts choose the same position."""
    module = randomise(case.module(5, 4).double(), "ties", case.label)
    weights = feature_map(3, CHANNELS, 5, 4)
    for kind in ("constant", "zero", "few values"):
        gradients = []
        for layout in ("contiguous", "channels_last"):
            module.zero_grad()
            x = laid_out(tied_map(kind, 3, CHANNELS, 5, 4), layout).requires_grad_()
            out = copy.deepcopy(module)(x) if kind == "few values" else module(x)
            assert torch.isfinite(out).all()
            (out * weights).sum().backward()
            gradients.append(x.grad.contiguous())
            if kind != "few values":
                for name, parameter in module.named_parameters():
                    assert torch.isfinite(parameter.grad).all(), name
        assert torch.isfinite(gradients[0]).all()
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-10, atol=1e-12)
