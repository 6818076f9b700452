"""Names and specs: the registry, the text form, what it refuses, and citations."""

from __future__ import annotations

import dataclasses
import re
import string

import pytest
import torch
from attention.drawing import feature_map, randomise
from hypothesis import given, settings, strategies as st
from tolerance import TOLERANCE

import spem
from spem.attention.spec import attention_class, bibtex


def roundtrip(text: str) -> str:
    spec = spem.AttentionSpec.parse(text)
    assert spec is not None
    printed = str(spec)
    assert spem.AttentionSpec.parse(printed) == spec
    assert str(spem.AttentionSpec.parse(printed)) == printed
    return printed


CANONICAL = [
    "spem",
    "se(pool=mix(0.3), reduction=8)",
    "se(pool=mix())",
    "se(bias=True, pool=max, reduction=4)",
    "spem(form=figure, pool=mix(parametrization=anchored), reweight=sum_of_sigmoids)",
    "scale(start=0.5)",
    "fca(frequencies=8, size=(32, 16))",
    "ge(extent='global')",
    "simam(lam=-0.1)",
    "cbam(pools=(avg, mix(0.3)))",
    "eca(kernel=None)",
    "se(pool=srp)",
    "se(pool=srp(per=batch, regions=4, share=1.0))",
]
SPELLINGS = {
    "se( reduction = 8,pool = 'mix(0.3)' )": "se(pool=mix(0.3), reduction=8)",
    'se(pool="max")': "se(pool=max)",
    "se(pool='mix(parametrization=anchored)')": "se(pool=mix(parametrization=anchored))",
    "se(pool=mix(1))": "se(pool=mix(1.0))",
    "  spem()  ": "spem",
    "spem(reweight=none, form='text')": "spem(form=text, reweight=none)",
    "se(pool='srp')": "se(pool=srp)",
    "se(pool=srp(0.5, 1, image))": "se(pool=srp)",
    "se(pool='srp(0.25)')": "se(pool=srp(share=0.25))",
}


def test_every_spec_has_one_canonical_text() -> None:
    assert [roundtrip(text) for text in CANONICAL] == CANONICAL
    assert {text: roundtrip(text) for text in SPELLINGS} == SPELLINGS


def test_specs_are_values() -> None:
    texts = ("se(reduction=8, pool=max)", "se(pool='max', reduction=8)")
    first, second = (spem.AttentionSpec.parse(text) for text in texts)
    assert first == second
    assert hash(first) == hash(second)
    assert first != spem.AttentionSpec.parse("se(reduction=8)")
    with pytest.raises(AttributeError):
        first.name = "eca"
    assert spem.AttentionSpec.parse("none") is None
    assert str(dataclasses.replace(first, name="eca", options={"pool": "min"})) == "eca(pool=min)"
    assert dataclasses.replace(first) == first


POOL_TEXTS = st.one_of(
    st.sampled_from(["avg", "max", "min", "mix()"]),
    st.floats(0, 1).map(lambda v: f"mix({v!r})"),
    st.sampled_from(["squares", "anchored", "sigmoid"]).map(lambda p: f"mix(parametrization={p})"),
)
OPTIONS: dict[str, dict[str, st.SearchStrategy[str]]] = {
    "se": {
        "reduction": st.integers(1, 64).map(str),
        "bias": st.sampled_from(["True", "False"]),
        "pool": POOL_TEXTS,
    },
    "spem": {
        "form": st.sampled_from(["text", "figure"]),
        "reweight": st.sampled_from(["shared_sum", "unshared_sum", "max_only", "none"]),
        "pool": POOL_TEXTS,
    },
    "eca": {"kernel": st.sampled_from(["3", "9", "None"]), "pool": POOL_TEXTS},
}


@st.composite
def spec_texts(draw: st.DrawFn) -> tuple[str, str]:
    """A spec in some spelling, and the same with other quotes in another order."""
    name = draw(st.sampled_from(sorted(OPTIONS)))
    chosen = draw(st.fixed_dictionaries({}, optional=OPTIONS[name]))
    spellings = []
    for _ in range(2):
        parts = []
        for option in draw(st.permutations(sorted(chosen))):
            number = option in ("kernel", "reduction", "bias")  # numbers stay numbers
            quote = "" if number else draw(st.sampled_from(["", "'", '"']))
            parts.append(f"{option}={quote}{chosen[option]}{quote}")
        spellings.append(f"{name}({', '.join(parts)})")
    return spellings[0], spellings[1]


@settings(deadline=None, max_examples=60, derandomize=True)
@given(spec_texts())
def test_any_spelling_reaches_the_same_spec_and_builds(texts: tuple[str, str]) -> None:
    first, second = map(roundtrip, texts)
    assert first == second
    options = re.findall(r"(\w+)=", first.partition("(")[2].replace("mix(parametrization=", "mix("))
    assert options == sorted(options)
    assert '"' not in first
    assert "'" not in first
    assert spem.create_attention(first, 64)(torch.ones(2, 64, 3, 3)).shape == (2, 64, 3, 3)


