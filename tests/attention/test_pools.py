"""Pools: lambda of a learned mix, its penalty, and stochastic region pooling."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import numpy as np
import pytest
import torch
from attention import oracles
from attention.cases import ALL, CHANNELS
from attention.drawing import arrays, distinct_map, feature_map, randomise
from tolerance import GRADCHECK, TOLERANCE
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

import spem
from spem.attention import SRP, Mix
from spem.attention.pooling import RegionPool, _hash

F64 = TOLERANCE[torch.float64]
LEARNED = ("squares", "anchored", "sigmoid")


def mix(parametrization: str = "squares", dtype: torch.dtype = torch.float32) -> nn.Module:
    """The pool of a SPEM module."""
    return spem.SPEM(4, pool=Mix(parametrization=parametrization), dtype=dtype).pool


def set_p(pool: nn.Module, p0: float, p1: float) -> nn.Module:
    with torch.no_grad():
        pool.p.copy_(torch.tensor([p0, p1], dtype=torch.float64))
    return pool


def lam_and_gradient(pool: nn.Module) -> tuple[float, Tensor]:
    pool.p.grad = None
    lam = pool.lam
    lam.backward()
    return lam.item(), pool.p.grad.clone()


def test_start() -> None:
    for name in LEARNED:
        pool = mix(name)
        assert next(pool.parameters()).tolist() == (0.0 if name == "sigmoid" else [0.5, 0.5])
        assert pool.lam.item() == 0.5
        fresh = spem.penalty(spem.SPEM(8, pool=Mix(parametrization=name)))
        assert fresh.item() == (0.5 if name == "squares" else 0.0)


@pytest.mark.parametrize("name", LEARNED)
def test_lambda_and_its_gradient_are_the_formulas(name: str) -> None:
    for seed in range(5):
        pool = randomise(mix(name, torch.float64), "lambda", seed)
        parameter = next(iter(arrays(pool).values()))
        assert pool.lam.shape == pool.magnitude.shape == ()
        assert pool.lam.item() == pytest.approx(oracles.lam(name, parameter), rel=1e-12)
        size = float(np.sqrt((parameter**2).sum()))
        assert pool.magnitude.item() == pytest.approx(size, rel=1e-12)
        if name != "sigmoid":
            (p0, p1), (_, gradient) = parameter, lam_and_gradient(pool)
            slope = np.array([2 * p0 * p1**2, -2 * p0**2 * p1]) / (p0 * p0 + p1 * p1) ** 2
            np.testing.assert_allclose(gradient.numpy(), slope, rtol=1e-12)
    for dtype in (torch.float16, torch.bfloat16):
        pool = randomise(mix(name), "half").to(dtype)
        expected = oracles.lam(name, next(iter(arrays(pool).values())))  # as rounded
        for autocast in (False, True):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                assert pool.lam.dtype == torch.float32
                assert pool.lam.item() == pytest.approx(expected, rel=1e-6)


def test_lambda_at_the_edges() -> None:
    """Zero and subnormal p give 1/2 without a gradient; a NaN is not hidden."""
    for size in (0.0, 1e-39, 1e-42, -1e-40):
        lam, gradient = lam_and_gradient(set_p(mix(), size, 0.5 * size))
        assert lam == 0.5
        assert torch.equal(gradient, torch.zeros(2))
    for p0, p1, expected in ((1.0, 0.0, 1.0), (0.0, -2.0, 0.0), (-3.0, 3.0, 0.5)):
        lam, gradient = lam_and_gradient(set_p(mix(), p0, p1))
        assert lam == expected
        assert torch.isfinite(gradient).all()
    nan = float("nan")
    for p in ((nan, 0.5), (0.5, nan), (nan, nan), (nan, 0.0)):
        assert torch.isnan(set_p(mix(), *p).lam)
    for signs in ((-1, 1), (1, -1), (-1, -1)):
        assert torch.equal(
            set_p(mix(), 0.31 * signs[0], 0.77 * signs[1]).lam, set_p(mix(), 0.31, 0.77).lam
        )
    # components that float16 rounds to 5e-4, where the direct formula is wrong
    assert set_p(mix(dtype=torch.float16), 3e-4, 6e-4).lam.item() == pytest.approx(0.2, rel=2e-3)


@pytest.mark.parametrize("size", [1e-30, 1e-23, 1e-4, 1e18, 1e19, 1e38])
def test_only_the_direction_of_p_matters(size: float) -> None:
    lam, gradient = lam_and_gradient(set_p(mix(), 0.6 * size, -0.7 * size))
    assert lam == pytest.approx(0.36 / 0.85, rel=1e-6)
    expected = np.array([2 * 0.6 * 0.49, 2 * 0.36 * 0.7]) / 0.85**2 / size
    np.testing.assert_allclose(gradient.double().numpy(), expected, rtol=1e-5, atol=1e-44)


def test_constant_mixes() -> None:
    """No parameter, no penalty; 1 and 0 are the pure pools."""
    module = spem.SPEM(CHANNELS, pool=Mix(0.3))
    assert set(dict(module.named_parameters())) == {"w_e", "b_e", "w_r", "b_r"}
    assert spem.learned_mixes(module) == []
    assert spem.penalty(module).item() == 0.0
    x = feature_map(3, 64, 4, 5)
    for name in ("spem", "se", "eca", "srm", "sge"):
        for constant, pure in ((1.0, "max"), (0.0, "min")):
            specs = (f"{name}(pool=mix({constant}))", f"{name}(pool={pure})")
            modules = [randomise(spem.create_attention(s, 64).double(), name) for s in specs]
            torch.testing.assert_close(modules[0](x), modules[1](x), **F64)
    for constant in (-0.1, 1.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"lam"):
            Mix(constant)
    with pytest.raises(ValueError, match=r"softmax.*squares.*anchored.*sigmoid"):
        Mix(parametrization="softmax")
    with pytest.raises(ValueError, match=r"parametrization='sigmoid' needs a learned lambda"):
        Mix(0.3, parametrization="sigmoid")


@pytest.mark.parametrize("parametrization", LEARNED)
def test_penalty(parametrization: str) -> None:
    pool = Mix(parametrization=parametrization)  # one description, a parameter for every module
    net = nn.Sequential(
        spem.SPEM(4, pool=pool),
        nn.Conv2d(4, 64, 1),
        nn.Sequential(spem.SE(64, pool=pool), spem.SE(64)),
        spem.SPEM(64, pool=Mix(0.3)),
    ).double()
    randomise(net, "penalty", parametrization)
    assert [name for name, _ in spem.learned_mixes(net)] == ["0.pool", "2.0.pool"]
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
        factor = 4 * ((value**2).sum() - 0.5) if parametrization == "anchored" else 2
        np.testing.assert_allclose(parameter.grad.numpy(), factor * value, rtol=1e-12)
    half = net.half()
    expected = sum(
        oracles.penalty(parametrization, p) for p in oracles.mix_parameters(arrays(half))
    )
    assert spem.penalty(half).dtype == torch.float32
    assert spem.penalty(half).item() == pytest.approx(expected, rel=1e-6)


def test_penalty_without_a_learned_mix_is_a_zero() -> None:
    for module in (nn.Linear(2, 2), spem.SE(64), nn.Sequential()):
        result = spem.penalty(module)
        assert result.shape == ()
        assert result.item() == 0.0
    (spem.penalty(spem.SE(64)) + torch.ones((), requires_grad=True)).backward()


@pytest.mark.filterwarnings("ignore")  # tracing is deprecated, and says what it records
@pytest.mark.parametrize("recorded", ["compile", "trace", "vmap", "make_fx"])
def test_lambda_does_not_become_a_constant_of_a_recorded_graph(recorded: str) -> None:
    x = torch.randn(2, 4, 3, 3)
    module = spem.SPEM(4)
    nn.init.normal_(module.w_e)

    def called(p: Tensor, x: Tensor) -> Tensor:
        return functional_call(module, {"pool.p": p}, (x,))

    run: Any
    if recorded == "compile":
        run = torch.compile(module, fullgraph=True, backend="aot_eager")
    elif recorded == "trace":
        run = torch.jit.trace(module, x)
    elif recorded == "make_fx":
        with torch.no_grad():
            graph = make_fx(called)(module.pool.p, x)
        run = lambda x: graph(module.pool.p, x)  # noqa: E731
    else:
        run = lambda x: torch.vmap(lambda p: called(p, x))(module.pool.p[None])[0]  # noqa: E731
    for p in ((0.5, 0.5), (0.9, 0.1)):
        set_p(module.pool, *p)
        with torch.no_grad():
            torch.testing.assert_close(run(x), module(x))


# ---- stochastic region pooling

POOLED = [
    n for n in ALL if "pool" in inspect.signature(spem.attention.attention_class(n)).parameters
]
PER = ("image", "channel", "batch")


def stats(x: Tensor) -> object:
    """What a module hands to its pool."""
    return spem.SE(x.shape[1], reduction=1, pool="srp").double().stats_of(x)


def pool_of(text: str, seed: int = 0) -> RegionPool:
    module = spem.create_attention(f"se(pool={text})", 64)
    spem.initialise(nn.Sequential(module), seed)
    assert isinstance(module.pool, RegionPool)
    return module.pool


def weights(pool: nn.Module, images: int, *size: int) -> np.ndarray:
    """The weight of every position in the descriptors of the next batch, [images, positions].

    Every channel is 1 at a position of its own, so its descriptor is the weight of that position;
    for boxes by image or batch, which all channels share.
    """
    positions = int(np.prod(size))
    maps = torch.eye(positions, dtype=torch.float64).reshape(1, positions, *size)
    maps = maps.expand(images, -1, *[-1] * len(size))
    return pool(stats(maps)).numpy().reshape(images, *size)


@pytest.mark.parametrize(
    ("share", "size", "box"),
    [
        (0.5, (8, 6), (4, 3)),
        (0.1, (4, 3), (1, 1)),
        (0.5, (5, 3), (3, 2)),
        (1.0, (5, 4), (5, 4)),
        (0.5, (9,), (5,)),
        (0.5, (4, 3, 2), (2, 2, 1)),
    ],
)
def test_a_descriptor_is_the_mean_over_a_box(
    share: float, size: tuple[int, ...], box: tuple[int, ...]
) -> None:
    places = set()
    for image in weights(pool_of(f"srp(share={share})"), 20, *size):
        inside = np.argwhere(image > 0)
        low, high = inside.min(0), inside.max(0)
        assert tuple(high - low + 1) == box
        assert len(inside) == np.prod(box)
        np.testing.assert_allclose(image[image > 0], 1 / np.prod(box), rtol=1e-12)
        places.add(tuple(low))
    assert len(places) > 1 or share == 1.0


def test_several_boxes_and_what_has_boxes_of_its_own() -> None:
    found = weights(pool_of("srp(regions=3, share=0.25)"), 30, 8, 8)
    np.testing.assert_allclose(found.sum((1, 2)), 1.0, rtol=1e-12)
    np.testing.assert_allclose(found * 4 * 3, np.round(found * 4 * 3), atol=1e-9)
    assert (found * 12 > 1.5).any()  # two boxes met
    assert max((image > 0).sum() for image in found) == 12
    x = feature_map(1, 1, 8, 8).repeat(3, 4, 1, 1)  # the same plane everywhere
    by = {per: pool_of(f"srp(per={per}, share=0.25)")(stats(x)) for per in PER}
    assert by["batch"].unique().numel() == 1
    assert by["image"].unique().numel() == 3
    assert all(by["image"][i].unique().numel() == 1 for i in range(3))
    assert by["channel"].unique().numel() > 6


@pytest.mark.parametrize("per", PER)
def test_places_are_uniform(per: str) -> None:
    """A chi-square over the 5 x 5 places of a 4 x 4 box, far from the tail for a fixed seed."""
    pool, x = pool_of(f"srp(per={per})"), torch.zeros(200, 50, 8, 8)
    cells: list[Tensor] = []
    for batch in range(2000 if per == "batch" else 1):
        pool.draws[1] = batch
        rows, columns = pool._starts(x, 0)
        cells.append((rows * 5 + columns).flatten())
    counts = torch.bincount(torch.cat(cells), minlength=25).double()
    expected = counts.sum() / 25
    assert counts.numel() == 25
    assert ((counts - expected) ** 2 / expected).sum() < 60  # 24 degrees of freedom: p = 6e-5


def test_the_hash_spreads_and_stays_in_32_bits() -> None:
    values = _hash(torch.arange(100_000))
    assert values.min() >= 0
    assert values.max() < 2**32
    assert values.unique().numel() == 100_000
    bits = (values[:, None] >> torch.arange(32)) & 1
    assert ((bits.double().mean(0) - 0.5).abs() < 0.01).all()


@pytest.mark.parametrize(
    "spec", [f"{name}(pool={{}})" for name in POOLED] + ["cbam(pools=({}, max))"]
)
def test_any_module_takes_it(spec: str) -> None:
    module = randomise(spem.create_attention(spec.format("srp"), 64).double(), spec)
    x = feature_map(4, 64, 6, 8).requires_grad_()
    out = module(x)
    assert out.shape == x.shape
    out.sum().backward()
    assert torch.isfinite(x.grad).all()
    assert not torch.equal(copy.deepcopy(module)(x), out)  # the next boxes
    # in evaluation it is the global average
    average = spem.create_attention(spec.format("avg"), 64).double()
    average.load_state_dict({k: v for k, v in module.state_dict().items() if "draws" not in k})
    draws = [v.clone() for k, v in module.named_buffers() if "draws" in k]
    assert torch.equal(module.eval()(x), average.eval()(x))
    assert torch.equal(draws[0], next(v for k, v in module.named_buffers() if "draws" in k))


def test_the_gate_is_that_of_the_boxes() -> None:
    """SE's oracle on a descriptor computed with numpy from the boxes that were drawn."""
    assert set(POOLED) >= {
        "se",
        "eca",
        "srm",
        "sge",
        "ese",
        "ge",
        "dia",
        "ean",
        "iebn",
        "bam",
        "sk",
    }
    module = randomise(spem.SE(6, reduction=2, pool=SRP(0.5, regions=2)).double(), "oracle")
    x = feature_map(4, 6, 8, 6)
    boxes = [[axis.numpy() for axis in module.pool._starts(x, box)] for box in (0, 1)]
    z = np.zeros((4, 6))
    for rows, columns in boxes:
        for n in range(4):
            a, b = int(rows[n, 0]), int(columns[n, 0])
            z[n] += x.numpy()[n, :, a : a + 4, b : b + 3].mean((1, 2)) / len(boxes)
    expected = oracles.se(arrays(module), z[..., None, None], pool="avg")
    np.testing.assert_allclose(module.gate(x).detach().numpy(), expected, **F64)


