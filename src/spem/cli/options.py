"""The options of a command: read by argparse without torch, with help in one style.

A command's file defines `options()`, which says what it takes, and `run(...)`, which gets that as
keywords:

    def options() -> Options:
        o = Options("eval", "Accuracy of trained weights on test images.")
        o.add("network", "NETWORK", "a run's folder or its weights")
        o.add("--batch", "N", "images at a time", kind=integer(1), default=500, rare=True)
        return o.json()

    def run(*, network: str, batch: int, json: bool) -> None: ...

What is asked for often stands under `--help`, the rest (`rare=True`) under `--help-all`. Neither
file may import torch before `run`: a mistake in the call is answered at once.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

Kind = Callable[[str], Any]


class UsageError(ValueError):
    """A call that says something that the command does not take."""


class Options(argparse.ArgumentParser):
    """What a command takes.

    Args:
        command: Its name.
        text: What it does, in a sentence or two, the head of its help.
        more: What else a reader of the help wants to know, its last paragraph.
    """

    def __init__(self, command: str, text: str, *, more: str = "") -> None:
        super().__init__(
            prog=f"spem {command}",
            usage=argparse.SUPPRESS,
            description=text,
            epilog=more,
            add_help=False,
            allow_abbrev=False,
            formatter_class=lambda prog: _Formatter(prog, everything=self.everything),
        )
        self._usage: list[str] = []
        self._rare: list[tuple[argparse.Action, str]] = []
        self.everything = False
        self._typed: dict[str, str] = {}
        self._positionals.title = self._optionals.title = None

    def add(
        self,
        *words: str,
        kind: Kind = str,
        default: Any = None,
        count: str | None = None,
        rare: bool = False,
    ) -> None:
        """Adds an argument (``name METAVAR help``) or option (``--name [--alias] METAVAR help``).

        Args:
            words: Names, what it takes, and the line of the help.
            kind: Makes the value of the text; raises ValueError with a sentence about it.
            default: Without it. `argparse.SUPPRESS` leaves the keyword out.
            count: As argparse's nargs: ``"?"`` an argument that may be left out, ``"*"`` several.
            rare: Only `--help-all` shows it.
        """
        *names, metavar, help = words
        rest: dict[str, Any] = {"nargs": count} if count else {}
        if names[0].startswith("-"):
            dest = names[-1].removeprefix("--").replace("-", "_")
            rest["dest"] = "json" if dest == "json" else dest
        else:
            self._usage.append(
                {"?": f"[{metavar}]", "*": f"[{metavar} ...]"}.get(count or "", metavar)
            )
        if default not in (None, (), argparse.SUPPRESS):
            help += f" (default {default})"
        action = self.add_argument(
            *names, type=_with_message(kind), default=default, metavar=metavar, help=help, **rest
        )
        self._note(action, rare=rare)

    def flag(self, name: str, help: str, *, rare: bool = False) -> None:
        """Adds an option that takes no value: False, or True if it is there."""
        self._note(self.add_argument(name, action="store_true", help=help), rare=rare)

    def switch(self, yes: str, no: str, help: str) -> None:
        """Adds a pair of rare options for a setting whose default lies elsewhere."""
        dest = yes.removeprefix("--").replace("-", "_")
        for name, value in ((yes, True), (no, False)):
            action = self.add_argument(
                name,
                action="store_const",
                const=value,
                dest=dest,
                default=argparse.SUPPRESS,
                help=help if value else "the opposite",
            )
            self._note(action, rare=True)

    def json(self) -> Options:
        """Adds `--json`, and returns these options: the last line of most commands."""
        self.flag("--json", "print the result as JSON")
        return self

    def _note(self, action: argparse.Action, *, rare: bool) -> None:
        if rare:
            self._rare.append((action, action.help or ""))
            action.help = argparse.SUPPRESS

    def read(self, args: Sequence[str]) -> dict[str, Any] | None:
        """The values of a call as keywords of `run`; None if it was for help, which is printed.

        Raises:
            UsageError: The call says something else than these options.
        """
        if {"-h", "--help", "--help-all"} & set(args):
            print(self.help(everything="--help-all" in args))
            return None
        return vars(self.parse_args(self._checked(args)))

    def help(self, *, everything: bool = False) -> str:
        """The text of `--help`, or of `--help-all`."""
        self.everything = everything
        if everything:
            for action, text in self._rare:
                action.help = text
        rest = " [OPTIONS]" if self._optionals._group_actions else ""
        usage = " ".join([f"usage: {self.prog}", *self._usage]) + rest
        hidden = (
            ""
            if everything or not self._rare
            else (f"\n{len(self._rare)} more options: {self.prog} --help-all")
        )
        return f"{usage}\n\n{self.format_help()}{hidden}".rstrip()

    def _checked(self, args: Sequence[str]) -> list[str]:
        """The arguments, with unknown options refused and a negative number bound to its option."""
        known = self._option_string_actions
        words = list(args)
        for place, word in enumerate(args):
            if word == "--":
                break
            name, sign, value = word.partition("=")
            if not name.startswith("-") or name == "-" or _is_number(word):
                if (
                    _is_number(word)
                    and word.startswith("-")
                    and place
                    and words[place - 1] in known
                ):
                    words[place - 1 : place + 1] = [f"{words[place - 1]}={word}", ""]
                continue
            name = name if name in known else name.replace("_", "-")
            if name not in known:
                near = get_close_matches(name, known, n=2, cutoff=0.7)
                hint = (
                    f"Did you mean {' or '.join(near)}?" if near else f"See {self.prog} --help-all."
                )
                self.error(f"unknown option {name}. {hint}")
            self._typed[known[name].dest] = name
            words[place] = name + sign + value
        return [word for place, word in enumerate(words) if word or args[place] == ""]

    def error(self, message: str) -> NoReturn:
        """Raises UsageError; argparse's own phrases are made sentences with what to do."""
        subject, colon, rest = message.removeprefix("argument ").partition(": ")
        action = self._option_string_actions.get(subject.partition("/")[0])
        if action is not None:  # by the name that was typed
            message = self._typed[action.dest] + colon + rest
        elif colon and any(subject == known.metavar for known in self._actions):
            message = rest
        required = re.fullmatch(r"the following arguments are required: (.*)", message)
        extra = re.fullmatch(r"unrecognized arguments: (\S+).*", message)
        lacking = re.fullmatch(r"(\S+): expected .*argument.*", message)
        if required:
            message = f"{required[1]} is missing: {self.prog} {' '.join(self._usage)}"
        elif extra:
            message = f"{extra[1]!r} is one argument too many: {self.prog} {' '.join(self._usage)}"
        elif lacking:
            message = f"{lacking[1]} needs a value{f', {action.metavar}' if action else ''}"
        if not message.endswith((".", "?")):
            message += f". See {self.prog} --help."
        raise UsageError(message)

    def in_flags(self, text: str) -> str:
        """A message of the library with its keywords (`optim.lr=-1`, `root=`) as they are typed."""
        for action in self._actions:
            if action.option_strings and (action.dest + "=") in text:
                flag = self._typed.get(action.dest, action.option_strings[0])
                keyword = rf"(?<![\w.-]){re.escape(action.dest)}="
                text = re.sub(keyword + r"(?=[\w'\"(\[-])", f"{flag} ", text)
                text = re.sub(keyword, flag, text)
        return text


class _Formatter(argparse.HelpFormatter):
    """Names on the left; of several names of an option the short help shows the first."""

    def __init__(self, prog: str, *, everything: bool) -> None:
        super().__init__(prog, max_help_position=26)
        self._everything = everything

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return str(action.metavar)
        names = ", ".join(action.option_strings[: None if self._everything else 1])
        return names if action.nargs == 0 else f"{names} {action.metavar}"


def _with_message(kind: Kind) -> Kind:
    """A kind whose error message argparse passes on."""

    def make(text: str) -> Any:
        try:
            return text if text == argparse.SUPPRESS else kind(text)  # a default goes through here
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return make


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
