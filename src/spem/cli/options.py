"""The options of a command: read from the signature of its `run`, without loading torch.

    def run(
        network: Annotated[str, "NETWORK", "a run's folder or its weights"],
        *,
        batch: Annotated[int, "N", "images at a time", RARE] = 500,
        json: Json = False,
    ) -> None:
        \"\"\"Accuracy of a network on test images.\"\"\"

A parameter before the star is an argument, one behind it an option: `--batch`. Its type is followed
by what it takes, its line of the help, and perhaps `RARE` or a function that makes the value of the
text. Behind that of ``**rest`` come lists of options, or functions with such parameters: first in
the help, or last where `RARE` follows. The docstring is text of the help.
"""

from __future__ import annotations

import inspect
import math
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import chain, takewhile
from pathlib import Path
from textwrap import fill
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

Kind = Callable[[str], Any]
"""Makes the value of a word; raises ValueError with a sentence about it."""
RARE, ABSENT, REQUIRED = object(), object(), object()
"""Shown by `--help-all` only; the default that leaves a parameter out; no default."""
Json = Annotated[bool, "print the result as JSON"]
_FLAG = re.compile(r"-[^\d.]")  # a negative number is none


@dataclass(frozen=True)
class Option:
    """An option of a command, or an argument, which has no flags; the short help shows the first.

    `metavar` is what it takes, "" for nothing; with `many`, all words up to the next option.
    """

    name: str
    flags: tuple[str, ...]
    metavar: str
    help: str
    kind: Kind = str
    default: Any = ABSENT
    many: bool = False
    rare: bool = False

    def value(self, words: Sequence[str], where: str = "") -> Any:
        """The value of these words; ValueError begins with where they are."""
        try:
            return tuple(map(self.kind, words)) if self.many else self.kind(words[0])
        except (ValueError, OSError) as error:
            raise ValueError(f"{where}{error}") from error


class Options:
    """What a command takes: the parameters of its `run`, and `--module` for the function given."""

    def __init__(self, command: str, run: Callable[..., Any], module: Kind = str) -> None:
        self.run, self._prog = run, f"spem {command}"
        self._text, _, self._more = (inspect.getdoc(run) or "").partition("\n\n")
        self.options = sorted(_options(run), key=lambda option: option.name == "json")
        own = Option("module", ("--module",), "FILE:CLASS", "", module)
        self.flags = {flag: option for option in (own, *self.options) for flag in option.flags}
        self._arguments = [option for option in self.options if not option.flags]
        self._usage = self._prog
        for option in self._arguments:
            name = option.metavar + " ..." * option.many
            self._usage += f" {name}" if option.default is REQUIRED else f" [{name}]"
        self._typed: dict[str, str] = {}

    def read(self, words: Sequence[str]) -> dict[str, Any] | None:
        """The parameters of `run` in a call; None if it was for help, which is printed."""
        if {"-h", "--help", "--help-all"} & set(words):
            print(self.help(everything="--help-all" in words))
            return None
        found, free, rest = dict[str, Any](), list[str](), list(words)
        while rest:
            word = rest.pop(0)
            if not word:
                raise self._wrong("an argument is empty")
            if word == "--":
                free += rest
                break
            if not _FLAG.match(word):
                free.append(word)
                continue
            flag, sign, value = word.partition("=")
            option = self._named(flag := flag.replace("_", "-"))
            given = [value] if sign else list[str]()
            if option.metavar and not sign:
                most = len(rest) if option.many else 1
                given = list(takewhile(lambda word: not _FLAG.match(word), rest[:most]))
                rest = rest[len(given) :]
            if bool(given) != bool(option.metavar) or "" in given:
                takes = f"needs a value, {option.metavar}" if option.metavar else "takes no value"
                raise self._wrong(f"{flag} {takes}")
            made = option.value(given or [""], f"{flag}: ")
            found[option.name] = (*found.get(option.name, ()), *made) if option.many else made
        for option in self._arguments:
            given, free = (free, []) if option.many else (free[:1], free[1:])
            if given:
                found[option.name] = option.value(given)
            elif option.default is REQUIRED:
                raise self._wrong(f"{option.metavar} is missing: {self._usage}")
        if free:
            raise self._wrong(f"{free[0]!r} is one argument too many: {self._usage}")
        values = {option.name: found.get(option.name, option.default) for option in self.options}
        return {name: value for name, value in values.items() if value is not ABSENT}

    def _wrong(self, text: str) -> ValueError:
        return ValueError(f"{text}. See {self._prog} --help.")

    def _named(self, flag: str) -> Option:
        if flag not in self.flags:
            near = get_close_matches(flag, self.flags, n=2, cutoff=0.7)
            hint = f"Did you mean {' or '.join(near)}?" if near else f"See {self._prog} --help-all."
            raise ValueError(f"unknown option {flag}. {hint}")
        self._typed[self.flags[flag].name] = flag
        return self.flags[flag]

    def help(self, *, everything: bool = False) -> str:
        """The text of `--help`, or of `--help-all`."""
        width = max(50, shutil.get_terminal_size().columns) - 2
        shown = [option for option in self.options if everything or not option.rare]
        names = [", ".join(o.flags if everything else o.flags[:1]) for o in shown]
        names = ["  " + f"{n} {o.metavar}".strip() for n, o in zip(names, shown, strict=True)]
        column = min(24, max(map(len, names))) + 2
        indent = "\n" + " " * column
        lines: dict[bool, list[str]] = {False: [], True: []}
        for name, option in zip(names, shown, strict=True):
            name = name.ljust(column) if len(name) <= column - 2 else name + indent
            text = fill(option.help, width - column).replace("\n", indent)
            lines[bool(option.flags)].append(name + text)
        hidden = len(self.options) - len(shown)
        more = f"{hidden} more option{'s' * (hidden > 1)}: {self._prog} --help-all" * bool(hidden)
        head, last = fill(self._text, width), fill(self._more, width)
        parts = [f"usage: {self._usage} [OPTIONS]", head, *map("\n".join, lines.values())]
        return "\n\n".join(part for part in (*parts, last, more) if part)

    def in_flags(self, text: str) -> str:
        """A message of the library with its keywords as they are typed.

        `optim.lr=-1` becomes `--lr -1`, so does `lr=-1`; `root=` and `optim.lr` become `--root` and
        `--lr`, and `skip_broken=True` is `--data.skip-broken`.
        """
        text = text.replace("impl=None", "no impl=")
        text = text.replace("dynamic_batch=False", "fixed_batch=True")
        if os.environ.get("SPEM_IMPL") and not {"impl", "runtime.impl"} & self._typed.keys():
            text = re.sub(r"\b(runtime\.)?impl=", "SPEM_IMPL=", text).replace("= or", " or")
        for option in self.options:
            section, _, name = option.name.rpartition(".")
            if option.flags and name in text:
                flag = self._typed.get(option.name, option.flags[0])
                keyword = rf"(?<![\w.(-])(?:\w+\.)?{name}="
                keyword += r"(?=([\w'\"(\[-]?))" if option.metavar else "True()"
                text = re.sub(keyword, lambda at, flag=flag: flag + " " * bool(at[1]), text)
                if section:
                    field = rf"(?<![\w./-]){re.escape(option.name)}(?![\w=:]|\.\w)"
                    text = re.sub(field, flag, text)
        return text