def test_draws_are_keyed_and_resume() -> None:
    """By seed, module and batch; nothing of the global generator; saved with the weights."""
    x = feature_map(4, 3, 16, 16, dtype=torch.float32)

    def outputs(seed: int, count: int = 3) -> tuple[spem.ResNet, list[Tensor]]:
        torch.manual_seed(torch.randint(1000, ()).item())
        model = spem.resnet(11, attention="se(pool=srp)")
        spem.initialise(model, seed)
        return model, [model(x).detach() for _ in range(count)]

    model, first = outputs(1)
    state = torch.get_rng_state()
    model(x)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first, outputs(1)[1], strict=True))
    assert not torch.equal(first[0], outputs(2)[1][0])
    keys = [m.draws[0].item() for m in model.modules() if isinstance(m, RegionPool)]
    assert len(set(keys)) == 3
    two, _ = outputs(1, 2)
    resumed = spem.resnet(11, attention="se(pool=srp)")
    resumed.load_state_dict(two.state_dict())
    torch.testing.assert_close(resumed(x), first[2], **TOLERANCE[torch.float32])
    assert [m.draws[1].item() for m in resumed.modules() if isinstance(m, RegionPool)] == [3] * 3


SPECS = ["se(pool={}, reduction=1)", "sge(groups=4, pool={})", "sk(pool={})"]


