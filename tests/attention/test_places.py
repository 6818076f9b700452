"""Where modules stand in a network: shared by a stage, in place of a layer, between stages."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attention import oracles
from attention.cases import sampled
from attention.drawing import arrays, feature_map, randomise
from tolerance import PRINTED, TAIL, TOLERANCE
from torch import Tensor, nn

import spem
from spem import attention
from spem.attention.placement import GatedConv
from spem.cost import block_tails
from spem.models import Stage, blocks, start_branches
from spem.ops import use_impl

MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
ELSEWHERE = ["dia", "ean", "iebn", "sk", "bam", "bam(placement=stage)", "gct(placement=conv)"]
F64 = TOLERANCE[torch.float64]


def drawn(spec: str, depth: int = 20, *, training: bool = True) -> spem.ResNet:
    model = spem.resnet(depth, attention=spec)
    return randomise(model.double(), "places", spec).train(training)


def placed(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, spem.ChannelAttention)]


STAGES = ["layer1", "layer2", "layer3"]
NORMS = [f"{stage}.{i}.bn{k}" for stage in STAGES for i in (0, 1) for k in (1, 2, 3)]
CONVS = [f"{stage}.{i}.conv{k}" for stage in STAGES for i in (0, 1) for k in (1, 2, 3)]


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        ("se", [f"{stage}.{i}.attention" for stage in STAGES for i in (0, 1)]),
        ("ean", [f"{stage}.shared" for stage in STAGES]),
        ("dia", [f"{stage}.shared" for stage in STAGES]),
        ("bam", ["layer1.after", "layer2.after"]),
        ("bam(placement=stage)", [f"{stage}.after" for stage in STAGES]),
        ("bam(placement=tail)", [f"{stage}.{i}.attention" for stage in STAGES for i in (0, 1)]),
        ("iebn", ["bn1", *NORMS]),
        ("sk", [f"{stage}.{i}.conv2" for stage in STAGES for i in (0, 1)]),
        (
            "gct(placement=conv)",
            [
                f"{name}.attention"
                for name in ["conv1", *CONVS, *(f"{s}.0.downsample.0" for s in STAGES)]
            ],
        ),
    ],
)
def test_where_they_stand(spec: str, names: list[str]) -> None:
    model = spem.resnet(20, attention=spec)
    assert sorted(placed(model)) == sorted(names)
    for name in names:
        module = model.get_submodule(name)
        assert module.needs.place == spem.AttentionSpec.parse(spec).place
    assert len(list(model.parameters())) == len(dict(model.named_parameters()))
    assert len(blocks(model)) == 6


@pytest.mark.parametrize(("spec", "block"), sampled(ELSEWHERE, ["bottleneck", "basic"], each=1))
def test_networks_run_in_training_and_evaluation(spec: str, block: str) -> None:
    depth = 20 if block == "bottleneck" else 14
    if spec == "sk" and block == "basic":
        with pytest.raises(ValueError, match=r"resnet: sk stands in place of the 3x3.*basic"):
            spem.resnet(depth, attention=spec, block=block)
        return
    model = spem.resnet(depth, 7, attention=spec, block=block)
    for size in ((32, 32), (33, 20)):  # BAM fails on such maps in the official code
        x = feature_map(3, 3, *size, dtype=torch.float32)
        for training in (True, False):
            logits = model.train(training)(x)
            assert logits.shape == (3, 7)
            assert torch.isfinite(logits).all()


@pytest.mark.parametrize("spec", ELSEWHERE)
def test_the_backbone_starts_as_without_attention(spec: str) -> None:
    """By name, so that networks of a seed are paired; only what a module replaces is another's."""
    nets = [spem.resnet(20), spem.resnet(20, attention=spec)]
    for net in nets:
        spem.initialise(net, 0)
    plain, model = (net.state_dict() for net in nets)
    gone = {k for k in plain if k not in model}
    if spec == "sk":
        assert gone == {k for k in plain if "conv2." in k or (".bn2." in k and k[:2] != "bn")}
    else:
        assert not gone
    assert all(torch.equal(plain[k], model[k]) for k in plain if k not in gone)


