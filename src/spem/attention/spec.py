"""The text form of modules with their options, for command line, configs, tables and folders."""

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cache
from importlib.resources import files
from inspect import signature
from keyword import iskeyword
from typing import Any

from spem.attention.base import _REGISTRY, PLACES, ChannelAttention, Place, options_of
from spem.attention.options import Device, Dtype, Size, one_of
from spem.attention.pooling import SRP, Mix
from spem.extras import first_line

Value = bool | int | float | str | Mix | SRP | tuple["Value", ...] | None
_POOLS: dict[str, type[Mix] | type[SRP]] = {"mix": Mix, "srp": SRP}
"""Values that are written as a call."""


def attention_class(name: str) -> type[ChannelAttention]:
    """The registered class of a name.

    Raises:
        ValueError: No such name; the message lists the nearest ones.
    """
    if name in _REGISTRY:
        return _REGISTRY[name]
    near = get_close_matches(name.lower(), {*_REGISTRY, "none"} - {name}, n=3, cutoff=0.5)
    known = f"Known: {', '.join(list_attention())}."
    hint = f"Did you mean {' or '.join(near)}?" if near else known
    raise ValueError(f"unknown attention {name!r}. {hint}")


def list_attention(pattern: str = "*") -> list[str]:
    """Registered names that match a wildcard pattern, sorted.

    Examples:
        >>> list_attention("s[eg]*")
        ['se', 'sge']
    """
    return sorted(name for name in _REGISTRY if fnmatchcase(name, pattern))


@dataclass(frozen=True, init=False)
class AttentionSpec:
    """A registered module with options, checked against its constructor.

    Examples:
        >>> str(AttentionSpec.parse("se(reduction=8, pool='mix(0.3)')"))
        'se(pool=mix(0.3), reduction=8)'

    Args:
        name: Registry key.
        options: Constructor keywords other than ``device`` and ``dtype``.

    Raises:
        ValueError: Unknown name (the message lists the nearest) or option (it lists all).
    """

    name: str
    options: tuple[tuple[str, Value], ...]

    def __init__(self, name: str, options: Mapping[str, Value] | None = None) -> None:
        allowed = options_of(attention_class(name))
        given = sorted(dict(options or {}).items())
        for option, _ in given:
            if option not in allowed:
                raise ValueError(f"{name} has no option {option!r}; it takes {allowed}")
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "options", tuple((k, _frozen(v)) for k, v in given))

    @classmethod
    def parse(cls, text: str) -> "AttentionSpec | None":
        """Reads ``"se(pool=mix(0.3), reduction=8)"``; ``"none"`` gives None. Nothing is evaluated.

        Raises:
            ValueError: The text is not a name with keyword options of literal values, or names
                something unknown.
        """
        try:
            node = _node(text)
            if isinstance(node, ast.Constant) and node.value is None:
                return None
            name, unnamed, options = _call(node)
            if unnamed:
                raise SyntaxError
        except SyntaxError:
            raise ValueError(
                f"cannot read attention {text!r}. Write a name, or a name with keyword options of "
                f"plain values, like se(pool=mix(0.3), reduction=8)."
            ) from None
        if name != "none":
            return cls(name, options)
        if options or not isinstance(node, ast.Name):
            raise ValueError(f"none takes no options, got {text!r}: it is the plain network.")
        return None

    def __str__(self) -> str:
        """The canonical text: sorted options, bare values."""
        if not self.options:
            return self.name
        return f"{self.name}({', '.join(f'{key}={_text(value)}' for key, value in self.options)})"

    def build(
        self,
        channels: int,
        *,
        size: Size | None = None,
        stride: int | None = None,
        device: Device = None,
        dtype: Dtype = None,
    ) -> ChannelAttention:
        """Builds the module for a number of channels.

        Args:
            channels: C.
            size: H = W, or (H, W), of the maps it will meet; only modules that must know it, and
                whose spec does not say it, read this.
            stride: Stride of the convolution it replaces; only such modules read this.
            device: Where the parameters live.
            dtype: Dtype of the parameters.

        Raises:
            ValueError: An option has a value that the module does not take.
        """
        cls = attention_class(self.name)
        options: dict[str, Any] = dict(self.options)
        for hint, value in (("size", size), ("stride", stride)):
            if value is not None and options.get(hint) is None and hint in options_of(cls):
                options[hint] = value
        try:
            return cls(channels, **options, device=device, dtype=dtype)
        except (TypeError, OverflowError) as error:  # options are texts and numbers of any kind
            raise ValueError(f"{self} cannot be built: {first_line(error)}.") from error

    @property
    def place(self) -> Place:
        """Where in a network the module goes, a key of `PLACES`.

        Raises:
            ValueError: The option ``placement`` is no such key.
        """
        place: Any = dict(self.options).get("placement", attention_class(self.name).needs.place)
        one_of(self.name, tuple(PLACES), placement=place)
        return place

    @property
    def shared(self) -> bool:
        """Whether the blocks of a stage share one module."""
        return attention_class(self.name).needs.shared


