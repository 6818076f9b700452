"""The text form of an attention module, for command line, configs, tables and folder names."""

import ast
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from keyword import iskeyword
from typing import Any

import torch

from spem.attention.base import ChannelAttention, attention_class
from spem.attention.needs import PLACES, Place
from spem.attention.pooling import Mix
from spem.attention.srp import SRP

Value = bool | int | float | str | Mix | SRP | tuple["Value", ...] | None

_POOLS: dict[str, tuple[type[Mix] | type[SRP], tuple[str, ...]]] = {
    "mix": (Mix, ("lam", "parametrization")),
    "srp": (SRP, ("share", "regions", "per")),
}
"""Values that are written as a call: the class, and the names of its arguments in their order."""


@dataclass(frozen=True, init=False)
class AttentionSpec:
    """A registered module with options, checked against its constructor.

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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
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
        """Where in a network the module stands, a key of `PLACES`.

        Raises:
            ValueError: The option ``placement`` is no such key.
        """
        place: Any = dict(self.options).get("placement", attention_class(self.name).needs.place)
        if place not in PLACES:
            raise ValueError(
                f"{self.name}: placement={place!r} is unknown. Use one of {', '.join(PLACES)}."
            )
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
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> ChannelAttention:
    """Builds an attention module from its text form.

    >>> create_attention("se(reduction=8)", 64).channels
    64

    Args:
        spec: A spec or its text.
        channels: C.
        size: H = W, or (H, W), of the maps it will meet; only modules that must know it, and whose
            spec does not say it, read this.
        device: Where the parameters live.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: The spec is unreadable or unknown, or is ``"none"``, which is a network without
            attention.
    """
    parsed = as_spec(spec)
    if parsed is None:
        raise ValueError(
            "create_attention: 'none' is the plain network; there is no module to create."
        )
    return parsed.build(channels, size=size, device=device, dtype=dtype)


def as_spec(attention: str | AttentionSpec | None) -> AttentionSpec | None:
    """A spec from any of the forms the library takes; None and ``"none"`` are the plain network."""
    return AttentionSpec.parse(attention) if isinstance(attention, str) else attention


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