def typed(hint: Any, lowest: float = 1) -> tuple[Kind, str, bool]:
    """How a word becomes a value of this type, what it is called, and whether there are several."""
    parts = [part for part in get_args(hint) if part is not NoneType]
    if NoneType in get_args(hint):
        return typed(parts[0], lowest)
    if get_origin(hint) in (Sequence, tuple):
        return *typed(parts[0], lowest)[:2], True
    if get_origin(hint) is Literal:
        return one_of(*parts), "|".join(parts), False
    kinds: dict[Any, tuple[Kind, str]] = {bool: (lambda _: True, ""), float: (number(), "X")}
    kinds[int] = number(lowest, int), "N"
    return *kinds.get(hint, (hint, "TEXT")), False


def _options(run: Callable[..., Any]) -> list[Option]:
    found: list[Option] = []
    hints = get_type_hints(run, include_extras=True)
    for name, parameter in inspect.signature(run).parameters.items():
        if get_origin(hints[name]) is not Annotated:  # of a function that is called with more
            continue
        hint, *said = get_args(hints[name])
        if parameter.kind is parameter.VAR_KEYWORD:
            parts = [part for part in said if part is not RARE]
            more = chain(*(part if isinstance(part, list) else _options(part) for part in parts))
            place = len(found) if RARE in said else sum(not option.flags for option in found)
            found[place:place] = more
            continue
        kind, takes, many = typed(hint)
        kind = next((part for part in said if callable(part)), kind)
        *metavar, help = (part for part in said if isinstance(part, str))
        default = REQUIRED if parameter.default is parameter.empty else parameter.default
        if isinstance(default, (str, int, float, Path)) and default is not False:
            help += f" (default {default})"
        flag = f"--{name.strip('_').replace('_', '-')}"
        flags = (flag,) if parameter.kind is parameter.KEYWORD_ONLY else ()
        takes = metavar[0] if metavar else takes
        found.append(Option(name, flags, takes, help, kind, default, many, RARE in said))
    return found


def number(lowest: float = -math.inf, kind: type[float] = float) -> Kind:
    """Finite numbers from here on, whole ones for int."""
    what = "whole number" if kind is int else "number"
    what += "" if lowest == -math.inf else f" from {lowest:g} on"

    def make(text: str) -> float:
        try:
            found = kind(text)
        except ValueError:
            found = math.nan
        if not (lowest <= found and abs(found) < (1e18 if kind is int else math.inf)):
            raise ValueError(f"{text!r} is not a {what}.")
        return found

    return make


def one_of(*names: str, what: str = "value") -> Kind:
    """One of these names."""

    def make(text: str) -> str:
        if text not in names:
            raise ValueError(unknown(what, text, names))
        return text

    return make


def unknown(what: str, name: str, known: Sequence[str]) -> str:
    """The sentences for a name that does not exist, with the nearest ones that do."""
    near = get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return f"unknown {what} {name!r}.{hint} Known: {', '.join(known)}."