def create_attention(
    spec: str | AttentionSpec,
    channels: int,
    *,
    size: Size | None = None,
    device: Device = None,
    dtype: Dtype = None,
) -> ChannelAttention:
    """Builds an attention module from its text form.

    Examples:
        >>> create_attention("se(reduction=8)", 64).channels
        64

    Args:
        spec: A spec or its text; all else is as for `AttentionSpec.build`.

    Raises:
        ValueError: The spec is unreadable, unknown, or ``"none"``, a network without attention.
        TypeError: The spec is neither.
    """
    if not isinstance(spec, (str, AttentionSpec)):
        raise TypeError(
            f"create_attention: the spec, a text like 'se(reduction=8)', comes first; "
            f"got {type(spec).__name__}. Write create_attention('se', 64)."
        )
    parsed = as_spec(spec)
    if parsed is None:
        raise ValueError(
            "create_attention: 'none' is the plain network; there is no module to create."
        )
    return parsed.build(channels, size=size, device=device, dtype=dtype)


def as_spec(attention: str | AttentionSpec | None) -> AttentionSpec | None:
    """A spec from any of the forms the library takes; None and ``"none"`` are the plain network.

    Raises:
        TypeError: It is of another kind, such as a class or a module.
    """
    if attention is None or isinstance(attention, AttentionSpec):
        return attention
    if isinstance(attention, str):
        return AttentionSpec.parse(attention)
    kind = attention if isinstance(attention, type) else type(attention)
    name = getattr(kind, "name", None) or "se"
    raise TypeError(
        f"attention is a text like 'se(reduction=8)' or an AttentionSpec, got {kind.__name__}. "
        f"Write {name if isinstance(name, str) else 'se'!r}."
    )


def spec_text(attention: str | AttentionSpec | None) -> str:
    """The canonical text of an attention, ``"none"`` for the plain network."""
    parsed = as_spec(attention)
    return "none" if parsed is None else str(parsed)


def _node(text: str) -> ast.expr:
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (ValueError, RecursionError, MemoryError) as error:
        raise SyntaxError from error


def _call(node: ast.expr) -> tuple[str, list[Value], dict[str, Value]]:
    """The name, the values without and with a keyword of ``name`` or ``name(...)``."""
    if isinstance(node, ast.Name):
        return node.id, [], {}
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise SyntaxError
    named = {part.arg: _value(part.value) for part in node.keywords if part.arg}
    if len(named) < len(node.keywords):  # one twice, or **options
        raise SyntaxError
    return node.func.id, [_value(argument) for argument in node.args], named


def _value(node: ast.expr) -> Value:
    match node:
        case ast.Constant(str(word)) if word.partition("(")[0].strip() in _POOLS:
            return _value(_node(word))  # shells and JSON suggest quoting a mix
        case ast.Constant(bool() | int() | float() | str() | None as value):
            return value
        case ast.UnaryOp(ast.USub(), ast.Constant(int() | float() as v)) if type(v) is not bool:
            return -v
        case ast.Name(name) if name not in _POOLS:
            return name
        case ast.Tuple(items) | ast.List(items):
            return tuple(_value(item) for item in items)
        case _:
            kind, unnamed, options = _call(node)
    if kind not in _POOLS:
        raise SyntaxError
    names = [field.name for field in fields(_POOLS[kind])]
    try:
        given = signature(_POOLS[kind]).bind(*unnamed, **options)
    except TypeError as error:
        raise ValueError(f"{kind} {error}; it takes {names}") from None
    return _POOLS[kind](*given.args, **given.kwargs)


def _frozen(value: Any) -> Value:
    return tuple(_frozen(item) for item in value) if isinstance(value, (list, tuple)) else value


def _text(value: Value) -> str:
    if isinstance(value, tuple):
        inner = ", ".join(_text(item) for item in value)
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, str):
        # A keyword of Python, like the "global" of ge, is not a bare word of the text.
        return value if value.isidentifier() and not iskeyword(value) else repr(value)
    return str(value) if isinstance(value, (Mix, SRP)) else repr(value)


def bibtex(name: str) -> str:
    """The BibTeX entry of a registered module's paper, under the module's name as its key.

    A module without an entry in `references.bib` gets one made of its `paper`, without authors.

    Raises:
        ValueError: No module of this name.

    Examples:
        >>> print(bibtex("se").splitlines()[0])
        @misc{se,
    """
    paper = attention_class(name).paper
    if name in _entries():
        return _entries()[name]
    match = re.fullmatch(r"(.+?) \((\d{4})\), (https?://\S+)", paper)
    if match is None:
        return f"% {name}: {paper}"
    title, year, url = match.groups()
    return f"@misc{{{name},\n  title = {{{title}}},\n  year = {{{year}}}, url = {{{url}}}\n}}"


@cache
def _entries() -> dict[str, str]:
    text = files("spem.attention").joinpath("references.bib").read_text(encoding="utf-8")
    entries = [entry.strip() for entry in re.split(r"\n(?=@)", text)]
    return {entry[entry.index("{") + 1 : entry.index(",")]: entry for entry in entries}