@pytest.mark.parametrize(("spec", "per"), list(zip(SPECS, PER, strict=True)))
def test_gradcheck_with_fixed_boxes(spec: str, per: str) -> None:
    text = spec.format(f"srp(per={per})")
    module = randomise(spem.create_attention(text, 8, dtype=torch.float64), spec)
    names = [name for name, _ in module.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in module.parameters()]
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}

    def forward(x: Tensor, *values: Tensor) -> Tensor:
        fixed = {name: buffer.clone() for name, buffer in buffers.items()}
        return functional_call(module, dict(zip(names, values, strict=True)) | fixed, (x,))

    x = distinct_map(3, 8, 4, 4).requires_grad_()
    assert torch.autograd.gradcheck(forward, (x, *values), **GRADCHECK)


def test_it_is_composed_in_training_and_says_so() -> None:
    module = randomise(spem.SE(16, pool="srp").double(), "tail")
    reason = "se pools random regions of the map in training"
    assert module.why_composed() == reason
    norm = randomise(nn.BatchNorm2d(16).double(), "norm")
    z, residual = feature_map(3, 16, 5, 4), feature_map(3, 16, 5, 4, key="residual")
    for training in (True, False):
        other, other_norm = copy.deepcopy(module.train(training)), copy.deepcopy(norm)
        expected = torch.relu(other(other_norm(z)) + residual)
        torch.testing.assert_close(module.tail(z, residual, norm), expected, **F64)
    assert module.why_composed() is None
    tails = spem.cost.block_tails(spem.resnet(11, attention="dia(pool=srp)"))
    assert {tail.reason for tail in tails} == {reason.replace("se", "dia", 1)}
    with pytest.raises(TypeError, match="SRP: needs the map"):
        module.train().gate_from(spem.ops.plane_stats(z))


def test_half_precision_and_layouts() -> None:
    module = randomise(spem.SE(16, pool="srp"), "half")
    x = feature_map(3, 16, 6, 6, dtype=torch.float32)
    expected = copy.deepcopy(module)(x)
    last = copy.deepcopy(module)(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(last, expected, **TOLERANCE[torch.float32])
    half = copy.deepcopy(module).half()
    assert half.pool.draws.dtype == torch.int64
    wide = copy.deepcopy(half).float()
    gate = half.gate(x.half())
    torch.testing.assert_close(gate, wide.gate(x.half().float()), **TOLERANCE[torch.float32])
    assert half(torch.zeros(0, 16, 4, 4, dtype=torch.float16)).shape == (0, 16, 4, 4)
