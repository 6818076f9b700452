"""Stochastic region pooling: random boxes in training, the mean in evaluation, for any module."""

from __future__ import annotations

import copy
import inspect

import numpy as np
import pytest
import torch
from attention import oracles
from attention.cases import ALL
from attention.drawing import arrays, distinct_map, feature_map, randomise
from tolerance import GRADCHECK, TOLERANCE
from torch import Tensor, nn
from torch.func import functional_call

import spem
from spem.attention import SRP
from spem.attention.pooling import RegionPool, _hash

F64 = TOLERANCE[torch.float64]
POOLED = [
    name
    for name in ALL
    if "pool" in inspect.signature(spem.attention.attention_class(name)).parameters
]


def weights(pool: nn.Module, images: int, *size: int) -> np.ndarray:
    """The weight of every position in the descriptors of the next batch, [images, positions].

    Every channel is 1 at a position of its own, so its descriptor is the weight of that position;
    for boxes by image or batch, which all channels share.
    """
    positions = int(np.prod(size))
    maps = torch.eye(positions, dtype=torch.float64).reshape(1, positions, *size)
    maps = maps.expand(images, -1, *[-1] * len(size))
    return pool(stats(maps)).numpy().reshape(images, *size)


def stats(x: Tensor) -> object:
    """What a module hands to its pool."""
    module = spem.SE(x.shape[1], reduction=1, pool="srp").double()
    return module.stats_of(x)


def pool_of(text: str, seed: int = 0) -> RegionPool:
    module = spem.create_attention(f"se(pool={text})", 64)
    spem.initialise(nn.Sequential(module), seed)
    assert isinstance(module.pool, RegionPool)
    return module.pool


