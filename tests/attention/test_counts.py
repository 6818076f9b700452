"""Exact parameter counts of ResNet164 with every published module and placement."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import spem

PLAIN = (1_704_154, 1_727_284)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def network(spec: str, classes: int) -> spem.ResNet:
    with torch.device("meta"):
        return spem.ResNet(164, classes, attention=spem.AttentionSpec.parse(spec))


ROWS: dict[str, tuple[int, int]] = {
    # one a block, with its options
    "fca": (1_897_690, 1_920_820),
    "gct": (1_728_346, 1_751_476),
    "gct(mode=l1)": (1_728_346, 1_751_476),
    "ge": PLAIN,
    "ge(extent=4)": PLAIN,
    "ge(form=theta)": (3_784_666, 3_807_796),
    "ge(bias=True, form=theta)": (3_792_730, 3_815_860),
    "ge(form=theta_plus)": (3_986_770, 4_009_900),
    "simam": PLAIN,
    "coord": (1_915_114, 1_938_244),
    "gc": (1_915_384, 1_938_514),
    "gc(fusion=mul)": (1_915_384, 1_938_514),
    "gc(reduction=4)": (2_500_528, 2_523_658),
    "gsop": (10_474_330, 10_497_460),
    "triplet": (1_720_354, 1_743_484),
    "nam": (1_720_282, 1_743_412),
    "ese": (3_260_506, 3_283_636),
    "spa": (3_833_050, 3_856_180),
    "ela": (1_776_730, 1_799_860),
    "ela(form=T)": (1_760_602, 1_783_732),
    # elsewhere in the network
    "gct(placement=conv)": (1_740_355, 1_763_485),
    "dia": (1_923_002, 1_946_132),
    "ean": (1_715_382, 1_738_512),
    "iebn": (1_728_378, 1_751_508),
    "bam(placement=tail)": (2_117_992, 2_141_122),
    "bam(placement=stage)": (1_727_145, 1_750_275),
    "bam": (1_709_784, 1_732_914),
    # stochastic region pooling has no parameters: those of its module
    "se(pool=srp)": (1_906_258, 1_929_388),
    "srm(pool=srp)": (1_736_410, 1_759_540),
    "ge(pool=srp)": PLAIN,
    "bam(pool=srp)": (1_709_784, 1_732_914),
}
"""Every row of the table of counts beside the paper's five; `sk` has tests of its own below."""


@pytest.mark.parametrize("spec", ROWS)
def test_parameters_of_resnet164(spec: str) -> None:
    assert tuple(count(network(spec, classes)) for classes in (10, 100)) == ROWS[spec]


def test_every_module_of_the_wider_family_has_a_row() -> None:
    rows = {spec.partition("(")[0] for spec in ROWS}
    five = {"spem", "scale", "se", "cbam", "eca", "srm", "sge"}  # those of test_models
    assert rows | five | {"sk"} == set(spem.list_attention())


@pytest.mark.parametrize(("planes", "attention"), [(16, 1600), (32, 3136), (64, 6208)])
def test_the_attention_part_of_sk(planes: int, attention: int) -> None:
    """3 C d + 2 d with d = max(C / 16, 32); beside it two grouped convolutions with their norms."""
    module = spem.create_attention("sk", planes)
    parts = {name: count(part) for name, part in module.named_children()}
    branches = sum(parts[name] for name in ("near", "near_norm", "far", "far_norm"))
    assert sum(parts.values()) - branches == attention
    assert branches == 2 * (9 * planes * planes // min(32, planes) + 2 * planes)


@pytest.mark.parametrize("classes", [10, 100])
def test_parameters_of_resnet164_with_sk(classes: int) -> None:
    """18 times, three widths: a convolution and its norm make way for the module."""
    own = sum(count(spem.create_attention("sk", planes)) for planes in (16, 32, 64))
    replaced = sum(9 * planes * planes + 2 * planes for planes in (16, 32, 64))
    expected = PLAIN[classes == 100] + 18 * (own - replaced)
    assert count(network("sk", classes)) == expected
    assert expected == PLAIN[classes == 100] - 18 * 34_048


@pytest.mark.parametrize("c", [64, 128, 256])
def test_parameters_by_formula(c: int) -> None:
    h, q = c // 16, c // 4
    for spec, expected in (
        ("dia", 10 * c * q + 2 * q + 8 * c),
        ("dia", 5 * c * c // 2 + 17 * c // 2),
        ("ean", 2 * c * h + h + c),
        ("ean(bias=False)", 2 * c * h),
        ("iebn", 4 * c),
        ("bam", 3 * c * h + c + 18 * h * h + 13 * h + 1),
        ("bam(fusion=add, dilation=2)", 3 * c * h + c + 18 * h * h + 13 * h + 1),
        ("ge(bias=True, form=theta)", c * (7 * 7 + 3)),
    ):
        assert count(spem.create_attention(spec, c, size=7)) == expected, spec
    assert count(spem.create_attention("bam", c)) == {64: 1173, 128: 4457, 256: 17_361}[c]
    assert count(spem.create_attention("dia", c)) == {64: 10_784, 128: 42_048, 256: 166_016}[c]
