"""The command `spem`: finds the subcommand, and turns errors into sentences and an exit code.

Exit codes: 0 done; 1 a training that diverged, or a fault inside (run again with --debug); 2 a
mistake in the call or its files; 3 a budget that ended before every run was finished; 130 and 143
stopped by Ctrl-C or SIGTERM, after writing what is needed to resume.
"""

from __future__ import annotations

import io
import os
import sys
import traceback
import warnings
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from spem.cli.options import Options

COMMANDS = {
    "demo": ("demo", "compare none, control, se and spem on digits, in three minutes"),
    "list": ("listing", "the attention modules: parameters, gate at start, needs, paper"),
    "cost": ("cost", "parameters and FLOPs of a network, stage by stage"),
    "attach": ("attach", "where attention goes in a network, and what it costs there"),
    "train": ("train", "train one network; an interrupted run resumes where it stopped"),
    "eval": ("evaluate", "accuracy of trained weights on a test set"),
    "export": ("export", "a network as an ONNX file, checked against PyTorch"),
    "explain": ("explain", "what attention keeps of an image: gates, maps, a picture"),
    "share": ("share", "a finished run as a folder that others load, or on the hub"),
    "compare": ("compare", "several attentions x seeds: runs, table, CSV and picture"),
    "stats": ("stats", "paired differences of any results in a CSV file"),
    "reproduce": ("reproduce", "the tables and figures of the paper: runs, CSV files, report"),
    "report": ("report", "rebuild the report of a results folder from its CSV files"),
    "bench": ("bench", "what attention costs on this machine, in training and inference"),
}
"""For each command, the module in this package whose `run` executes it, and its purpose."""
_FUNCTIONS = (
    *("train", "find_sites", "attach", "inspect", "fold", "to_onnx"),
    *("from_pretrained", "save_pretrained", "push_to_hub"),
)
"""Of the library, whose names begin messages that a command shows as its own."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, by default that of the process, and return its exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    if args[:1] == ["help"]:
        args = [*args[1:], "--help"]
    name, options, status = "", None, 0
    if isinstance(sys.stdout, io.TextIOWrapper):  # names that the terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    warnings.formatwarning = lambda message, *_, **__: f"note: {message}\n"
    try:  # around the imports too: Ctrl-C in the first seconds is not a fault
        if not args or args[0] in ("-h", "--help", "--help-all"):
            print(usage())
        elif args[0] == "--version":
            from spem.version import __version__

            print(f"spem {__version__}")
        elif args[0] not in COMMANDS:
            from spem.cli.options import unknown

            raise ValueError(f"{unknown('command', args[0], list(COMMANDS))} Run `spem --help`.")
        else:
            name = args[0]
            options = options_of(name)
            values = options.read(args[1:])
            if values is not None:
                status = options.run(**values) or 0
        print(end="", flush=True)  # here, where a closed pipe can still be answered
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - the last stop: every error gets its sentence
        if debug:
            traceback.print_exc()
        return _answer(error, name, options, debug=debug)
    return status


def options_of(name: str) -> Options:
    """What a command takes. `--module` registers, in any command, what others name by text."""
    from spem.cli.network import register_from_file
    from spem.cli.options import Options

    run = import_module(f"spem.cli.{COMMANDS[name][0]}").run
    return Options(name, run, module=register_from_file)


def usage() -> str:
    """The text of `spem --help`: one line per command."""
    commands = "\n".join(f"  {name:<9} {line}" for name, (_, line) in COMMANDS.items())
    return f"""usage: spem COMMAND [OPTIONS]

commands:
{commands}

`spem COMMAND --help` shows a command's options, `spem --version` the version.
--module FILE:CLASS, in any command, names an attention of your own.
--debug, at any place in the line, shows the whole traceback of an error."""


def _answer(error: BaseException, name: str, options: Options | None, *, debug: bool) -> int:
    """Say what went wrong, and return the exit code for it."""
    if isinstance(error, BrokenPipeError):  # `spem list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    code, text = 2, str(error)
    if isinstance(error, KeyboardInterrupt):  # a training says itself where it stopped, and by what
        code, text = getattr(error, "code", 130), text or "stopped."
    elif isinstance(error, FloatingPointError):  # diverged: neither a wrong call nor a fault
        code = 1
    elif _is_memory(error):
        text = "not enough memory. Use a smaller batch, smaller images or another network."
    elif _is_message(error):
        if isinstance(error, OSError) and error.strerror:  # without the number of the error
            where = "" if error.filename is None else f"{error.filename}: "
            text = f"{where}{error.strerror}."
    else:
        code, text = 1, f"internal error: {type(error).__name__}: {error}"
        text += "" if debug else "\nrun again with --debug"
    text = text if options is None else options.in_flags(text)
    for function in (name, *_FUNCTIONS):
        text = text.removeprefix(f"{function}: ")
    text = text if len(text) < 1200 else f"{text[:700]} ... {text[-300:]}"  # a name may be long
    text = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
    print(f"{f'spem {name}'.rstrip()}: {text}", file=sys.stderr)
    return code


def _is_memory(error: BaseException) -> bool:
    """Whether memory ran out, here or on a GPU; torch raises a RuntimeError of its own."""
    text = f"{type(error).__name__}: {error}"
    return "MemoryError" in text or "can't allocate memory" in text


def _is_message(error: BaseException) -> bool:
    """Whether the message was written for the caller: about values, files, or by this package."""
    if isinstance(error, (ValueError, OSError, ImportError)):
        return True
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    ours = str(frame.f_globals.get("__name__")).startswith("spem.")
    told = ours and type(error) in (RuntimeError, TypeError)
    return told or type(error).__module__.startswith("spem.")
