"""SPEM's gate in training by kernels, against its formula in float64."""

import pytest
import torch

pytest.importorskip("numba")

import spem
from spem.ops import PlaneStats

TINY = torch.finfo(torch.float32).tiny
PARAMETERS = (
    (0.5, 0.5),
    (-0.3, 1.2),
    (0.0, 2.0),
    (3e-20, -4e-20),
    (0.0, 0.0),
    (TINY / 8, TINY / 4),
)


def formula(form, high, low, w_e, b_e, w_r, b_r, lam):
    s = torch.sigmoid
    u = lam * high + (1 - lam) * low
    factor = s((w_r * high + b_r) + (w_r * low + b_r))
    if form == "code":
        u = w_r * u + b_r
    e = w_e * u + b_e
    return s(e * factor) if form == "figure" else s(e) * factor


@pytest.mark.parametrize("form", ["text", "code", "figure"])
@pytest.mark.parametrize("shape", [(1, 1), (5, 37), (130, 70)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("p", [None, 0.0, -3.7, *PARAMETERS])
def test_kernels_equal_the_formula(form, shape, dtype, p):
    torch.manual_seed(0)
    pool = spem.Mix(0.3) if p is None else spem.Mix()
    if isinstance(p, float):
        pool = spem.Mix(parametrization="sigmoid")
    module = spem.SPEM(shape[1], form=form, pool=pool, dtype=dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
        if p is not None:
            next(module.pool.parameters()).copy_(torch.tensor(p))
    high, low, dv = (torch.randn(shape, dtype=dtype) for _ in range(3))
    inputs = [t.clone().requires_grad_() for t in (high, low)]
    stats = PlaneStats(None, None, *inputs, 9, shape[0], direct=True)
    v = module.gate_from(stats)
    assert type(v.grad_fn).__name__ == "_SpemGateBackward"
    weights = [module.w_e, module.b_e, module.w_r, module.b_r]
    learned = list(module.pool.parameters())
    got = [v.detach(), *torch.autograd.grad(v, [*inputs, *weights, *learned], dv)]

    exact = [t.detach().double().requires_grad_() for t in (*inputs, *weights)]
    known = [t.detach().double().requires_grad_() for t in learned]
    lam = torch.tensor(0.3, dtype=torch.float64)
    if isinstance(p, float):
        lam = torch.sigmoid(known[0])
    elif known and max(map(abs, p)) >= TINY:
        a, b = known[0] / max(map(abs, p))
        lam = a * a / (a * a + b * b)
    elif known:  # where |p| is subnormal, lambda is 1/2 and has no gradient
        lam = 0.5 + 0 * known[0].sum()
    expected = formula(form, *exact, lam)
    gradients = torch.autograd.grad(expected, [*exact, *known], dv.double())
    for one, other in zip(got, [expected.detach(), *gradients], strict=True):
        scale = float(other.abs().max()) or 1.0
        bound = 1e-13 if dtype == torch.float64 else 2e-5
        assert float((one.double() - other).abs().max()) <= bound * scale


@pytest.mark.parametrize("start", ["module", "identity"])
def test_observers_see_the_gate_in_training_and_change_no_bit(start):
    torch.manual_seed(0)
    attention = spem.SPEM(64)
    if start == "identity":
        attention = spem.insert.IdentityStart(attention)
        torch.nn.init.constant_(attention.alpha, 0.5)
    norm, z, r = torch.nn.BatchNorm2d(64), torch.randn(8, 64, 24, 24), torch.randn(8, 64, 24, 24)

    def results():
        parameters = list(attention.parameters())
        y = attention.tail(z, r, norm)
        return y, *torch.autograd.grad(y.sum(), parameters, allow_unused=True)

    before, seen = results(), []
    handle = attention.observe_gates(lambda gate, batch: seen.append((gate, batch)))
    after = results()
    handle.remove()
    assert [(tuple(gate.shape), batch) for gate, batch in seen] == [((8, 64), 8)]
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one, other)