@pytest.mark.parametrize(
    ("share", "size", "box"),
    [
        (0.5, (8, 6), (4, 3)),
        (0.25, (8, 8), (2, 2)),
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
    found = weights(pool_of(f"srp(share={share})"), 20, *size)
    places = set()
    for image in found:
        inside = np.argwhere(image > 0)
        low, high = inside.min(0), inside.max(0)
        assert tuple(high - low + 1) == box
        assert len(inside) == np.prod(box)
        np.testing.assert_allclose(image[image > 0], 1 / np.prod(box), rtol=1e-12)
        places.add(tuple(low))
    assert len(places) > 1 or share == 1.0


def test_several_boxes_are_averaged() -> None:
    found = weights(pool_of("srp(regions=3, share=0.25)"), 30, 8, 8)
    np.testing.assert_allclose(found.sum((1, 2)), 1.0, rtol=1e-12)
    np.testing.assert_allclose(found * 4 * 3, np.round(found * 4 * 3), atol=1e-9)
    assert (found * 12 > 1.5).any()  # two boxes met
    assert max((image > 0).sum() for image in found) == 12


def test_what_has_boxes_of_its_own() -> None:
    x = feature_map(3, 4, 8, 8)
    x[:] = x[:1, :1]  # the same plane everywhere
    x = x.contiguous()
    by = {per: pool_of(f"srp(per={per}, share=0.25)")(stats(x)) for per in SRP_PER}
    assert by["batch"].unique().numel() == 1
    assert by["image"].unique().numel() == 3
    assert all(by["image"][i].unique().numel() == 1 for i in range(3))
    assert by["channel"].unique().numel() > 6


SRP_PER = ("image", "channel", "batch")


@pytest.mark.parametrize("per", SRP_PER)
def test_places_are_uniform(per: str) -> None:
    """A chi-square over the 5 x 5 places of a 4 x 4 box, far from the tail for a fixed seed."""
    pool, x = pool_of(f"srp(per={per})"), torch.zeros(200, 50, 8, 8)
    starts = [pool._starts(x)[0] for _ in range(1)]
    if per == "batch":
        starts = []
        for batch in range(2000):
            pool.draws[1] = batch
            starts.append(pool._starts(x)[0])
    cells = torch.cat([(rows * 5 + columns).flatten() for rows, columns in starts])
    counts = torch.bincount(cells, minlength=25).double()
    expected = len(cells) / 25
    assert counts.numel() == 25
    assert ((counts - expected) ** 2 / expected).sum() < 60  # 24 degrees of freedom: p = 6e-5


def test_the_hash_spreads_and_stays_in_32_bits() -> None:
    values = _hash(torch.arange(100_000))
    assert values.min() >= 0
    assert values.max() < 2**32
    assert values.unique().numel() == 100_000
    bits = (values[:, None] >> torch.arange(32)) & 1
    assert ((bits.double().mean(0) - 0.5).abs() < 0.01).all()


@pytest.mark.parametrize("name", POOLED)
def test_any_module_takes_it(name: str) -> None:
    module = randomise(spem.create_attention(f"{name}(pool=srp)", 64).double(), name)
    x = feature_map(4, 64, 6, 8).requires_grad_()
    out = module(x)
    assert out.shape == x.shape
    out.sum().backward()
    assert torch.isfinite(x.grad).all()
    assert not torch.equal(copy.deepcopy(module)(x), out)  # the next boxes
    # in evaluation it is the global average
    average = spem.create_attention(f"{name}(pool=avg)", 64).double()
    average.load_state_dict({k: v for k, v in module.state_dict().items() if k != "pool.draws"})
    before = module.pool.draws.clone()
    assert torch.equal(module.eval()(x), average.eval()(x))
    assert torch.equal(module.pool.draws, before)


def test_the_modules_with_a_pool() -> None:
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
    cbam = randomise(spem.CBAM(16, reduction=4, pools=("srp", "max")).double(), "cbam")
    x = feature_map(2, 16, 6, 8)
    assert not torch.equal(cbam(x), cbam(x))
    assert torch.equal(cbam.eval()(x), cbam(x))
    again = spem.CBAM(16, reduction=4, pools=("avg", "max")).double().eval()
    again.load_state_dict({k: v for k, v in cbam.state_dict().items() if "draws" not in k})
    assert torch.equal(cbam(x), again(x))


def test_the_gate_is_that_of_the_boxes() -> None:
    """SE's oracle on a descriptor computed with numpy from the boxes that were drawn."""
    module = randomise(spem.SE(6, reduction=2, pool=SRP(0.5, regions=2)).double(), "oracle")
    x = feature_map(4, 6, 8, 6)
    again = copy.deepcopy(module.pool)
    boxes = [[axis.numpy() for axis in box] for box in again._starts(x)]
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


@pytest.mark.parametrize(
    "spec", ["se(pool=srp, reduction=1)", "sge(groups=4, pool=srp)", "sk(pool=srp)"]
)
@pytest.mark.parametrize("per", SRP_PER)
def test_gradcheck_with_fixed_boxes(spec: str, per: str) -> None:
    module = spem.create_attention(spec.replace("srp", f"srp(per={per})"), 8, dtype=torch.float64)
    randomise(module, spec)
    names = [name for name, _ in module.named_parameters()]
    values = [p.detach().clone().requires_grad_() for _, p in module.named_parameters()]
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


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("se(pool=srp)", "se(pool=srp)"),
        ("se(pool='srp')", "se(pool=srp)"),
        ("se(pool=srp())", "se(pool=srp)"),
        ("se(pool=srp(0.5, 1, image))", "se(pool=srp)"),
        ("se(pool='srp(0.25)')", "se(pool=srp(share=0.25))"),
        (
            "se(pool=srp(share=1, regions=4, per=batch))",
            "se(pool=srp(per=batch, regions=4, share=1.0))",
        ),
    ],
)
def test_text(text: str, canonical: str) -> None:
    spec = spem.AttentionSpec.parse(text)
    assert str(spec) == canonical
    assert spem.AttentionSpec.parse(canonical) == spec
    assert isinstance(spec.build(64).pool, RegionPool)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("srp(share=0)", "share=0"),
        ("srp(share=1.5)", "share=1.5"),
        ("srp(share=half)", "share='half'"),
        ("srp(regions=0)", "regions=0"),
        ("srp(per=pixel)", "per='pixel'.*image, channel, batch"),
        ("srp(side=3)", "srp has no option 'side'.*share.*regions.*per"),
        ("srp(0.5, 1, image, 2)", "at most 3 arguments"),
    ],
)
def test_wrong_options_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spem.create_attention(f"se(pool={text})", 64)


def test_half_precision_and_layouts() -> None:
    module = randomise(spem.SE(16, pool="srp"), "half")
    x = feature_map(3, 16, 6, 6, dtype=torch.float32)
    expected = copy.deepcopy(module)(x)
    last = copy.deepcopy(module)(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(last, expected, **TOLERANCE[torch.float32])
    half = copy.deepcopy(module).half()
    assert half.pool.draws.dtype == torch.int64
    gate = half.gate(x.half())
    wide = copy.deepcopy(half).float()
    wide.pool.draws.zero_()
    torch.testing.assert_close(gate, wide.gate(x.half().float()), **TOLERANCE[torch.float32])
    assert half(torch.zeros(0, 16, 4, 4, dtype=torch.float16)).shape == (0, 16, 4, 4)
