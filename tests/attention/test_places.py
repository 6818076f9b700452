"""Where modules stand in a network: shared by a stage, in place of a layer, between stages."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attention import oracles
from attention.cases import MODES, sampled
from attention.drawing import arrays, feature_map, randomise
from tolerance import TAIL, TOLERANCE
from torch import Tensor, nn

import spem
from spem import attention
from spem.cost import block_tails
from spem.models import GatedConv, blocks, start_branches
from spem.ops import use_impl

ELSEWHERE = ["dia", "ean", "iebn", "sk", "bam", "bam(placement=stage)", "gct(placement=conv)"]
EACH = pytest.mark.parametrize("spec", ELSEWHERE)
F64 = TOLERANCE[torch.float64]
STAGES = ["layer1", "layer2", "layer3"]
TAILS = [f"{stage}.{i}.attention" for stage in STAGES for i in (0, 1)]
CONVS = [f"{stage}.{i}.conv{k}" for stage in STAGES for i in (0, 1) for k in (1, 2, 3)]
PLACED = {
    "se": TAILS,
    "bam(placement=tail)": TAILS,
    "ean": [f"{stage}.shared" for stage in STAGES],
    "dia": [f"{stage}.shared" for stage in STAGES],
    "bam": ["layer1.after", "layer2.after"],
    "bam(placement=stage)": [f"{stage}.after" for stage in STAGES],
    "iebn": ["bn1", *(name.replace("conv", "bn") for name in CONVS)],
    "sk": [f"{stage}.{i}.conv2" for stage in STAGES for i in (0, 1)],
    "gct(placement=conv)": [
        f"{name}.attention" for name in ["conv1", *CONVS, *(f"{s}.0.downsample.0" for s in STAGES)]
    ],
}


def drawn(spec: str, depth: int = 20, *, training: bool = True) -> spem.ResNet:
    model = spem.resnet(depth, attention=spec)
    return randomise(model.double(), "places", spec).train(training)


def placed(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, spem.ChannelAttention)]


def test_where_they_stand() -> None:
    for spec, names in PLACED.items():
        model = spem.resnet(20, attention=spec)
        assert sorted(placed(model)) == sorted(names)
        for name in names:
            place = spem.AttentionSpec.parse(spec).place
            assert model.get_submodule(name).needs.place == place
        assert len(list(model.parameters())) == len(dict(model.named_parameters()))
        assert len(blocks(model)) == 6
    for spec, message in (
        ("bam(placement=nowhere)", r"placement='nowhere' is unknown.*tail, conv, norm"),
        ("gct(placement=3)", r"placement=3 is unknown"),
    ):
        with pytest.raises(ValueError, match=message):
            spem.resnet(11, attention=spec)


@pytest.mark.parametrize(("spec", "block"), sampled(ELSEWHERE, ["bottleneck", "basic"]))
def test_networks_run_in_training_and_evaluation(spec: str, block: str) -> None:
    depth = 20 if block == "bottleneck" else 14
    if spec == "sk":
        with pytest.raises(ValueError, match=r"resnet: sk goes in place of the 3x3.*basic"):
            spem.resnet(14, attention=spec, block="basic")
        depth, block = 20, "bottleneck"
    model = spem.resnet(depth, 7, attention=spec, block=block)
    for size in ((32, 32), (33, 20)):  # BAM fails on such maps in the official code
        x = feature_map(3, 3, *size, dtype=torch.float32)
        for training in (True, False):
            logits = model.train(training)(x)
            assert logits.shape == (3, 7)
            assert torch.isfinite(logits).all()


@EACH
def test_the_backbone_starts_as_without_attention(spec: str) -> None:
    """By name, so that networks of a seed are paired; only what a module replaces is another's."""
    nets = [spem.resnet(20), spem.resnet(20, attention=spec)]
    for net in nets:
        spem.initialise(net, 0)
    plain, model = (net.state_dict() for net in nets)
    gone = {k for k in plain if k not in model}
    replaced = {k for k in plain if "conv2." in k or (".bn2." in k and k[:2] != "bn")}
    assert gone == (replaced if spec == "sk" else set())
    assert all(torch.equal(plain[k], model[k]) for k in plain if k not in gone)


