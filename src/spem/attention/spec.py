"""The registry of modules, and their text form for command line, configs, tables and folders."""

import ast
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cache
from importlib.resources import files
from keyword import iskeyword
from typing import Any, TypeVar, get_args

from spem.attention.base import ChannelAttention, Needs, Place
from spem.attention.options import Device, Dtype, one_of
from spem.attention.pooling import SRP, Mix

_A = TypeVar("_A", bound=type[ChannelAttention])
_REGISTRY: dict[str, type[ChannelAttention]] = {}


def register_attention(
    name: str,
    *,
    paper: str,
    needs: Needs = Needs(),  # noqa: B008  # frozen
) -> Callable[[_A], _A]:
    """Registers a module class under a name for specs, the command line and generated tables.

    Args:
        name: Registry key, an identifier in lower case.
        paper: Title, year and link of the definition.
        needs: What its definition demands.

    Raises:
        ValueError: The name is taken, reserved, or no lower-case identifier.
    """
    if not name.isidentifier() or name != name.lower() or name in ("none", "mix"):
        raise ValueError(f"register_attention: {name!r} is no free lower-case identifier.")

    def decorate(cls: _A) -> _A:
        if name in _REGISTRY:
            raise ValueError(
                f"register_attention: {name!r} is already registered, "
                f"by {_REGISTRY[name].__qualname__}."
            )
        cls.name, cls.paper, cls.needs = name, paper, needs
        _REGISTRY[name] = cls
        return cls

    return decorate


def attention_class(name: str) -> type[ChannelAttention]:
    """The registered class of a name.

    Raises:
        ValueError: No such name; the message lists the nearest ones.
    """
    if name in _REGISTRY:
        return _REGISTRY[name]
    near = get_close_matches(name.lower(), [*_REGISTRY, "none"], n=3, cutoff=0.5)
    hint = (
        f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(list_attention())}."
    )
    raise ValueError(f"unknown attention {name!r}. {hint}")


def list_attention(pattern: str = "*") -> list[str]:
    """Registered names that match a wildcard pattern, sorted.

    Examples:
        >>> list_attention("s[eg]*")
        ['se', 'sge']
    """
    return sorted(name for name in _REGISTRY if fnmatchcase(name, pattern))


Value = bool | int | float | str | Mix | SRP | tuple["Value", ...] | None

_POOLS: dict[str, tuple[type[Mix] | type[SRP], tuple[str, ...]]] = {
    "mix": (Mix, ("lam", "parametrization")),
    "srp": (SRP, ("share", "regions", "per")),
}
"""Values that are written as a call: the class, and the names of its arguments in their order."""


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
        ValueError: Unknown name (the message lists the nearest) or option (it lists those there
            are).
    """

    name: str
    options: tuple[tuple[str, Value], ...]

    def __init__(self, name: str, options: Mapping[str, Value] | None = None) -> None:
        given = dict(options or {})
        allowed = _options_of(attention_class(name))
        for option in given:
            if option not in allowed:
                raise ValueError(f"{name} has no option {option!r}; it takes {allowed}")
        object.__setattr__(self, "name", name)
        object.__setattr__(
            self, "options", tuple(sorted((k, _frozen(v)) for k, v in given.items()))
        )

    @classmethod
    def parse(cls, text: str) -> "AttentionSpec | None":
        """Reads ``"se(pool=mix(0.3), reduction=8)"``; ``"none"`` gives None. Nothing is evaluated.

        Raises:
            ValueError: The text is no name with keyword options of literal values, or names
                something unknown.
        """
        try:
            tree = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise ValueError(_unreadable(text)) from None
        if isinstance(tree, ast.Constant) and tree.value is None:
            return None
        if isinstance(tree, ast.Name):
            return None if tree.id == "none" else cls(tree.id)
        if not isinstance(tree, ast.Call) or not isinstance(tree.func, ast.Name) or tree.args:
            raise ValueError(_unreadable(text))
        options: dict[str, Value] = {}
        for keyword in tree.keywords:
            if keyword.arg is None or keyword.arg in options:
                raise ValueError(_unreadable(text))
            options[keyword.arg] = _value(keyword.value, text)
        return cls(tree.func.id, options)

    def __str__(self) -> str:
        """The canonical text: sorted options, bare values."""
        if not self.options:
            return self.name
        return f"{self.name}({', '.join(f'{key}={_text(value)}' for key, value in self.options)})"

    def build(
        self,
        channels: int,
        *,
        size: int | tuple[int, int] | None = None,
        stride: int | None = None,
        device: Device = None,
        dtype: Dtype = None,
    ) -> ChannelAttention:
        """Builds the module for a number of channels.

        Args:
            channels: C.
            size: H = W, or (H, W), of the maps it will meet, for modules that must know it and
                whose spec does not say it; the others do not care.
            stride: Stride of the convolution it replaces; only such modules read this.
            device: Where the parameters live.
            dtype: Dtype of the parameters.
        """
        cls = attention_class(self.name)
        options: dict[str, Any] = dict(self.options)
        for hint, value in (("size", size), ("stride", stride)):
            if value is not None and options.get(hint) is None and hint in _options_of(cls):
                options[hint] = value
        return cls(channels, **options, device=device, dtype=dtype)

    @property
    def place(self) -> Place:
        """Where in a network the module stands, a key of `placement.PLACES`.

        Raises:
            ValueError: The option ``placement`` is no such key.
        """
        place: Any = dict(self.options).get("placement", attention_class(self.name).needs.place)
        one_of(self.name, get_args(Place), placement=place)
        return place

    @property
    def shared(self) -> bool:
        """Whether the blocks of a stage share one module."""
        return attention_class(self.name).needs.shared


def create_attention(
    spec: str | AttentionSpec,
    channels: int,
    *,
    size: int | tuple[int, int] | None = None,
    device: Device = None,
    dtype: Dtype = None,
) -> ChannelAttention:
    """Builds an attention module from its text form.

    Examples:
        >>> create_attention("se(reduction=8)", 64).channels
        64

    Args:
        spec: A spec or its text.
        channels: C.
        size: H = W, or (H, W), of the maps it will meet; only modules that must know it, and whose
            spec does not say it, read this.

    Raises:
        ValueError: The spec is unreadable or unknown, or is ``"none"``, which is a network without
            attention.
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


