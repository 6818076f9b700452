"""Names and specs: the registry, the text form, and what it refuses."""

from __future__ import annotations

import re
import string
from collections.abc import Iterator

import pytest
import torch
from attention.drawing import feature_map, randomise
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import TOLERANCE

import spem
from spem.attention.base import _REGISTRY


def roundtrip(text: str) -> str:
    spec = spem.AttentionSpec.parse(text)
    assert spec is not None
    printed = str(spec)
    assert spem.AttentionSpec.parse(printed) == spec
    assert str(spem.AttentionSpec.parse(printed)) == printed
    return printed


@pytest.mark.parametrize(
    "canonical",
    [
        "spem",
        "se",
        "scale",
        "se(pool=mix(0.3), reduction=8)",
        "se(pool=mix())",
        "se(bias=False)",
        "se(bias=True, pool=max, reduction=4)",
        "spem(form=code)",
        "spem(form=figure, pool=mix(parametrization=anchored), reweight=sum_of_sigmoids)",
        "spem(pool=mix(parametrization=sigmoid))",
        "sge(groups=8, pool=min)",
        "eca(kernel=5)",
        "srm(pool=max)",
        "scale(start=0.5)",
    ],
)
def test_canonical_text_is_kept(canonical: str) -> None:
    assert roundtrip(canonical) == canonical


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("se(reduction=8, pool=mix(0.3))", "se(pool=mix(0.3), reduction=8)"),
        ("se( reduction = 8,pool = 'mix(0.3)' )", "se(pool=mix(0.3), reduction=8)"),
        ('se(pool="max")', "se(pool=max)"),
        ("se(pool='mix(parametrization=anchored)')", "se(pool=mix(parametrization=anchored))"),
        ("spem(form='code')", "spem(form=code)"),
        ("spem()", "spem"),
        ("  spem  ", "spem"),
        ("spem(reweight=none, form=text)", "spem(form=text, reweight=none)"),
    ],
)
def test_other_spellings_have_one_canonical_text(text: str, canonical: str) -> None:
    assert roundtrip(text) == canonical


def test_none_is_the_plain_network() -> None:
    assert spem.AttentionSpec.parse("none") is None


def test_specs_are_values() -> None:
    first, second = (
        spem.AttentionSpec.parse(t)
        for t in ("se(reduction=8, pool=max)", "se(pool='max', reduction=8)")
    )
    assert first == second
    assert hash(first) == hash(second)
    assert first != spem.AttentionSpec.parse("se(reduction=8)")
    with pytest.raises(AttributeError):
        first.name = "eca"  # type: ignore[misc]


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
    "sge": {"groups": st.sampled_from(["1", "2", "16"]), "pool": POOL_TEXTS},
    "eca": {"kernel": st.sampled_from(["3", "9", "None"]), "pool": POOL_TEXTS},
}


@st.composite
def spec_texts(draw: st.DrawFn) -> tuple[str, str]:
    """A spec in some spelling, and the same with other quotes in another order."""
    name = draw(st.sampled_from(sorted(OPTIONS)))
    chosen = draw(st.fixed_dictionaries({}, optional=OPTIONS[name]))
    spellings = []
    for _ in range(2):
        order = draw(st.permutations(sorted(chosen)))
        quoted = {o: draw(st.sampled_from(["", "'", '"'])) for o in order}
        if name == "eca" or name == "sge" or name == "se":  # numbers stay numbers
            quoted |= {o: "" for o in ("kernel", "groups", "reduction", "bias") if o in quoted}
        spellings.append(
            f"{name}({', '.join(f'{o}={quoted[o]}{chosen[o]}{quoted[o]}' for o in order)})"
        )
    return spellings[0], spellings[1]


@settings(deadline=None, max_examples=100, derandomize=True)
@given(spec_texts())
def test_any_spelling_reaches_the_same_spec_and_builds(texts: tuple[str, str]) -> None:
    first, second = map(roundtrip, texts)
    assert first == second
    options = re.findall(r"(\w+)=", first.partition("(")[2].replace("mix(parametrization=", "mix("))
    assert options == sorted(options)
    assert '"' not in first
    assert "'" not in first
    module = spem.create_attention(first, 64)
    x = feature_map(2, 64, 3, 3, dtype=torch.float32)
    assert module(x).shape == x.shape


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


