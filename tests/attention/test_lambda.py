"""lambda of a learned mix: its value, its gradient, its range of numbers, and the penalty."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from attention import oracles
from attention.cases import CHANNELS
from attention.drawing import arrays, feature_map, randomise
from tolerance import TOLERANCE
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import spem


def mix(parametrization: str = "squares", dtype: torch.dtype = torch.float32) -> nn.Module:
    """The pool of a SPEM module."""
    return spem.SPEM(4, pool=spem.Mix(parametrization=parametrization), dtype=dtype).pool


def set_p(pool: nn.Module, p0: float, p1: float) -> nn.Module:
    with torch.no_grad():
        pool.p.copy_(torch.tensor([p0, p1], dtype=torch.float64))
    return pool


def lam_and_gradient(pool: nn.Module) -> tuple[Tensor, Tensor]:
    pool.p.grad = None
    lam = pool.lam
    lam.backward()
    assert pool.p.grad is not None
    return lam.detach(), pool.p.grad.clone()


def test_start() -> None:
    for name in ("squares", "anchored"):
        pool = mix(name)
        assert pool.p.tolist() == [0.5, 0.5]
        assert pool.lam.item() == 0.5
    pool = mix("sigmoid")
    assert pool.logit.shape == ()
    assert pool.logit.item() == 0.0
    assert pool.lam.item() == 0.5


@pytest.mark.parametrize("name", ["squares", "anchored"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_p_gives_one_half_with_a_zero_gradient(name: str, dtype: torch.dtype) -> None:
    lam, gradient = lam_and_gradient(set_p(mix(name, dtype), 0.0, 0.0))
    assert lam.item() == 0.5
    assert torch.equal(gradient, torch.zeros(2, dtype=dtype))


@pytest.mark.parametrize("size", [1e-39, 1e-42, -1e-40])
def test_p_below_the_smallest_normal_number_counts_as_zero(size: float) -> None:
    lam, gradient = lam_and_gradient(set_p(mix(), size, 0.5 * size))
    assert lam.item() == 0.5
    assert torch.equal(gradient, torch.zeros(2))


@pytest.mark.parametrize("name", ["squares", "anchored"])
def test_a_value(name: str) -> None:
    assert set_p(mix(name), 0.3, -0.8).lam.item() == pytest.approx(9 / 73, rel=1e-6)
    assert set_p(mix(name, torch.float64), 0.3, -0.8).lam.item() == pytest.approx(9 / 73, rel=1e-14)


@pytest.mark.parametrize(
    ("p0", "p1", "expected"), [(1.0, 0.0, 1.0), (0.0, -2.0, 0.0), (-3.0, 3.0, 0.5)]
)
def test_edges(p0: float, p1: float, expected: float) -> None:
    lam, gradient = lam_and_gradient(set_p(mix(), p0, p1))
    assert lam.item() == expected
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("size", [1e-30, 1e-23, 1e-10, 1e-4, 1.0, 1e10, 1e18, 1e19, 1e30, 1e38])
def test_only_the_direction_of_p_matters(size: float) -> None:
    lam, gradient = lam_and_gradient(set_p(mix(), 0.6 * size, -0.7 * size))
    p0, p1 = 0.6, -0.7
    square = (p0 * p0 + p1 * p1) ** 2
    assert lam.item() == pytest.approx(0.36 / 0.85, rel=1e-6)
    expected = np.array([2 * p0 * p1 * p1 / square, -2 * p0 * p0 * p1 / square]) / size
    np.testing.assert_allclose(gradient.double().numpy(), expected, rtol=1e-5, atol=1e-44)


def test_even_in_p() -> None:
    expected = set_p(mix(), 0.31, 0.77).lam
    for p in [(-0.31, 0.77), (0.31, -0.77), (-0.31, -0.77)]:
        assert torch.equal(set_p(mix(), *p).lam, expected)


@pytest.mark.parametrize(
    "p",
    [(float("nan"), 0.5), (0.5, float("nan")), (float("nan"), float("nan")), (float("nan"), 0.0)],
)
def test_a_nan_is_not_hidden(p: tuple[float, float]) -> None:
    assert torch.isnan(set_p(mix(), *p).lam)


@pytest.mark.parametrize("parametrization", ["squares", "anchored", "sigmoid"])
def test_equals_the_formula(parametrization: str) -> None:
    for seed in range(5):
        pool = randomise(mix(parametrization, torch.float64), "lambda", seed)
        parameter = next(iter(arrays(pool).values()))
        assert pool.lam.shape == ()
        assert pool.lam.item() == pytest.approx(oracles.lam(parametrization, parameter), rel=1e-12)
        assert pool.magnitude.shape == ()
        assert pool.magnitude.item() == pytest.approx(
            float(np.sqrt((parameter**2).sum())), rel=1e-12
        )


@pytest.mark.parametrize("parametrization", ["squares", "anchored"])
def test_gradient_in_float64(parametrization: str) -> None:
    pool = randomise(mix(parametrization, torch.float64), "gradient")
    p0, p1 = arrays(pool)["p"]
    _, gradient = lam_and_gradient(pool)
    square = (p0 * p0 + p1 * p1) ** 2
    np.testing.assert_allclose(
        gradient.numpy(), [2 * p0 * p1**2 / square, -2 * p0**2 * p1 / square], rtol=1e-12
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("parametrization", ["squares", "anchored", "sigmoid"])
def test_lambda_has_at_least_float32(parametrization: str, dtype: torch.dtype) -> None:
    pool = randomise(mix(parametrization), "half").to(dtype)
    parameter = next(iter(arrays(pool).values()))  # as rounded
    assert pool.lam.dtype == torch.float32
    assert pool.lam.item() == pytest.approx(oracles.lam(parametrization, parameter), rel=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert pool.lam.dtype == torch.float32
        assert pool.lam.item() == pytest.approx(oracles.lam(parametrization, parameter), rel=1e-6)


def test_float16_components_where_the_direct_formula_is_wrong() -> None:
    pool = set_p(mix(dtype=torch.float16), 3e-4, 6e-4)
    assert pool.lam.item() == pytest.approx(
        0.2, rel=2e-3
    )  # the components themselves are rounded to 5e-4


@pytest.mark.parametrize("constant", [0.0, 0.1, 0.3, 1.0])
def test_a_constant_mix_has_no_parameter(constant: float) -> None:
    module = spem.SPEM(CHANNELS, pool=spem.Mix(constant))
    assert set(dict(module.named_parameters())) == {"w_e", "b_e", "w_r", "b_r"}
    assert spem.learned_mixes(module) == []
    assert spem.penalty(module).item() == 0.0


@pytest.mark.parametrize(("constant", "pure"), [(1.0, "max"), (0.0, "min")])
@pytest.mark.parametrize("name", ["spem", "se", "eca", "srm", "sge"])
def test_lambda_one_and_zero_are_the_pure_pools(name: str, constant: float, pure: str) -> None:
    x = feature_map(3, 64, 4, 5)
    mixed = randomise(spem.create_attention(f"{name}(pool=mix({constant}))", 64).double(), name)
    single = randomise(spem.create_attention(f"{name}(pool={pure})", 64).double(), name)
    torch.testing.assert_close(mixed(x), single(x), **TOLERANCE[torch.float64])


@pytest.mark.parametrize("constant", [-0.1, 1.1, float("nan"), float("inf")])
def test_a_constant_outside_0_and_1_is_refused(constant: float) -> None:
    with pytest.raises(ValueError, match=r"lam"):
        spem.SPEM(4, pool=spem.Mix(constant))


def test_an_unknown_parametrization_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"softmax.*squares.*anchored.*sigmoid"):
        spem.SPEM(4, pool=spem.Mix(parametrization="softmax"))


def test_one_mix_value_serves_many_modules() -> None:
    """A Mix is a description: modules made from the same one must not share parameters."""
    shared = spem.Mix()
    first, second = spem.SPEM(4, pool=shared), spem.SPEM(4, pool=shared)
    assert first.pool.p is not second.pool.p
    assert spem.SPEM(4).pool.p is not spem.SPEM(4).pool.p  # nor those made from the default


@pytest.mark.parametrize("parametrization", ["squares", "anchored", "sigmoid"])
def test_penalty(parametrization: str) -> None:
    net = nn.Sequential(
        spem.SPEM(4, pool=spem.Mix(parametrization=parametrization)),
        nn.Conv2d(4, 64, 1),
        nn.Sequential(spem.SE(64, pool=spem.Mix(parametrization=parametrization)), spem.SE(64)),
        spem.SPEM(64, pool=spem.Mix(0.3)),
    ).double()
    randomise(net, "penalty", parametrization)
    parameters = oracles.mix_parameters(arrays(net))
    assert len(parameters) == 2
    result = spem.penalty(net)
    assert result.shape == ()
    expected = sum(oracles.penalty(parametrization, p) for p in parameters)
    assert result.item() == pytest.approx(expected, rel=1e-12)

    result.backward()
    for name, parameter in net.named_parameters():
        if name.rpartition(".")[2] not in ("p", "logit"):
            assert parameter.grad is None, f"{name} is not part of the penalty"
            continue
        value = parameter.detach().numpy()
        slope = 2 * value
        if parametrization == "anchored":
            slope = 4 * ((value**2).sum() - 0.5) * value
        np.testing.assert_allclose(parameter.grad.numpy(), slope, rtol=1e-12)


@pytest.mark.parametrize(
    ("parametrization", "start"), [("squares", 0.5), ("anchored", 0.0), ("sigmoid", 0.0)]
)
def test_penalty_of_a_fresh_module(parametrization: str, start: float) -> None:
    assert (
        spem.penalty(spem.SPEM(8, pool=spem.Mix(parametrization=parametrization))).item() == start
    )


def test_penalty_without_a_learned_mix_is_a_zero() -> None:
    for module in (nn.Linear(2, 2), spem.SE(64), nn.Sequential()):
        result = spem.penalty(module)
        assert result.shape == ()
        assert result.item() == 0.0
    (spem.penalty(spem.SE(64)) + torch.ones((), requires_grad=True)).backward()


def test_penalty_is_summed_in_float32_for_half_models() -> None:
    net = nn.Sequential(*(spem.SPEM(2) for _ in range(3))).half()
    randomise(net, "half")
    expected = sum(oracles.penalty("squares", p) for p in oracles.mix_parameters(arrays(net)))
    result = spem.penalty(net)
    assert result.dtype == torch.float32
    assert result.item() == pytest.approx(expected, rel=1e-6)


def test_learned_mixes_are_named() -> None:
    net = nn.Sequential(
        spem.SPEM(4), spem.SE(64), spem.SE(64, pool=spem.Mix(parametrization="sigmoid"))
    )
    mixes = spem.learned_mixes(net)
    assert [name.split(".")[0] for name, _ in mixes] == ["0", "2"]
    assert mixes[0][1] is net[0].pool
    assert mixes[1][1] is net[2].pool


def test_without_a_gradient_lambda_is_the_same_number() -> None:
    some = [0.5, -0.3, 0.0, 0.8, 1e-30, -1e-20, 1e-39, 1e-42, -3e38, 2e38, torch.inf, torch.nan]
    stats = spem.ops.plane_stats(torch.randn(2, 4, 3, 3), ("max", "min"))
    for p0 in some:
        for p1 in some:
            pool = set_p(mix(), p0, p1)
            with torch.no_grad():
                lam, without = pool.lam, pool(stats)
            torch.testing.assert_close(lam, pool.lam.detach(), rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(
                without, pool(stats).detach(), rtol=0, atol=0, equal_nan=True
            )


@pytest.mark.filterwarnings("ignore")  # tracing is deprecated, and says what it records
@pytest.mark.parametrize("recorded", ["compile", "trace", "vmap", "make_fx"])
def test_lambda_does_not_become_a_constant_of_a_recorded_graph(recorded: str) -> None:
    x = torch.randn(2, 4, 3, 3)
    module = spem.SPEM(4)
    torch.nn.init.normal_(module.w_e)
    run: Any
    if recorded == "compile":
        run = torch.compile(module, fullgraph=True, backend="aot_eager")
    elif recorded == "trace":
        run = torch.jit.trace(module, x)
    elif recorded == "make_fx":

        def called(p: Tensor, x: Tensor) -> Tensor:
            return torch.func.functional_call(module, {"pool.p": p}, (x,))

        with torch.no_grad():
            graph = make_fx(called)(module.get_parameter("pool.p"), x)

        def replayed(x: Tensor) -> Tensor:
            return graph(module.get_parameter("pool.p"), x)

        run = replayed
    else:

        def mapped(x: Tensor) -> Tensor:
            def one(p: Tensor) -> Tensor:
                return torch.func.functional_call(module, {"pool.p": p}, (x,))

            parameter = module.get_parameter("pool.p")
            return torch.vmap(one)(parameter[None])[0]

        run = mapped

    for p in ((0.5, 0.5), (0.9, 0.1)):
        set_p(module.pool, *p)
        with torch.no_grad():
            torch.testing.assert_close(run(x), module(x))