def _options_of(cls: type[ChannelAttention]) -> list[str]:
    parameters = list(inspect.signature(cls).parameters)[1:]  # the first is the channel count
    return [name for name in parameters if name not in ("device", "dtype")]


def _unreadable(text: str) -> str:
    return (
        f"cannot read attention {text!r}. Write a name, or a name with keyword options of plain "
        f"values, like se(pool=mix(0.3), reduction=8)."
    )


def _value(node: ast.expr, text: str) -> Value:
    if isinstance(node, ast.Constant) and (
        node.value is None or isinstance(node.value, (bool, int, float, str))
    ):
        return _quoted(node.value, text) if isinstance(node.value, str) else node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        inner = _value(node.operand, text)
        if isinstance(inner, (int, float)) and not isinstance(inner, bool):
            return -inner
    if isinstance(node, ast.Name):
        return _word(node.id)
    if isinstance(node, (ast.Tuple, ast.List)):
        return tuple(_value(item, text) for item in node.elts)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _POOLS:
        return _pool(node, node.func.id, text)
    raise ValueError(_unreadable(text))


def _word(word: str) -> Value:
    return _POOLS[word][0]() if word in _POOLS else word


def _quoted(value: str, text: str) -> Value:
    """A quoted mix, as shells and JSON suggest writing it, means the same as a bare one."""
    if value.replace(" ", "").startswith(tuple(f"{name}(" for name in _POOLS)):
        try:
            node = ast.parse(value.strip(), mode="eval").body
        except SyntaxError:
            raise ValueError(_unreadable(text)) from None
        return _value(node, text)
    return _word(value)


def _pool(node: ast.Call, kind: str, text: str) -> Mix | SRP:
    arguments: dict[str, Any] = {}
    cls, names = _POOLS[kind]
    for name, argument in zip(names, node.args, strict=False):
        arguments[name] = _value(argument, text)
    if len(node.args) > len(names):
        raise ValueError(f"{kind} takes at most {len(names)} arguments; it takes {list(names)}")
    for keyword in node.keywords:
        if keyword.arg not in names:
            raise ValueError(f"{kind} has no option {keyword.arg!r}; it takes {list(names)}")
        if keyword.arg in arguments:
            raise ValueError(_unreadable(text))
        arguments[keyword.arg] = _value(keyword.value, text)
    return cls(**arguments)


def _frozen(value: Any) -> Value:
    return tuple(_frozen(item) for item in value) if isinstance(value, (list, tuple)) else value


def _text(value: Value) -> str:
    if isinstance(value, tuple):
        inner = ", ".join(_text(item) for item in value)
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, str):
        # A keyword of Python, like the "global" of ge, is no bare word of the text.
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
    entry = _entries().get(name)
    if entry is not None:
        return entry
    match = re.fullmatch(r"(?P<title>.+?) \((?P<year>\d{4})\), (?P<url>https?://\S+)", paper)
    if match is None:
        return f"% {name}: {paper}"
    title, year, url = match["title"], match["year"], match["url"]
    return f"@misc{{{name},\n  title = {{{title}}},\n  year = {{{year}}}, url = {{{url}}}\n}}"


@cache
def _entries() -> dict[str, str]:
    text = files("spem.attention").joinpath("references.bib").read_text(encoding="utf-8")
    entries = [entry.strip() for entry in re.split(r"\n(?=@)", text)]
    return {entry[entry.index("{") + 1 : entry.index(",")]: entry for entry in entries}