def test_a_misspelt_option() -> None:
    message = "se has no option 'reductoin'; it takes ['reduction', 'bias', 'pool']"
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        spem.AttentionSpec.parse("se(reductoin=8)")


@pytest.mark.parametrize("option", ["channels=64", "device=cpu", "dtype=float64"])
def test_what_the_caller_passes_is_no_option(option: str) -> None:
    with pytest.raises(
        (ValueError, TypeError), match=re.escape(f"no option '{option.partition('=')[0]}'")
    ):
        spem.AttentionSpec.parse(f"se({option})")


@pytest.mark.parametrize(
    ("wrong", "near"),
    [("spm", "spem"), ("SPEM", "spem"), ("ecaa", "eca"), ("sgee", "sge"), ("scal", "scale")],
)
def test_an_unknown_name_lists_the_near_ones(wrong: str, near: str) -> None:
    with pytest.raises((ValueError, KeyError), match=rf"(?s){wrong}.*\b{near}\b"):
        spem.create_attention(wrong, 64)


@pytest.mark.parametrize(
    "text",
    [
        "se(__import__('os'))",
        "se(reduction=__import__('os').system('true'))",
        "se(pool=print(1))",
        "se(pool=mix(print(1)))",
        "__import__('os')",
        "se(reduction=1+1)",
        "se(reduction=[8][0])",
        "se(reduction=(lambda: 8)())",
        "se(pool=spem.Mix)",
        "se(pool=mix.lam)",
        "(se)(reduction=8)(bias=True)",
        "se.__class__()",
        "[se]",
        "se if True else eca",
        "f'{se}'",
        "se(**{'reduction': 8})",
        "se(*[8])",
        "se; eca",
        "se\nse",
        "se(reduction=8",
        "se)",
        "se(reduction=8, reduction=4)",
        "se(pool=mix(0.3, 0.4))",
        "se(pool=mix(0.3, lam=0.4))",
        "se(pool=mix(lambda=0.4))",
        "se(pool='mix(')",
        "",
        "   ",
        "()",
        "se(" * 3000,
        "-" * 5000 + "1",
        "se(pool=" + "mix(" * 500 + ")" * 501,
        "se\0",
    ],
    ids=lambda t: repr(t[:30]),
)
def test_nothing_is_evaluated(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((ValueError, TypeError, KeyError)) as caught:
        spem.create_attention(text, 64)
    assert str(caught.value)
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("se(pool=median)", r"median.*avg.*max.*min.*[Mm]ix"),
        ("se(pool=3)", r"pool"),
        ("se(reduction=many)", r"reduction.*many"),
        ("se(reduction=0)", r"reduction.*0"),
        ("se(reduction=-2)", r"reduction.*-2"),
        ("se(reduction=2.5)", r"reduction.*2\.5"),
        ("se(reduction=True)", r"reduction.*True"),
        ("se(bias=maybe)", r"bias.*maybe"),
        ("spem(form=prose)", r"prose.*text.*figure.*code"),
        ("spem(reweight=ours)", r"ours.*shared_sum"),
        ("spem(form=code, reweight=none)", r"code.*shared_sum"),
        ("se(pool=mix(1.5))", r"1\.5"),
        ("se(pool=mix(nan))", r"nan"),
        ("se(pool=mix(parametrization=softmax))", r"softmax.*squares"),
        ("eca(kernel=4)", r"kernel.*4.*odd|odd.*kernel.*4|kernel.*odd.*4"),
        ("eca(kernel=0)", r"kernel.*0"),
        ("cbam(kernel=4)", r"kernel.*4"),
        ("cbam(pools=avg)", r"pools"),
        ("sge(groups=0)", r"groups.*0"),
        ("sge(groups=48)", r"SGE.*(64.*48|48.*64)"),
        ("se(reduction=65)", r"SE: reduction=65 leaves no hidden unit for channels=64"),
        ("cbam(reduction=65)", r"CBAM: reduction=65 leaves no hidden unit for channels=64"),
        ("scale(start=nan)", r"start"),
        ("scale(start=many)", r"start.*many"),
        ("se(bias=false)", r"bias.*false"),
        ("se(bias=1)", r"bias.*1"),
    ],
)
def test_wrong_values_are_refused_when_the_module_is_made(text: str, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"(?s){message}"):
        spem.create_attention(text, 64)