@settings(deadline=None, max_examples=300, derandomize=True)
@given(st.text(string.ascii_letters + string.digits + "()=,.'\"[]{}_*+-: \\\n\0é", max_size=40))
def test_any_text_is_a_spec_or_a_clear_error(text: str) -> None:
    try:
        spec = spem.AttentionSpec.parse(text)
    except ValueError:
        return
    assert spec is None or spem.AttentionSpec.parse(str(spec)) == spec


@settings(deadline=None, max_examples=100, derandomize=True)
@given(st.sampled_from(sorted(OPTIONS)), st.text(string.printable, max_size=15))
def test_any_option_value_is_taken_or_a_clear_error(name: str, value: str) -> None:
    try:
        said = spem.create_attention(f"{name}(pool={value})", 64).name
    except ValueError as error:
        said = str(error)
    assert name in said.lower() or "pool" in said or "mix" in said.lower(), said


def test_names_that_are_none() -> None:
    near = {"spm": "spem", "SPEM": "spem", "ecaa": "eca", "sgee": "sge", "scal": "scale"}
    for wrong, right in near.items():
        with pytest.raises(ValueError, match=rf"(?s){wrong}.*\b{right}\b"):
            spem.create_attention(wrong, 64)
    with pytest.raises(ValueError, match=r"unknown attention 'none'\. (?!.*\bnone\b)"):
        spem.AttentionSpec("none")
    message = "se has no option 'reductoin'; it takes ['reduction', 'bias', 'pool']"
    with pytest.raises(ValueError, match=re.escape(message)):
        spem.AttentionSpec.parse("se(reductoin=8)")
    for option in ("channels=64", "device=cpu", "dtype=float64"):
        with pytest.raises(ValueError, match=f"no option '{option.partition('=')[0]}'"):
            spem.AttentionSpec.parse(f"se({option})")
    for wrong in (64, None, spem.SE, spem.SE(64), ["se"]):
        with pytest.raises(TypeError, match=r"the spec, a text.*comes first.*'se', 64"):
            spem.create_attention(wrong, 64)
    for wrong, name in ((spem.SPEM, "spem"), (spem.SPEM(64), "spem"), (3, "se")):
        with pytest.raises(TypeError, match=f"attention is a text like.*Write '{name}'"):
            spem.resnet(11, attention=wrong)


UNREADABLE = [
    "se(__import__('os'))",
    "se(reduction=__import__('os').system('true'))",
    "se(pool=print(1))",
    "se(pool=mix(print(1)))",
    "se(reduction=1+1)",
    "se(reduction=[8][0])",
    "se(reduction=(lambda: 8)())",
    "se(pool=mix.lam)",
    "(se)(reduction=8)(bias=True)",
    "se.__class__()",
    "[se]",
    "se if True else eca",
    "f'{se}'",
    "se(**{'reduction': 8})",
    "se(*[8])",
    "se; eca",
    "se(reduction=8",
    "se(reduction=8, reduction=4)",
    "se(8)",
    "se(pool=mix(0.3, 0.4))",
    "se(pool=mix(0.3, lam=0.4))",
    "se(pool=mix(lambda=0.4))",
    "se(pool='mix(')",
    "none()",
    "",
    "()",
    "se(" * 3000,
    "-" * 5000 + "1",
    "se(reduction=" + "-" * 1500 + "1)",
    "se(pool=" + "mix(" * 500 + ")" * 501,
    "se\0",
]


def test_nothing_is_evaluated(capsys: pytest.CaptureFixture[str]) -> None:
    for text in UNREADABLE:
        with pytest.raises(ValueError, match=r"."):
            spem.create_attention(text, 64)
    assert not capsys.readouterr().out