@pytest.mark.parametrize("spec", ELSEWHERE)
def test_a_training_step_moves_every_parameter(spec: str) -> None:
    model = randomise(spem.resnet(20, attention=spec), "step", spec)
    before = {k: v.detach().clone() for k, v in model.named_parameters()}
    x, labels = feature_map(8, 3, 32, 32, dtype=torch.float32), torch.arange(8) % 10
    F.cross_entropy(model(x), labels).backward()
    groups = spem.param_groups(model, 0.1, 1e-4)
    assert sum(len(group["params"]) for group in groups) == len(before)
    torch.optim.SGD(groups, lr=0.1).step()
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
    network = randomise(spem.resnet(20, attention=spec), "compile", spec)
    model = network.layer2.train(training)
    other = copy.deepcopy(model)
    x = feature_map(4, 64, 8, 8, dtype=torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(x), other(x), rtol=1e-4, atol=1e-5)
    for actual, expected in zip(model.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spec", ELSEWHERE)
def test_nothing_of_a_forward_pass_stays_on_a_module(spec: str) -> None:
    model = drawn(spec, training=False)
    x = feature_map(3, 3, 16, 16)
    first = model(x)
    before = [dict(vars(module)) for module in model.modules()]
    model(feature_map(5, 3, 24, 8, key="another batch"))
    assert all(old.keys() == vars(m).keys() for old, m in zip(before, model.modules(), strict=True))
    assert not any(isinstance(value, Tensor) for m in model.modules() for value in vars(m).values())
    assert torch.equal(model(x), first)
    assert torch.equal(copy.deepcopy(model)(x), first)


@pytest.mark.parametrize("spec", ELSEWHERE)
def test_weights_are_stored_once_and_load(spec: str) -> None:
    model = drawn(spec, training=False)
    state = model.state_dict()
    assert sum(p.numel() for k, p in state.items() if k in dict(model.named_parameters())) == sum(
        p.numel() for p in model.parameters()
    )
    other = spem.resnet(20, attention=spec).double().eval()
    other.load_state_dict(state)
    x = feature_map(2, 3, 16, 16)
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize(("spec", "impl"), sampled(ELSEWHERE, ["formula", "numba"], each=1))
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
    if name == "iebn":
        assert found == {("iebn", "reference", "IEBN has a forward of its own")}
    else:
        assert found == {(name if name in ("dia", "ean") else "none", impl, "asked for")}


# ---- in place of a layer


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
    with pytest.raises(ValueError, match=r"IEBN: momentum=0"):
        attention.IEBN(4, momentum=0)


@MODES
def test_iebn_keeps_the_running_statistics_of_a_batch_norm(training: bool) -> None:
    module, norm = attention.IEBN(8).double(), nn.BatchNorm2d(8).double()
    for m in (module, norm):
        m.train(training)
    for key in range(3):
        x = feature_map(4, 8, 5, 7, key=key)
        torch.testing.assert_close(
            module(x), norm(x) * module.start_gate, **F64
        )  # weight 1, bias 0
    for name, buffer in norm.named_buffers():
        torch.testing.assert_close(module.get_buffer(name), buffer, **F64)


@MODES
def test_sk_with_a_stride_is_the_oracle(training: bool) -> None:
    module = randomise(attention.SK(8, stride=2).double(), "stride").train(training)
    for shape in ((3, 8, 6, 6), (3, 8, 5, 8)):
        x = feature_map(*shape)
        before = arrays(module)
        share, expected = oracles.sk_both(
            before, x.numpy(), groups=8, pool="avg", training=training, stride=2
        )
        np.testing.assert_allclose(module.gate(x).detach().numpy(), share, **F64)
        np.testing.assert_allclose(
            copy.deepcopy(module)(x).detach().numpy(),
            expected if training else module(x).detach().numpy(),
            **F64,
        )


def test_sk_stands_for_convolution_and_norm() -> None:
    model = drawn("sk", training=False)
    strides = [block.conv2.near.stride for _, block in blocks(model)]
    assert strides == [(1, 1), (1, 1), (2, 2), (1, 1), (2, 2), (1, 1)]
    assert [block.conv2.near.groups for _, block in blocks(model)] == [16, 16, 32, 32, 32, 32]
    block = model.layer2[0]
    assert block.downsample is not None
    x = feature_map(2, 64, 8, 8)
    out = block.conv2(block.bn1(block.conv1(x)).relu())
    assert (out >= 0).all()  # the branches end in their ReLU
    expected = torch.relu(block.bn3(block.conv3(out)) + block.downsample(x))
    torch.testing.assert_close(block(x), expected, **F64)
    assert spem.create_attention("sk(groups=4)", 64).near.groups == 4
    for options, message in (
        ("groups=5", "groups=5 does not divide channels=64"),
        ("groups=0", "groups=0"),
        ("stride=0", "stride=0"),
        ("least=0", "least=0"),
        ("reduction=0", "reduction=0"),
    ):
        with pytest.raises(ValueError, match=f"SK: {message}"):
            spem.create_attention(f"sk({options})", 64)


def test_sk_mixes_by_a_softmax() -> None:
    """With equal maps from z the branches count the same; z is at least 32 wide."""
    module = randomise(attention.SK(64).double(), "softmax")
    assert module.fc.weight.shape == (32, 64)
    assert attention.SK(1024).fc.weight.shape == (64, 1024)
    with torch.no_grad():
        module.fc_near.weight.copy_(module.fc_far.weight)
    gate = module.gate(feature_map(2, 64, 4, 4))
    torch.testing.assert_close(gate, torch.full_like(gate, 0.5), **F64)


# ---- before a convolution, between stages


def test_gct_gates_the_input_of_every_convolution() -> None:
    model = drawn("gct(placement=conv)", training=False)
    plain = spem.resnet(20).double().eval()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if ".attention." not in k})
    gated = dict(model.named_modules())
    hooks = 0
    for name, module in plain.named_modules():
        if isinstance(module, nn.Conv2d):
            conv = gated[name]
            assert type(conv) is GatedConv
            assert (conv.stride, conv.padding) == (module.stride, module.padding)
            module.register_forward_pre_hook(lambda _m, args, gate=conv.attention: gate(args[0]))
            hooks += 1
    assert hooks == 1 + 18 + 3  # stem, blocks, shortcuts
    x = feature_map(2, 3, 16, 16)
    torch.testing.assert_close(model(x), plain(x), **F64)
    start, plain = spem.resnet(20, attention="gct(placement=conv)"), spem.resnet(20)
    for net in (start, plain):
        spem.initialise(net, 0)
    x = x.float()
    assert torch.equal(start(x), plain(x))  # the identity


