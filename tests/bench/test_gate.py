"""The gate: what is timed computes what it should, and another function is refused."""

from __future__ import annotations

import copy

import pytest
import torch

import spem
from spem.bench import checks, nets, official, settings, tails
from spem.bench.settings import CODE, Subject

CPU = torch.device("cpu")
OFFICIAL = Subject(CODE, "official")


def test_the_official_way_is_form_code():
    """Logits, loss and every gradient in float64, and the penalty."""
    nets.check_way(OFFICIAL, "reference", CPU)
    ours = nets.network(Subject(CODE, "composed"), 11)
    nets.perturb(ours)
    theirs = copy.deepcopy(ours)
    official.use_official(theirs)
    assert not any(isinstance(m, spem.SPEM) for m in theirs.modules())
    torch.testing.assert_close(official.official_penalty(theirs), spem.penalty(ours))


def test_another_official_way_is_refused(monkeypatch: pytest.MonkeyPatch):
    right = official.OfficialWay.forward
    monkeypatch.setattr(official.OfficialWay, "forward", lambda self, x: 1.001 * right(self, x))
    with pytest.raises(checks.BenchError, match=r"official .* differs from the reference in"):
        nets.check_way(OFFICIAL, "reference", CPU)


@pytest.mark.parametrize("way", ["composed", "fused", "composed folded", "fused folded"])
@pytest.mark.parametrize("attention", ["se", "spem", "cbam"])
def test_networks_pass(attention: str, way: str):
    if attention == "cbam" and way.startswith("fused"):
        assert not nets.fusable(attention)
    impl = "formula" if way.startswith("fused") else "reference"
    nets.check_way(Subject(attention, way), impl, CPU)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_networks_pass_as_they_are_timed(dtype: str, layout: str):
    for attention in ("none", "se", "spem"):
        for way, impl in (("composed", "reference"), ("fused", "formula")):
            nets.check_way(Subject(attention, way), impl, CPU, dtype=dtype, layout=layout)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_wrong_in_the_timed_dtype_only_is_refused(
    dtype: str, monkeypatch: pytest.MonkeyPatch
):
    right = nets.ResNet.forward

    def forward(self: nets.ResNet, x: torch.Tensor) -> torch.Tensor:
        y = right(self, x)
        return y if x.dtype == torch.float64 else 1.1 * y

    monkeypatch.setattr(nets.ResNet, "forward", forward)
    with pytest.raises(checks.BenchError, match=rf"\({dtype}, channels_last\) differs"):
        nets.check_way(
            Subject("se", "composed"), "reference", CPU, dtype=dtype, layout="channels_last"
        )


def test_a_network_without_its_attention_is_refused(monkeypatch: pytest.MonkeyPatch):
    bare = nets.network(Subject("none", "composed"), 11)
    monkeypatch.setattr(nets, "network", lambda subject, depth: bare)
    with pytest.raises(checks.BenchError, match="se, composed has 0 attention modules"):
        nets.check_way(Subject("se", "composed"), "reference", CPU)


CASE = tails.Case("bn_train", 3, 16, 5, 7)


def prepared(case: tails.Case, attention: str, way: str, impl: str) -> tails.TailProvider:
    provider = tails.TailProvider(case, Subject(attention, way), impl, tails.make_inputs(case, CPU))
    provider.prepare()
    return provider


@pytest.mark.parametrize("op", ["bn_train", "bn_eval"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_tails_pass(op: str, dtype: str, layout: str):
    case = tails.Case(op, 3, 16, 5, 7, dtype, layout)
    for attention in ("none", "se", "srm", "spem"):
        for way, impl in (("composed", "reference"), ("fused", "formula")):
            provider = prepared(case, attention, way, impl)
            modes = {"forward", "backward", "both"} if op == "bn_train" else {"forward"}
            assert set(provider.sample()) == modes
    prepared(case, CODE, "official", "reference")


def test_a_tail_that_compiles():
    provider = prepared(CASE, "se", "formula compiled", "formula")
    assert provider.first_call_s > 0


@pytest.mark.parametrize("wrong", ["forward", "backward"])
def test_a_wrong_tail_is_refused(wrong: str, monkeypatch: pytest.MonkeyPatch):
    right = tails.residual_tail

    def tail(z, residual, norm, attention):
        y = right(z, residual, norm, attention)
        if z.dtype == torch.float64:
            return y
        if wrong == "forward":
            return y * 1.001
        return y.detach() + 1.001 * (y - y.detach())

    monkeypatch.setattr(tails, "residual_tail", tail)
    with pytest.raises(checks.BenchError, match=r"spem, composed .* differs from the reference in"):
        prepared(CASE, "spem", "composed", "reference")


def test_every_plane_has_one_maximum_and_one_minimum():
    z = tails.make_inputs(CASE, CPU).z.detach().flatten(2)
    assert bool(((z == z.amax(2, keepdim=True)).sum(2) == 1).all())
    assert bool(((z == z.amin(2, keepdim=True)).sum(2) == 1).all())
    assert float(z.max()) == tails.HIGH


def test_the_gradient_is_whole_again_after_the_comparison():
    inputs = tails.make_inputs(CASE, CPU)
    before = inputs.gradient.clone()
    tails.TailProvider(CASE, Subject("se", "composed"), "reference", inputs).prepare()
    assert torch.equal(inputs.gradient, before)


def test_errors():
    ones = torch.ones(3)
    assert checks.error_of(ones * 1.5, ones) == pytest.approx(0.5)
    assert checks.error_of(torch.full((3,), float("nan")), ones) == float("inf")
    assert checks.error_of(torch.ones(2), ones) == float("inf")
    with pytest.raises(checks.BenchError, match="do not both have b"):
        checks.require_close("x", {"a": ones}, {"a": ones, "b": ones}, {"a": 1, "b": 1})


def test_in_inference_everybody_is_given_the_same_map():
    """Though a tail may write its result into what it is given."""
    case = tails.Case("bn_eval", 4, 16, 8, 8)
    inputs = tails.make_inputs(case, CPU)
    before = inputs.z.clone()
    for way, impl in (("fused", "formula"), ("composed", "reference")):
        provider = tails.TailProvider(case, Subject("none", way), impl, inputs)
        provider.prepare()
        inputs.input.zero_()
        for _ in range(2):
            inputs.input.mul_(2)  # what a tail in place leaves
            provider.sample()
            torch.testing.assert_close(inputs.input, before)
    assert torch.equal(inputs.z, before)


def test_a_compiled_step_is_captured_as_a_graph():
    ways = (settings.COMPOSED, settings.FORMULA)
    every = [Subject("se", way) for way in ("composed", "compiled", "formula compiled")]
    found = settings.with_graphs(every, ("se",), ways)[len(every) :]
    assert [s.way for s in found] == ["composed graph", "formula compiled graph"]
    assert [settings.impl_of(s.way, None) for s in found] == ["reference", "formula"]
