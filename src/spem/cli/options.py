"""The options of a command: read from the signature of its `run`, without torch.

    def run(
        network: Annotated[str, "NETWORK", "a run's folder or its weights"],
        *,
        batch: Annotated[int, "N", "images at a time", RARE] = 500,
        json: Json = False,
    ) -> None:
        \"\"\"Accuracy of a network on test images.\"\"\"

A parameter before the star is an argument, one behind it an option: `--batch`. Its type is followed
by what it takes, its line of the help, and perhaps `RARE` (only `--help-all` shows it) or a
function that makes the value of the text; behind that of ``**rest`` stands a list of options. The
docstring is the head of the help, and what follows its first line comes last. A mistake is answered
at once: importing a command must not load torch.
"""

from __future__ import annotations

import inspect
import math
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from textwrap import fill
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

Kind = Callable[[str], Any]
RARE, ABSENT, REQUIRED = object(), object(), object()
Json = Annotated[bool, "print the result as JSON"]
_FLAG = re.compile(r"-[^\d.]")  # a negative number is none


@dataclass(frozen=True)
class Option:
    """An option of a command, or an argument, which has no flags.

    Attributes:
        name: Of the parameter that gets the value.
        flags: As they are typed; the short help shows the first.
        metavar: What it takes; "" for an option that takes nothing.
        help: Its line.
        kind: Makes the value of a word; raises ValueError with a sentence about it.
        default: Without it; `ABSENT` leaves the parameter out.
        many: Whether it takes all words up to the next option.
        rare: Whether only `--help-all` shows it.
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
        """The value of these words; ValueError begins with where they stand."""
        try:
            return tuple(map(self.kind, words)) if self.many else self.kind(words[0])
        except (ValueError, OSError) as error:
            raise ValueError(f"{where}{error}") from error


class Options:
    """What a command takes.

    Args:
        command: Its name.
        run: Its function.
        module: Is given the word after `--module`, unless the command has such an option itself.
    """

    def __init__(self, command: str, run: Callable[..., Any], module: Kind = str) -> None:
        self.run, self._prog = run, f"spem {command}"
        self._text, _, self._more = (inspect.getdoc(run) or "").partition("\n\n")
        self.options = sorted(_options(run), key=lambda option: option.name == "json")
        own = Option("module", ("--module",), "FILE:CLASS", "", module)
        self.flags = {flag: option for option in (own, *self.options) for flag in option.flags}
        self._arguments = [option for option in self.options if not option.flags]
        self._usage = self._prog
        for option in self._arguments:
            name = f"{option.metavar} ..." if option.many else option.metavar
            self._usage += f" {name}" if option.default is REQUIRED else f" [{name}]"
        self._typed: dict[str, str] = {}

    def read(self, words: Sequence[str]) -> dict[str, Any] | None:
        """The parameters of `run` in a call; None if it was for help, which is printed.

        Raises:
            ValueError: The call says something that the command does not take.
        """
        if {"-h", "--help", "--help-all"} & set(words):
            print(self.help(everything="--help-all" in words))
            return None
        found, free, rest = dict[str, Any](), list[str](), list(words)
        while rest:
            word = rest.pop(0)
            if word == "--":
                free += rest
                break
            if not _FLAG.match(word):
                free.append(word)
                continue
            flag, sign, value = word.partition("=")
            option = self._named(flag := flag.replace("_", "-"))
            given = [value] if sign else list[str]()
            while not sign and rest and not _FLAG.match(rest[0]):
                if not option.metavar or (given and not option.many):
                    break
                given.append(rest.pop(0))
            if bool(given) != bool(option.metavar):
                takes = f"needs a value, {option.metavar}" if option.metavar else "takes no value"
                raise ValueError(f"{flag} {takes}. See {self._prog} --help.")
            found[option.name] = option.value(given or [""], f"{flag}: ")
        for option in self._arguments:
            given, free = (free, []) if option.many else (free[:1], free[1:])
            if given:
                found[option.name] = option.value(given)
            elif option.default is REQUIRED:
                missing = f"{option.metavar} is missing: {self._usage}"
                raise ValueError(f"{missing}. See {self._prog} --help.")
        if free:
            many = f"{free[0]!r} is one argument too many: {self._usage}"
            raise ValueError(f"{many}. See {self._prog} --help.")
        values = {option.name: found.get(option.name, option.default) for option in self.options}
        return {name: value for name, value in values.items() if value is not ABSENT}

    def _named(self, flag: str) -> Option:
        if flag not in self.flags:
            near = get_close_matches(flag, self.flags, n=2, cutoff=0.7)
            hint = f"Did you mean {' or '.join(near)}?" if near else f"See {self._prog} --help-all."
            raise ValueError(f"unknown option {flag}. {hint}")
        self._typed[self.flags[flag].name] = flag
        return self.flags[flag]

    def help(self, *, everything: bool = False) -> str:
        """The text of `--help`, or of `--help-all`."""
        width = shutil.get_terminal_size().columns - 2
        shown = [option for option in self.options if everything or not option.rare]
        names = [", ".join(o.flags if everything else o.flags[:1]) for o in shown]
        names = ["  " + f"{n} {o.metavar}".strip() for n, o in zip(names, shown, strict=True)]
        column = min(24, max(map(len, names))) + 2
        lines: dict[bool, list[str]] = {False: [], True: []}
        for name, option in zip(names, shown, strict=True):
            if len(name) > column - 2:
                lines[bool(option.flags)].append(name)
                name = ""
            text = fill(option.help, width - column).replace("\n", "\n" + " " * column)
            lines[bool(option.flags)].append(name.ljust(column) + text)
        hidden = len(self.options) - len(shown)
        more = f"{hidden} more option{'s' * (hidden > 1)}: {self._prog} --help-all" * bool(hidden)
        head, last = fill(self._text, width), fill(self._more, width)
        parts = [f"usage: {self._usage} [OPTIONS]", head, *map("\n".join, lines.values())]
        return "\n\n".join(part for part in (*parts, last, more) if part)

    def in_flags(self, text: str) -> str:
        """A message of the library with its keywords (`optim.lr=-1`, `root=`) as they are typed."""
        for option in self.options:
            if option.flags and f"{option.name}=" in text:
                flag = self._typed.get(option.name, option.flags[0])
                keyword = rf"(?<![\w.-]){re.escape(option.name)}=(?=([\w'\"(\[-]?))"
                text = re.sub(keyword, lambda at, flag=flag: flag + " " * bool(at[1]), text)
        return text


def typed(hint: Any, lowest: float = 1) -> tuple[Kind, str, bool]:
    """How a word becomes a value of this type, what it is called, and whether there are several.

    Args:
        hint: The type; None beside it is for a value that is left out.
        lowest: The least of whole numbers.
    """
    parts = [part for part in get_args(hint) if part is not NoneType]
    if NoneType in get_args(hint):
        return typed(parts[0], lowest)
    if get_origin(hint) in (Sequence, tuple):
        return *typed(parts[0], lowest)[:2], True
    if get_origin(hint) is Literal:
        return one_of(*parts), "|".join(parts), False
    kinds: dict[Any, tuple[Kind, str]] = {
        bool: (lambda _: True, ""),
        int: (number(lowest, int), "N"),
        float: (number(), "X"),
    }
    return *kinds.get(hint, (hint, "TEXT")), False


def _options(run: Callable[..., Any]) -> list[Option]:
    found: list[Option] = []
    hints = get_type_hints(run, include_extras=True)
    for name, parameter in inspect.signature(run).parameters.items():
        hint, said = hints[name].__origin__, hints[name].__metadata__
        if parameter.kind is parameter.VAR_KEYWORD:  # before the command's own
            place = sum(not option.flags for option in found)
            found[place:place] = said[0]
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
    """Finite numbers from here on, whole ones for int.

    >>> number(1, int)("0")
    Traceback (most recent call last):
    ValueError: '0' is no whole number from 1 on.
    """
    what = "whole number" if kind is int else "number"
    what += "" if lowest == -math.inf else f" from {lowest:g} on"

    def make(text: str) -> float:
        try:
            found = kind(text)
        except ValueError:
            found = math.nan
        if not (lowest <= found and abs(found) < (1e18 if kind is int else math.inf)):
            raise ValueError(f"{text!r} is no {what}.")
        return found

    return make


def one_of(*names: str, what: str = "value") -> Kind:
    """One of these names.

    >>> one_of("fp32", "bf16")("fp23")
    Traceback (most recent call last):
    ValueError: unknown value 'fp23'. Did you mean fp32? Known: fp32, bf16.
    """

    def make(text: str) -> str:
        if text not in names:
            raise ValueError(unknown(what, text, names))
        return text

    return make


def unknown(what: str, name: str, known: Sequence[str]) -> str:
    """The sentences for a name that does not exist, with the nearest ones that do.

    >>> unknown("command", "trian", ["train", "list"])
    "unknown command 'trian'. Did you mean train? Known: train, list."
    """
    near = get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return f"unknown {what} {name!r}.{hint} Known: {', '.join(known)}."
