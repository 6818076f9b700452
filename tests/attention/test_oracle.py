"""Every module equals its formula, with all parameters and running statistics drawn at random."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from attention import oracles
from attention.cases import CASES, CHANNELS, Case
from attention.drawing import arrays, feature_map, randomise
from tolerance import TOLERANCE
from torch import Tensor, nn

SHAPES = {
    "line": (3, CHANNELS, 7),
    "plane": (3, CHANNELS, 4, 5),
    "volume": (3, CHANNELS, 2, 3, 4),
}

by_label = {case.label: case for case in CASES}


def random_module(case: Case, *, training: bool) -> nn.Module:
    module = randomise(case.module(4, 5).double(), case.label)
    return module.train(training)


def check(case: Case, x: Tensor, *, training: bool) -> None:
    module = random_module(case, training=training)
    before = copy.deepcopy(module)
    expected = case.expected(arrays(before), x.numpy(), training=training)
    gate = module.gate(x)
    assert gate.dtype == torch.float64
    np.testing.assert_allclose(
        np.broadcast_to(gate.detach().numpy(), x.shape),
        np.broadcast_to(expected, x.shape),
        **TOLERANCE[torch.float64],
    )
    out = module(x)
    assert out.shape == x.shape
    np.testing.assert_allclose(
        out.detach().numpy(),
        case.output(arrays(before), x.numpy(), training=training),
        **TOLERANCE[torch.float64],
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_equals_the_formula(case: Case) -> None:
    """In both modes, on maps of every rank that it takes; others it refuses by name."""
    for rank, shape in SHAPES.items():
        x = feature_map(*shape, key=case.label)
        if rank != "plane" and not case.any_rank:
            with pytest.raises(
                ValueError, match=type(random_module(case, training=False)).__name__
            ):
                random_module(case, training=False)(x)
            continue
        for training in (True, False):
            check(case, x, training=training)

    # without batch statistics the mode is nothing to it; of plane statistics, where a value stands
    module = random_module(case, training=True)
    x = feature_map(3, CHANNELS, 4, 5, key=case.label)
    if not case.batch_statistics:
        assert torch.equal(module(x), copy.deepcopy(module).eval()(x))
    order = torch.randperm(20, generator=torch.Generator().manual_seed(5))
    moved = x.flatten(2)[..., order].reshape(x.shape)
    assert not torch.equal(moved, x)
    if case.any_rank:
        torch.testing.assert_close(module.gate(moved), module.gate(x), **TOLERANCE[torch.float64])
    not_a_number_and_infinity_spread_as_in_the_formula(case)


def not_a_number_and_infinity_spread_as_in_the_formula(case: Case) -> None:
    """A bad value is never hidden, and never leaves its own sample."""
    module = random_module(case, training=False)
    clean = feature_map(4, CHANNELS, 4, 5, key=case.label)
    x = clean.clone()
    x[1, 2, 1, 1] = float("nan")
    x[2, 5, 3, 0] = float("inf")
    x[3, 0, 0, 4] = float("-inf")
    with np.errstate(all="ignore"):
        expected = case.output(arrays(module), x.numpy(), training=False)
    out = module(x).detach()
    np.testing.assert_allclose(
        out.numpy(), expected, **TOLERANCE[torch.float64]
    )  # NaN must meet NaN
    assert torch.isnan(out[1, 2, 1, 1])
    torch.testing.assert_close(out[0], module(clean)[0], **TOLERANCE[torch.float64])


@pytest.mark.parametrize(
    "label", ["cbam-avg-max-7", "cbam-avg-squares-7", "srm-avg", "srm-mix0.3", "srm-squares"]
)
def test_running_statistics(label: str) -> None:
    """A training batch moves them by 0.01 (CBAM), 0.1 (SRM) to the mean and unbiased variance."""
    case = by_label[label]
    module = random_module(case, training=True)
    before = arrays(module)
    x = feature_map(4, CHANNELS, 4, 5, key=label)
    module(x)
    after = arrays(module)
    if label.startswith("cbam"):
        pools = case.gate.keywords["pools"]
        _, v = oracles.cbam_spatial_input(before, x.numpy(), pools)
        momentum = 0.01
    else:
        v = oracles.srm_style(before, x.numpy(), case.gate.keywords["pool"])
        momentum = 0.1
    axes = (0, *range(2, v.ndim))
    for name, batch in (("running_mean", v.mean(axes)), ("running_var", v.var(axes, ddof=1))):
        expected = oracles.running(before[f"norm.{name}"], batch, momentum)
        np.testing.assert_allclose(after[f"norm.{name}"], expected, **TOLERANCE[torch.float64])
        assert not np.allclose(after[f"norm.{name}"], before[f"norm.{name}"])