def test_bam_follows_the_stages() -> None:
    for spec, stages in (("bam", 2), ("bam(placement=stage)", 3)):
        model = drawn(spec, training=False)
        x = model.bn1(model.conv1(feature_map(2, 3, 16, 12))).relu()
        for number, stage in enumerate((model.layer1, model.layer2, model.layer3)):
            assert isinstance(stage, Stage)
            inner = x
            for block in stage:
                inner = block(inner)
            expected = inner if stage.after is None else stage.after(inner)
            assert (stage.after is not None) == (number < stages)
            x = stage(x)
            assert torch.equal(x, expected)
            assert (number < stages) == (not torch.equal(x, inner))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gct(placement=between)", r"GCT: placement='between'.*tail, conv"),
        ("bam(placement=conv)", r"BAM: placement='conv'.*between, stage, tail"),
        ("bam(placement=nowhere)", r"placement='nowhere' is unknown.*tail, conv, norm"),
        ("gct(placement=3)", r"placement=3 is unknown"),
    ],
)
def test_a_place_that_is_none_is_refused(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spem.resnet(11, attention=spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("bam(fusion=max)", r"BAM: fusion='max'.*mul, add"),
        ("bam(dilation=0)", r"BAM: dilation=0"),
        ("bam(reduction=65)", r"BAM: reduction=65 leaves no hidden unit"),
        ("dia(reduction=65)", r"DIA: reduction=65 leaves no hidden unit"),
        ("bam(placement=conv)", r"BAM: placement='conv'"),
        ("iebn(eps=0)", r"IEBN: eps=0"),
        ("ge(bias=True)", r"GE: bias=True.*theta_minus"),
        ("ge(bias=1, form=theta, size=8)", r"GE: bias=1"),
    ],
)
def test_wrong_values_are_refused_when_the_module_is_made(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spem.create_attention(spec, 64)


@pytest.mark.parametrize(("name", "class_name"), [("bam", "BAM"), ("sk", "SK")])
def test_one_image_is_no_batch_to_train_on(name: str, class_name: str) -> None:
    module = spem.create_attention(name, 64)
    with pytest.raises(ValueError, match=f"{class_name}: training needs a batch of at least 2"):
        module(feature_map(1, 64, 4, 4, dtype=torch.float32))
    assert module.eval()(feature_map(1, 64, 4, 4, dtype=torch.float32)).shape == (1, 64, 4, 4)


# ---- at the start


def test_iebn_starts_at_the_sigmoid_of_minus_one() -> None:
    model = spem.resnet(20, attention="iebn")
    for scope in ("backbone", "all"):
        spem.initialise(model, 3, scope=scope)
        for name in placed(model):
            module = model.get_submodule(name)
            x = feature_map(2, module.channels, 3, 4, dtype=torch.float32)
            assert (module.gate(x) - 0.2689414).abs().max() < PRINTED
            assert module.start_gate == pytest.approx(0.2689414, abs=PRINTED)
            assert (module.weight == 1).all()
            assert not module.bias.any()
            assert not module.running_mean.any()
            assert (module.running_var == 1).all()


@pytest.mark.parametrize(
    ("spec", "mean", "least", "greatest"),
    [
        ("dia", 0.25, 0.18, 0.33),
        ("ean", 0.5, 0.36, 0.63),
        ("bam", 1.5, 1.10, 1.87),
        ("sk", 0.5, 0.0, 1.0),
    ],
)
def test_start_about(spec: str, mean: float, least: float, greatest: float) -> None:
    block = nn.Sequential(spem.create_attention(spec, 64))
    spem.initialise(block, 0)
    assert block[0].start_gate is None
    x = torch.randn(32, 64, 16, 16, generator=torch.Generator().manual_seed(0))
    gate = block[0].gate(x)
    # DIA's first block starts from the state 0; the printed numbers are of a recurrent run
    assert gate.mean().item() == pytest.approx(mean, abs=0.06 if spec == "dia" else 0.03)
    spread = 0.5 * (greatest - least)
    assert gate.min().item() > least - spread
    assert gate.max().item() < greatest + spread


@pytest.mark.parametrize("spec", ELSEWHERE)
def test_a_seed_draws_every_random_part_anew(spec: str) -> None:
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed + 5)
        model = spem.resnet(20, attention=spec)
        spem.initialise(model, seed)
        states.append(dict(model.named_parameters()))
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key
        if value.unique().numel() > 1:
            assert not torch.equal(value, states[2][key]), key