@EACH
def test_a_training_step_moves_every_parameter(spec: str) -> None:
    model = randomise(spem.resnet(20, attention=spec), "step", spec)
    before = {k: v.detach().clone() for k, v in model.named_parameters()}
    x, labels = feature_map(8, 3, 32, 32, dtype=torch.float32), torch.arange(8) % 10
    F.cross_entropy(model(x), labels).backward()
    torch.optim.SGD(spem.param_groups(model, 0.1, 1e-4), lr=0.1).step()
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter).all(), name
        if not name.endswith((".fc1.bias", "reduce.bias", "context1.bias", "context2.bias")):
            assert not torch.equal(parameter, before[name]), name


@pytest.mark.parametrize(
    ("spec", "training"),
    [*((spec, True) for spec in ELSEWHERE), ("dia", False), ("se(pool=srp)", True)],
)
def test_compiles_without_a_graph_break(spec: str, training: bool) -> None:
    """A stage of two blocks whole: what is shared, handed on and stands after it."""
    if spec in ("dia", "se(pool=srp)") and torch.__version__ < "2.7":
        pytest.skip("the compiler of torch 2.6 breaks the graph")
    model = randomise(spem.resnet(20, attention=spec), "compile", spec).layer2.train(training)
    other = copy.deepcopy(model)
    x = feature_map(4, 64, 8, 8, dtype=torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(x), other(x), rtol=1e-4, atol=1e-5)
    for actual, expected in zip(model.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@EACH
def test_nothing_stays_on_a_module_and_weights_load(spec: str) -> None:
    model = drawn(spec, training=False)
    x = feature_map(3, 3, 16, 16)
    first = model(x)
    before = [dict(vars(module)) for module in model.modules()]
    model(feature_map(5, 3, 24, 8, key="another batch"))
    assert all(old.keys() == vars(m).keys() for old, m in zip(before, model.modules(), strict=True))
    assert not any(isinstance(v, Tensor) for m in model.modules() for v in vars(m).values())
    assert torch.equal(model(x), first)
    assert torch.equal(copy.deepcopy(model)(x), first)
    other = spem.resnet(20, attention=spec).double().eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), first)


@pytest.mark.parametrize(("spec", "impl"), sampled(ELSEWHERE, ["formula", "numba"]))
def test_tails_run_under_an_explicit_implementation(spec: str, impl: str) -> None:
    if impl == "numba":
        pytest.importorskip("numba")
    model = drawn(spec)
    with use_impl("reference"):
        expected = copy.deepcopy(model)(feature_map(3, 3, 16, 16))
    with use_impl(impl):
        found = {(tail.attention, tail.impl, tail.reason) for tail in block_tails(model)}
        out = model(feature_map(3, 3, 16, 16))
    assert (out - expected).abs().max() <= TAIL[torch.float64] * expected.abs().max()
    name = spec.partition("(")[0]
    fused = (name if name in ("dia", "ean") else "none", impl, "asked for")
    own = ("iebn", "reference", "IEBN has a forward of its own")
    assert found == {own if name == "iebn" else fused}


# ---- in place of a layer, before a convolution, between stages


def test_iebn_takes_the_weights_of_a_plain_network() -> None:
    plain, model = drawn("none", training=False), spem.resnet(20, attention="iebn").double().eval()
    missing = model.load_state_dict(plain.state_dict(), strict=False)
    assert not missing.unexpected_keys
    assert {k.rpartition(".")[2] for k in missing.missing_keys} == {"w", "b"}
    assert len(missing.missing_keys) == 2 * 19
    with torch.no_grad():  # an open gate: s(40) is 1
        for name, parameter in model.named_parameters():
            if name.endswith(".b"):
                parameter.fill_(40.0)
    x = feature_map(2, 3, 16, 16)
    torch.testing.assert_close(model(x), plain(x), **F64)
    start_branches(model, 0.25)
    assert all((block.last_norm.weight == 0.25).all() for _, block in blocks(model))


def test_sk_stands_for_convolution_and_norm() -> None:
    model = drawn("sk", training=False)
    strides = [block.conv2.near.stride for _, block in blocks(model)]
    assert strides == [(1, 1), (1, 1), (2, 2), (1, 1), (2, 2), (1, 1)]
    assert [block.conv2.near.groups for _, block in blocks(model)] == [16, 16, 32, 32, 32, 32]
    block = model.layer2[0]
    x = feature_map(2, 64, 8, 8)
    out = block.conv2(block.bn1(block.conv1(x)).relu())
    assert (out >= 0).all()  # the branches end in their ReLU
    expected = torch.relu(block.bn3(block.conv3(out)) + block.downsample(x))
    torch.testing.assert_close(block(x), expected, **F64)
    assert spem.create_attention("sk(groups=4)", 64).near.groups == 4