def test_fewer_channels_than_the_reduction() -> None:
    message = (
        "SE: reduction=16 leaves no hidden unit for channels=8 (8 // 16 = 0). Use reduction <= 8."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        spem.SE(8)
    with pytest.raises(ValueError, match=r"CBAM: .*channels=8"):
        spem.CBAM(8)


@pytest.mark.parametrize(
    "text",
    [
        "spem(form=figure, pool=mix(0.3))",
        "se(bias=False, pool=mix(), reduction=8)",
        "sge(groups=16)",
        "eca(kernel=7)",
    ],
)
def test_a_spec_builds_what_the_constructor_builds(text: str) -> None:
    direct = {
        "spem(form=figure, pool=mix(0.3))": lambda: spem.SPEM(
            64, form="figure", pool=spem.Mix(0.3)
        ),
        "se(bias=False, pool=mix(), reduction=8)": lambda: spem.SE(
            64, bias=False, pool=spem.Mix(), reduction=8
        ),
        "sge(groups=16)": lambda: spem.SGE(64, groups=16),
        "eca(kernel=7)": lambda: spem.ECA(64, kernel=7),
    }[text]()
    x = feature_map(2, 64, 3, 4)
    expected = randomise(direct.double(), "spec")(x)
    for spec in (text, spem.AttentionSpec.parse(text)):
        module = randomise(spem.create_attention(spec, 64).double(), "spec")
        assert type(module) is type(direct)
        torch.testing.assert_close(module(x), expected, **TOLERANCE[torch.float64])


def test_patterns() -> None:
    assert set(spem.list_attention("s*")) >= {"spem", "se", "srm", "sge", "scale"}
    assert spem.list_attention("s?em") == ["spem"] or "spem" in spem.list_attention("sp*")
    assert "eca" not in spem.list_attention("s*")
    assert spem.list_attention("nothing*") == []


@pytest.fixture
def clean_registry() -> Iterator[None]:
    """What a test registers is forgotten after it."""
    before = dict(_REGISTRY)
    yield
    _REGISTRY.clear()
    _REGISTRY.update(before)


@pytest.mark.usefixtures("clean_registry")
def test_registering() -> None:
    @spem.register_attention("half", paper="none", needs=spem.Needs(statistics=()))
    class Half(spem.ChannelAttention):
        """Half of the map."""

        def __init__(self, channels: int, *, part: float = 0.5, device=None, dtype=None) -> None:
            super().__init__(channels)
            self.part = part

        def gate(self, x: torch.Tensor) -> torch.Tensor:
            return torch.full((1, 1, 1, 1), self.part, dtype=x.dtype)

    assert "half" in spem.list_attention()
    assert Half.name == "half"
    module = spem.create_attention("half(part=0.25)", 4)
    x = feature_map(2, 4, 3, 3)
    torch.testing.assert_close(module(x), 0.25 * x)
    with pytest.raises((ValueError, KeyError), match="half"):
        spem.register_attention("half", paper="again")(Half)
    with pytest.raises((ValueError, KeyError), match="spem"):
        spem.register_attention("spem", paper="again")(Half)


@pytest.mark.usefixtures("clean_registry")
@pytest.mark.parametrize("name", ["none", "", "two words", "UPPER", "a(b)"])
def test_a_name_that_no_spec_could_hold_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{re.escape(repr(name))}.*identifier"):
        spem.register_attention(name, paper="")(type("Odd", (spem.ChannelAttention,), {}))
