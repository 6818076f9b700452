"""Every module equals its formula, values and gradients, with all its numbers drawn at random."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from attention import oracles
from attention.cases import ALL, CASES, CHANNELS, EVERY, Case, cases_of
from attention.drawing import arrays, distinct_map, feature_map, generator, randomise
from tolerance import GRADCHECK, TOLERANCE
from torch import Tensor, nn
from torch.func import functional_call

import spem

SHAPES = {3: (3, CHANNELS, 7), 4: (3, CHANNELS, 4, 5), 5: (3, CHANNELS, 2, 3, 4)}
F64 = TOLERANCE[torch.float64]
LAYOUTS = (torch.contiguous_format, torch.channels_last)


def random_module(case: Case, *size: int, training: bool = True) -> spem.ChannelAttention:
    return randomise(case.module(*(size or (4, 5))), case.spec).train(training)


def check(case: Case, x: Tensor, *, training: bool) -> None:
    module = random_module(case, training=training)
    before = arrays(module)
    gate = module.gate(x)
    assert gate.dtype == torch.float64
    expected = case.expected(before, x.numpy(), training=training)
    found = np.broadcast_to(gate.detach().numpy(), x.shape)
    label = f"{case.spec}, {x.dim()} axes, training {training}"
    np.testing.assert_allclose(found, np.broadcast_to(expected, x.shape), err_msg=label, **F64)
    expected = case.output(before, x.numpy(), training=training)
    np.testing.assert_allclose(module(x).detach().numpy(), expected, err_msg=label, **F64)


@EVERY
def test_equals_the_formula(name: str) -> None:
    """In both modes, on maps of every rank that it takes; others it refuses by name."""
    for case in cases_of(name):
        module = random_module(case)
        for rank, shape in SHAPES.items():
            x = feature_map(*shape, key=case.spec)
            if rank not in module.ranks:
                with pytest.raises(ValueError, match=type(module).__name__):
                    module(x)
                continue
            for training in (True, False):
                check(case, x, training=training)
        # without batch statistics the mode is nothing to it; of plane statistics, where a value is
        x = feature_map(*SHAPES[4], key=case.spec)
        if not module.needs.batch_statistics:
            assert torch.equal(module(x), copy.deepcopy(module).eval()(x)), case.spec
        if module.takes_any_rank():
            moved = x.flatten(2)[..., torch.randperm(20, generator=generator(5))].reshape(x.shape)
            torch.testing.assert_close(module.gate(moved), module.gate(x), **F64)
        bad_values_are_never_hidden_and_never_leave_their_sample(case)


def bad_values_are_never_hidden_and_never_leave_their_sample(case: Case) -> None:
    module = random_module(case, training=False)
    clean = feature_map(4, CHANNELS, 4, 5, key=case.spec)
    x = clean.clone()
    x[1, 2, 1, 1], x[2, 5, 3, 0], x[3, 0, 0, 4] = float("nan"), float("inf"), float("-inf")
    with np.errstate(all="ignore"):
        expected = case.output(arrays(module), x.numpy(), training=False)
    out = module(x).detach()
    np.testing.assert_allclose(out.numpy(), expected, err_msg=case.spec, **F64)
    assert torch.isnan(out[1, 2, 1, 1])
    torch.testing.assert_close(out[0], module(clean)[0], **F64)


@pytest.mark.parametrize("name", ["cbam", "srm"])
def test_running_statistics(name: str) -> None:
    """A training batch moves them by 0.01 (CBAM), 0.1 (SRM) to the mean and unbiased variance."""
    case = cases_of(name)[0]
    module = random_module(case)
    before, x = arrays(module), feature_map(4, CHANNELS, 4, 5, key=name)
    module(x)
    after = arrays(module)
    options = case.gate.keywords
    if name == "cbam":
        v, momentum = oracles.cbam_spatial(before, x.numpy(), options["pools"])[1], 0.01
    else:
        v, momentum = oracles.srm_style(before, x.numpy(), options["pool"]), 0.1
    axes = (0, *range(2, v.ndim))
    for key, batch in (("running_mean", v.mean(axes)), ("running_var", v.var(axes, ddof=1))):
        old = before[f"norm.{key}"]
        np.testing.assert_allclose(
            after[f"norm.{key}"], (1 - momentum) * old + momentum * batch, **F64
        )
        assert not np.allclose(after[f"norm.{key}"], old)


def test_every_registered_module_has_cases() -> None:
    assert {case.name for case in CASES} == set(ALL)


@EVERY
def test_gradients(name: str) -> None:
    """Numerically, of all parameters but those whose gradient leaves something out by definition.

    Every parameter gets one, but those that a norm or softmax takes away again.
    """
    for case in cases_of(name, 4):
        module = random_module(case, 2, 3)
        # without batch statistics evaluation is the same function as training
        for training in (True, False) if module.needs.batch_statistics else (True,):
            module = random_module(case, 2, 3, training=training)
            stopped = module.needs.stops_gradients
            checked = {k: p for k, p in module.named_parameters() if k not in stopped}
            values = [p.detach().clone().requires_grad_() for p in checked.values()]

            def forward(x: Tensor, *values: Tensor) -> Tensor:
                given = dict(zip(checked, values, strict=True))  # noqa: B023  # called here alone
                return functional_call(module, given, (x,))  # noqa: B023

            x = distinct_map(2, CHANNELS, 2, 3, key=case.spec).requires_grad_()
            assert torch.autograd.gradcheck(forward, (x, *values), **GRADCHECK), case.spec
        module = random_module(case)
        x = feature_map(3, CHANNELS, 4, 5, key=case.spec).requires_grad_()
        (module(x) * feature_map(3, CHANNELS, 4, 5, key="weights")).sum().backward()
        for key, parameter in module.named_parameters():
            assert parameter.grad is not None, (case.spec, key)
            largest = parameter.grad.abs().max()
            assert (largest < 1e-12) == (key in case.idle), (case.spec, key)


def tied_map(kind: str, *shape: int) -> Tensor:
    """A map [N, C, H, W] in whose planes extrema repeat."""
    if kind == "few values":
        return torch.randint(0, 3, shape, generator=generator(kind, shape)).double()
    x = torch.zeros(shape, dtype=torch.float64)
    if kind == "constant":
        x += torch.randn(shape[:2], generator=generator(kind, shape))[..., None, None]
    if kind == "last maximum first minimum":
        x[..., -1, -1] = 1.0
    return x


KINDS = ("few values", "constant", "zero", "last maximum first minimum")


def first_extrema(x: Tensor) -> tuple[Tensor, Tensor]:
    """Row-major index of the first maximum and of the first minimum of every plane, [N, C, 1]."""
    flat = x.contiguous().flatten(2).numpy()
    # numpy gives the first one
    return torch.from_numpy(flat.argmax(-1)[..., None]), torch.from_numpy(
        flat.argmin(-1)[..., None]
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_statistics_send_the_gradient_to_the_first_extremum(
    kind: str, layout: torch.memory_format
) -> None:
    shape = (3, 6, 5, 4)
    x = tied_map(kind, *shape)
    leaf = x.clone(memory_format=layout).requires_grad_()
    stats = spem.ops.plane_stats(leaf, which=("max", "min"))
    high, low = torch.randn(2, *shape[:2], generator=generator(kind), dtype=torch.float64)
    ((stats.max * high) + (stats.min * low)).sum().backward()
    first_max, first_min = first_extrema(x)
    expected = torch.zeros(3, 6, 20, dtype=torch.float64)
    expected.scatter_add_(2, first_max, high[..., None]).scatter_add_(2, first_min, low[..., None])
    assert torch.equal(leaf.grad.contiguous().flatten(2), expected)


@pytest.mark.parametrize("shape", [(2, 3, 9), (2, 3, 2, 3, 4)])
def test_statistics_of_lines_and_volumes_do_so_too(shape: tuple[int, ...]) -> None:
    leaf = torch.randint(0, 3, shape, generator=generator("rank", shape)).double().requires_grad_()
    spem.ops.plane_stats(leaf, which=("max",)).max.sum().backward()
    expected = torch.zeros_like(leaf.detach().flatten(2))
    expected.scatter_(2, first_extrema(leaf.detach())[0], 1.0)
    assert torch.equal(leaf.grad.flatten(2), expected)


def gate_gradient(module: spem.ChannelAttention, x: Tensor, layout: torch.memory_format) -> Tensor:
    leaf = x.clone(memory_format=layout).requires_grad_()
    gate = module.gate(leaf)
    weights = torch.randn(gate.shape, generator=generator("upstream"), dtype=torch.float64)
    (gate * weights).sum().backward()
    return leaf.grad.contiguous().flatten(2)


@pytest.mark.parametrize("name", ["spem", "se", "eca"])
@pytest.mark.parametrize("kind", KINDS)
def test_modules_send_the_gradient_to_the_first_extremum(kind: str, name: str) -> None:
    extremal = [case for case in cases_of(name) if "pool=m" in case.spec]
    for number, case in enumerate(extremal):
        module, layout = random_module(case), LAYOUTS[number % 2]
        x = tied_map(kind, 3, CHANNELS, 5, 4)
        gradient = gate_gradient(module, x, layout)
        first_max, first_min = first_extrema(x)
        allowed = torch.zeros_like(gradient, dtype=torch.bool)
        allowed.scatter_(2, first_max, True).scatter_(2, first_min, True)
        assert not gradient[~allowed].any(), case.spec
        assert gradient.any()
        if kind in ("constant", "zero"):
            continue
        # the same extrema at the same places, now unique: the gradient must be the same
        flat = x.flatten(2)
        high, low = flat.amax(-1, keepdim=True), flat.amin(-1, keepdim=True)
        between = torch.rand(flat.shape, generator=generator("rest"), dtype=torch.float64)
        unique = low + (high - low) * (0.25 + 0.5 * between)
        unique = unique.scatter(2, first_max, high).scatter(2, first_min, low).reshape(x.shape)
        assert torch.equal(gradient, gate_gradient(module, unique, layout)), case.spec


@EVERY
def test_ties_and_layouts(name: str) -> None:
    """Constant planes have finite gradients; at ties both layouts choose the same position."""
    for case in cases_of(name, 2):
        module = random_module(case, 5, 4)
        weights = feature_map(3, CHANNELS, 5, 4)
        for kind in ("constant", "zero", "few values"):
            gradients: list[Tensor] = []
            for layout in LAYOUTS:
                own: nn.Module = copy.deepcopy(module)
                x = tied_map(kind, 3, CHANNELS, 5, 4).clone(memory_format=layout).requires_grad_()
                out = own(x)
                (out * weights).sum().backward()
                found = [x.grad.contiguous(), *(p.grad for p in own.parameters())]
                assert all(torch.isfinite(part).all() for part in (out, *found)), case.spec
                gradients.append(found[0])
            torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-10, atol=1e-12)