def test_gct_gates_the_input_of_every_convolution() -> None:
    model = drawn("gct(placement=conv)", training=False)
    plain = spem.resnet(20).double().eval()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if ".attention." not in k})
    gated = dict(model.named_modules())
    convs = {n: m for n, m in plain.named_modules() if isinstance(m, nn.Conv2d)}
    assert len(convs) == 1 + 18 + 3  # stem, blocks, shortcuts
    for name, module in convs.items():
        conv = gated[name]
        assert type(conv) is GatedConv
        assert conv.extra_repr() == module.extra_repr()
        module.register_forward_pre_hook(lambda _m, args, gate=conv.attention: gate(args[0]))
    x = feature_map(2, 3, 16, 16)
    torch.testing.assert_close(model(x), plain(x), **F64)
    start, plain = spem.resnet(20, attention="gct(placement=conv)"), spem.resnet(20)
    for net in (start, plain):
        spem.initialise(net, 0)
    assert torch.equal(start(x.float()), plain(x.float()))  # the identity


def test_bam_follows_the_stages() -> None:
    for spec, stages in (("bam", 2), ("bam(placement=stage)", 3)):
        model = drawn(spec, training=False)
        x = model.bn1(model.conv1(feature_map(2, 3, 16, 12))).relu()
        for number, stage in enumerate((model.layer1, model.layer2, model.layer3)):
            inner = x
            for block in stage:
                inner = block(inner)
            assert (stage.after is not None) == (number < stages)
            x = stage(x)
            assert torch.equal(x, inner if stage.after is None else stage.after(inner))
            assert (number < stages) == (not torch.equal(x, inner))


# ---- shared by the blocks of a stage


def block_outputs(model: spem.ResNet, x: Tensor) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """Block by block: its name, what its last norm and its shortcut give, and its output."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    ends: dict[str, Tensor] = {}
    for name, block in blocks(model):
        block.last_norm.register_forward_hook(
            lambda _m, _i, out, name=name: ends.update({name: out.detach()})
        )
        block.register_forward_hook(
            lambda _m, args, out, name=name: seen.update({name: (args[0].detach(), out.detach())})
        )
    model(x)
    for name, block in blocks(model):
        shortcut, out = seen[name]
        if block.downsample is not None:
            shortcut = copy.deepcopy(block.downsample)(shortcut).detach()
        yield name, ends[name], shortcut, out


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
    seen: list[Tensor] = []
    plain = module.tail(x, x)
    module.register_forward_hook(lambda _m, _a, out: seen.append(out))
    with torch.no_grad():  # alone, as the first block
        torch.testing.assert_close(module.tail(x, x), plain.detach(), **F64)
    torch.testing.assert_close(seen[0], y, **F64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(part.dtype == torch.float32 for part in module.float()(x.float(), ())[1])


def walked(spec: str, impl: str) -> list[Tensor]:
    """Outputs and all gradients of three tails of one module, each fed by the one before."""
    module = randomise(spem.create_attention(spec, 8).double(), spec)
    norms = [randomise(nn.BatchNorm2d(8).double(), "norm", i) for i in range(3)]
    x = feature_map(3, 8, 6, 5).requires_grad_()
    residual = feature_map(3, 8, 6, 5, key="residual").requires_grad_()
    with use_impl(impl):
        y = x
        for tail, norm in zip(module.begin(3), norms, strict=True):
            y = tail(y.sin(), residual, norm)
        (y * feature_map(3, 8, 6, 5, key="weights")).sum().backward()
    leaves = [x, residual, *module.parameters(), *(p for norm in norms for p in norm.parameters())]
    assert all(leaf.grad is not None for leaf in leaves)
    buffers = [b.double() for norm in norms for b in norm.buffers()]
    return [y.detach(), *(leaf.grad for leaf in leaves), *buffers]


@pytest.mark.parametrize("impl", ["formula", "numba"])
@pytest.mark.parametrize("spec", ["dia(pool=mix(), reduction=1)", "ean(reduction=1)"])
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