WRONG = {
    "none(x=1)": "none takes no options",
    "se(pool=median)": r"SE: pool='median' is unknown.*avg.*max.*min.*Mix",
    "se(pool=3)": "pool=3",
    "se(pool=None)": "SE: pool=None is unknown",
    "se(reduction=many)": "SE: reduction='many' is not a positive integer",
    "se(reduction=0)": "reduction=0",
    "se(reduction=2.5)": "reduction=2.5",
    "se(reduction=True)": "reduction=True",
    "se(reduction=65)": "SE: reduction=65 leaves no hidden unit for channels=64",
    "se(bias=maybe)": "SE: bias='maybe' is not a bool",
    "se(bias=1)": "bias=1",
    "se(pool=mix(1.5))": r"Mix: lam=1\.5 is not a number from 0 to 1",
    "se(pool=mix(nan))": "nan",
    "se(pool=mix(parametrization=softmax))": "softmax.*squares",
    "se(pool=srp(share=0))": "share=0",
    "se(pool=srp(share=1.5))": r"share=1\.5",
    "se(pool=srp(share=half))": "share='half'",
    "se(pool=srp(regions=0))": "regions=0",
    "se(pool=srp(per=pixel))": "per='pixel'.*image, channel, batch",
    "se(pool=srp(side=3))": "srp got an unexpected.*'side'.*share.*regions.*per",
    "se(pool=srp(0.5, 1, image, 2))": "srp too many.*share",
    "spem(form=prose)": "SPEM: form='prose'.*text.*figure.*code",
    "spem(reweight=ours)": "ours.*shared_sum",
    "spem(form=code, reweight=none)": "code.*shared_sum",
    "eca(kernel=4)": "ECA: kernel=4 is not an odd positive integer",
    "eca(kernel=0)": "kernel=0",
    "eca(gamma=0)": "ECA: gamma=0 is not a positive number",
    "cbam(kernel=4)": "CBAM: kernel=4",
    "cbam(pools=avg)": "CBAM: pools='avg'",
    "cbam(pools=3)": "CBAM: pools=3 is not a tuple of pools",
    "cbam(reduction=65)": "CBAM: reduction=65 leaves no hidden unit",
    "sge(groups=0)": "groups=0",
    "sge(groups=48)": "SGE: groups=48 does not divide channels=64.*groups=32",
    "scale(start=many)": "Scale: start='many' is not a finite number",
    "ge(form=theta_star)": "form='theta_star'.*theta_minus, theta, theta_plus",
    "ge(extent=1)": "extent=1",
    "ge(extent=local)": "global.*integer >= 2, got extent='local'",
    "ge(extent=True)": "extent=True",
    "ge(form=theta, extent=2)": "'theta'.*global.*extent=2",
    "ge(form=theta, pool=max)": "pool='max'.*theta_minus",
    "ge(extent=2, pool=max)": "pool='max'.*global",
    "ge(form=theta_plus, reduction=65)": "reduction=65 leaves no hidden unit",
    "ge(bias=True)": "GE: bias=True.*theta_minus",
    "ge(bias=1, form=theta)": "GE: bias=1",
    "gct(mode=l3)": "mode='l3'.*l2.*l1",
    "gct(placement=between)": "GCT: placement='between'.*tail, conv",
    "simam(lam=0)": "SimAM: lam=0",
    "simam(lam=many)": "lam='many'",
    "coord(reduction=0)": "reduction=0",
    "gc(fusion=sum)": "fusion='sum'.*add.*mul.*both",
    "gc(reduction=64)": "reduction=64 leaves only 1 hidden unit.*reduction <= 32",
    "triplet(kernel=4)": "kernel=4.*odd",
    "ela(form=X)": "form='X'.*T, B, S, L",
    "ela(norm_groups=0)": "norm_groups=0",
    "ela(norm_groups=5)": "norm_groups=5.*channels=64",
    "spa(reduction=65)": "reduction=65 leaves no hidden unit",
    "gsop(dims=0)": "dims=0",
    "gsop(stride=0)": "stride=0",
    "bam(fusion=max)": "BAM: fusion='max'.*mul, add",
    "bam(dilation=0)": "BAM: dilation=0",
    "bam(reduction=65)": "BAM: reduction=65 leaves no hidden unit",
    "bam(placement=conv)": "BAM: placement='conv'.*between, stage, tail",
    "dia(reduction=65)": "DIA: reduction=65 leaves no hidden unit",
    "iebn(eps=0)": "IEBN: eps=0",
    "iebn(momentum=2)": "IEBN: momentum=2",
    "sk(groups=5)": "SK: groups=5 does not divide channels=64",
    "sk(stride=0)": "SK: stride=0",
    "sk(least=0)": "SK: least=0",
    "sk(reduction=0)": "SK: reduction=0",
    "fca(frequencies=0)": "frequencies=0.*1 to 16",
    "fca(frequencies=17)": "frequencies=17.*1 to 16",
    "fca(frequencies=3)": "frequencies=3 does not divide channels=64",
    "fca(size=6)": "FCA: size=6.*7 x 7 grid.*average",
    "fca(size=(32, 4))": "FCA: size=.*7 x 7 grid.*average",
}


