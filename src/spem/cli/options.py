"""The options of a command: read from the signature of its `run`, without torch.

    def run(
        network: Annotated[str, "NETWORK", "a run's folder or its weights"],
        *,
        batch: Annotated[int, "N", "images at a time", RARE] = 500,
        json: Json = False,
    ) -> None:
        \"\"\"Accuracy of a network on test images.\"\"\"

A parameter before the star is an argument, one behind it an option: `--batch`. Its type is followed
by what it takes, the line of the help, and perhaps `RARE` (only `--help-all` shows it) or a
function that makes the value of the text. The docstring is the head of the help; more paragraphs of
it come last. A mistake is answered at once: importing a command must not load torch.
"""

from __future__ import annotations

import inspect
import math
import re
import shutil
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

Kind = Callable[[str], Any]
RARE, ABSENT, REQUIRED = object(), object(), object()
Json = Annotated[bool, "print the result as JSON"]


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
        self._arguments = [option for option in self.options if not option.flags]
        own = Option("module", ("--module",), "FILE:CLASS", "", module)
        self.flags = {flag: option for option in (own, *self.options) for flag in option.flags}
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
            if not _is_flag(word):
                free.append(word)
                continue
            flag, sign, value = word.partition("=")
            option = self._named(flag := flag.replace("_", "-"))
            given = [value] if sign else list[str]()
            if option.metavar and not sign:
                while rest and not _is_flag(rest[0]) and (option.many or not given):
                    given.append(rest.pop(0))
            if bool(given) != bool(option.metavar):
                takes = f"needs a value, {option.metavar}" if option.metavar else "takes no value"
                raise self._error(f"{flag} {takes}")
            found[option.name] = _value(option, given or [""], f"{flag}: ")
        usage = " ".join([self._prog, *map(_in_usage, self._arguments)])
        for option in self._arguments:
            given, free = (free, []) if option.many else (free[:1], free[1:])
            if given:
                found[option.name] = _value(option, given, "")
            elif option.default is REQUIRED:
                raise self._error(f"{option.metavar} is missing: {usage}")
        if free:
            raise self._error(f"{free[0]!r} is one argument too many: {usage}")
        values = {option.name: found.get(option.name, option.default) for option in self.options}
        return {name: value for name, value in values.items() if value is not ABSENT}

    def help(self, *, everything: bool = False) -> str:
        """The text of `--help`, or of `--help-all`."""
        width = shutil.get_terminal_size().columns - 2
        shown = [option for option in self.options if everything or not option.rare]

        def left(option: Option) -> str:
            names = ", ".join(option.flags if everything else option.flags[:1])
            return "  " + f"{names} {option.metavar}".strip()

        column = min(24, max(len(left(option)) for option in shown)) + 2

        def line(option: Option) -> str:
            name, indent = left(option), " " * column
            above, name = (f"{name}\n", "") if len(name) > column - 2 else ("", name)
            return above + textwrap.fill(
                option.help, width, initial_indent=name.ljust(column), subsequent_indent=indent
            )

        hidden = len(self.options) - len(shown)
        parts = [
            " ".join([f"usage: {self._prog}", *map(_in_usage, self._arguments), "[OPTIONS]"]),
            textwrap.fill(self._text, width),
            "\n".join(line(option) for option in shown if not option.flags),
            "\n".join(line(option) for option in shown if option.flags),
            textwrap.fill(self._more, width),
            f"{hidden} more option{'s' * (hidden > 1)}: {self._prog} --help-all" if hidden else "",
        ]
        return "\n\n".join(part for part in parts if part)

    def in_flags(self, text: str) -> str:
        """A message of the library with its keywords (`optim.lr=-1`, `root=`) as they are typed."""
        for option in self.options:
            if option.flags and f"{option.name}=" in text:
                flag = self._typed.get(option.name, option.flags[0])
                keyword = rf"(?<![\w.-]){re.escape(option.name)}=(?=([\w'\"(\[-]?))"
                text = re.sub(keyword, lambda at, flag=flag: flag + " " * bool(at[1]), text)
        return text

    def _named(self, flag: str) -> Option:
        option = self.flags.get(flag)
        if option is None:
            near = get_close_matches(flag, self.flags, n=2, cutoff=0.7)
            hint = f"Did you mean {' or '.join(near)}?" if near else f"See {self._prog} --help-all."
            raise ValueError(f"unknown option {flag}. {hint}")
        self._typed[option.name] = flag
        return option

    def _error(self, text: str) -> ValueError:
        return ValueError(f"{text}. See {self._prog} --help.")


def typed(hint: Any, lowest: int | None = 1) -> tuple[Kind, str, bool]:
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
    if hint is int:
        return integer(lowest), "N", False
    return (number(), "X", False) if hint is float else (hint, "TEXT", False)


def _options(run: Callable[..., Any]) -> list[Option]:
    """The options in a signature; of ``**given``, those that stand in a list behind its type."""
    found: list[Option] = []
    hints = get_type_hints(run, include_extras=True)
    for name, parameter in inspect.signature(run).parameters.items():
        hint, said = hints[name].__origin__, hints[name].__metadata__
        if parameter.kind is parameter.VAR_KEYWORD:
            found += said[0]
            continue
        default = REQUIRED if parameter.default is parameter.empty else parameter.default
        *metavar, help = (part for part in said if isinstance(part, str))
        if hint is bool:
            kind, takes, many = (lambda _: True), "", False
        else:
            kind, takes, many = typed(hint)
            kind = next((part for part in said if callable(part)), kind)
        if isinstance(default, (str, int, float, Path)) and default is not False:
            help += f" (default {default})"
        flag = f"--{name.strip('_').replace('_', '-')}"
        flags = (flag,) if parameter.kind is parameter.KEYWORD_ONLY else ()
        takes = metavar[0] if metavar else takes
        found.append(Option(name, flags, takes, help, kind, default, many, RARE in said))
    return found


def _in_usage(option: Option) -> str:
    name = f"{option.metavar} ..." if option.many else option.metavar
    return name if option.default is REQUIRED else f"[{name}]"


def _value(option: Option, given: Sequence[str], where: str) -> Any:
    try:
        return [option.kind(word) for word in given] if option.many else option.kind(given[0])
    except (ValueError, OSError) as error:
        raise ValueError(f"{where}{error}") from error


def _is_flag(word: str) -> bool:
    return len(word) > 1 and word.startswith("-") and not _is_number(word)


def integer(lowest: int | None = None) -> Kind:
    """Whole numbers, from here on if that is given.

    >>> integer(1)("0")
    Traceback (most recent call last):
    ValueError: '0' is no whole number from 1 on.
    """

    def make(text: str) -> int:
        found = int(text) if re.fullmatch(r"[+-]?\d{1,18}", text) else None
        if found is None or (lowest is not None and found < lowest):
            least = "" if lowest is None else f" from {lowest} on"
            raise ValueError(f"{text!r} is no whole number{least}.")
        return found

    return make


def number(lowest: float = -math.inf) -> Kind:
    """Finite numbers from here on."""

    def make(text: str) -> float:
        if not _is_number(text) or not lowest <= float(text) < math.inf:
            least = "" if lowest == -math.inf else f" from {lowest:g} on"
            raise ValueError(f"{text!r} is no number{least}.")
        return float(text)

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


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