def test_wrong_values_are_refused_when_the_module_is_made() -> None:
    for text, message in WRONG.items():
        with pytest.raises(ValueError, match=f"(?s){message}"):
            spem.create_attention(text, 64, size=8)
    message = (
        "SE: reduction=16 leaves no hidden unit for channels=8 (8 // 16 = 0). Use reduction <= 8."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        spem.SE(8)
    for name, label in (
        ("fca", "FCA"),
        ("gc", "GC"),
        ("spa", "SPA"),
        ("ela", "ELA"),
        ("cbam", "CBAM"),
    ):
        with pytest.raises(ValueError, match=rf"{label}: .*channels=8"):
            spem.create_attention(name, 8, size=8)
    with pytest.raises(ValueError, match=r"ELA: form=.S.*8 channels.*channels=12"):
        spem.create_attention("ela(form=S, norm_groups=4)", 12)


def test_a_spec_builds_what_the_constructor_builds() -> None:
    x = feature_map(2, 64, 3, 4)
    for text, direct in (
        ("spem(form=figure, pool=mix(0.3))", spem.SPEM(64, form="figure", pool=spem.Mix(0.3))),
        ("se(bias=False, pool=mix())", spem.SE(64, bias=False, pool=spem.Mix())),
        ("eca(kernel=7)", spem.ECA(64, kernel=7)),
    ):
        expected = randomise(direct.double(), "spec")(x)
        for spec in (text, spem.AttentionSpec.parse(text)):
            module = randomise(spem.create_attention(spec, 64).double(), "spec")
            assert type(module) is type(direct)
            torch.testing.assert_close(module(x), expected, **TOLERANCE[torch.float64])


def test_patterns() -> None:
    assert set(spem.list_attention("s*")) >= {"spem", "se", "srm", "sge", "scale"}
    assert "eca" not in spem.list_attention("s*")
    assert spem.list_attention("nothing*") == []


@pytest.mark.usefixtures("clean_registry")
def test_registering() -> None:
    paper = "My Module (2031), https://example.org/mine"

    @spem.register_attention("half", paper=paper, needs=spem.Needs(statistics=()))
    class Half(spem.ChannelAttention):
        """Half of the map."""

        def __init__(self, channels: int, *, part: float = 0.5, device=None, dtype=None) -> None:
            super().__init__(channels)
            self.part = part

        def gate(self, x: torch.Tensor) -> torch.Tensor:
            return torch.full((1, 1, 1, 1), self.part, dtype=x.dtype)

    assert "half" in spem.list_attention()
    assert Half.name == "half"
    x = feature_map(2, 4, 3, 3)
    torch.testing.assert_close(spem.create_attention("half(part=0.25)", 4)(x), 0.25 * x)
    with pytest.raises(ValueError, match=r"'spem' is already registered, by SPEM\. Use"):
        spem.register_attention("spem", paper="again")(Half)
    with pytest.raises(ValueError, match=r"'half' is already registered, by .*Half"):
        spem.register_attention("half", paper="again")(type("Other", (Half,), {}))
    again = type("Half", (Half,), {"__qualname__": Half.__qualname__, "__module__": __name__})
    assert spem.register_attention("half", paper=paper)(again) is again  # as notebooks do
    assert type(spem.create_attention("half", 4)) is again
    assert again.needs.statistics == ()  # those of the class, where nothing else is said
    own = type("Own", (Half,), {"needs": spem.Needs(pixels=3)})
    assert spem.register_attention("own", paper=paper)(own).needs.pixels == 3
    for wrong in (("mean", "median"), "mean"):  # the second lacks its comma
        with pytest.raises(ValueError, match=r"Needs: statistics='m.*one of mean, var, max"):
            spem.Needs(statistics=wrong)
    for name in ("none", "", "two words", "UPPER", "a(b)", "lambda"):
        with pytest.raises(ValueError, match=rf"{re.escape(repr(name))}.*identifier"):
            spem.register_attention(name, paper="")
    with pytest.raises(TypeError, match=r"Linear is no spem\.ChannelAttention"):
        spem.register_attention("plain", paper="")(torch.nn.Linear)
    entry = (
        "@misc{half,\n  title = {My Module},\n  year = {2031}, url = {https://example.org/mine}\n}"
    )
    assert bibtex("half") == entry


def test_citations_and_modules_name_the_same_papers() -> None:
    for name in spem.list_attention():
        entry, paper = bibtex(name), attention_class(name).paper
        if name == "scale":
            assert entry == f"% scale: {paper}"
            continue
        assert re.match(rf"@\w+\{{{name},\n", entry)
        assert entry.count("{") == entry.count("}")
        year = re.search(r"\((\d{4})\)", paper)
        number = re.search(r"arxiv\.org/abs/([\d.]+)", paper)
        title = re.search(r"title = \{(.+)\}", entry)
        assert year is not None
        assert title is not None
        assert year[1] in entry
        assert number is None or number[1] in entry
        # the first words of the title, without braces and abbreviated ends
        first = re.findall(r"[A-Za-z]+", paper)[:2]
        assert re.findall(r"[A-Za-z]+", title[1])[:2] == first or name == "spa"
        assert "author = {" in entry or name == "spa"
    with pytest.raises(ValueError, match="unknown attention"):
        bibtex("mine_cited")
