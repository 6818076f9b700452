"""The command `spem`: runs a subcommand and turns errors into one line and an exit code.

Exit codes: 0 done; 1 a training that diverged, or a fault inside (run again with --debug); 2 a
mistake in the call or its files; 130 and 143 stopped by Ctrl-C or SIGTERM, after writing what is
needed to go on.
"""

import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Generator, Sequence
from importlib import import_module

from spem.cli.output import unknown
from spem.extras import require

COMMANDS = {
    "demo": ("spem.cli.demo", "compare none, se and spem on a small data set, in about a minute"),
    "list": ("spem.cli.listing", "the attention modules: parameters, gate at start, needs, paper"),
    "cost": ("spem.cli.cost", "parameters and FLOPs of a network, layer by layer"),
    "attach": ("spem.cli.attach", "where attention goes in a timm or torchvision network"),
    "train": ("spem.cli.train", "train one network; an interrupted run goes on where it stopped"),
    "eval": ("spem.cli.evaluate", "accuracy of trained weights on a test set"),
    "export": ("spem.cli.export", "a network as an ONNX file that was run beside it"),
    "explain": ("spem.cli.explain", "what attention keeps of an image: gates, maps, a picture"),
    "share": ("spem.cli.share", "a finished run as a folder that others load, or on the hub"),
    "compare": ("spem.cli.compare", "several attentions x seeds: runs, table, CSV and picture"),
    "stats": ("spem.cli.stats", "paired differences of anybody's results, from any tidy CSV"),
    "reproduce": (
        "spem.cli.reproduce",
        "the tables and figures of the paper: runs, CSV files, report",
    ),
    "report": ("spem.cli.report", "rebuild the report of a results folder from its CSV files"),
    "bench": ("spem.cli.bench", "what attention costs and fusing brings: time and memory here"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: The arguments without the program's name; None takes those of the process.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    try:
        _dispatch(args)
        sys.stdout.flush()  # here, where a closed pipe can still be answered
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - the last stop: all are told
        if debug:
            traceback.print_exc()
        return _answer(error, debug=debug)
    return 0


def _dispatch(args: list[str]) -> None:
    if not args or args[0] in ("-h", "--help", "help"):
        print(usage())
        return
    if args[0] == "--version":
        from spem import __version__

        print(f"spem {__version__}")
        return
    name, rest = args[0], args[1:]
    if name not in COMMANDS:
        raise ValueError(f"{unknown('command', name, COMMANDS)} Run `spem --help`.")
    require("tyro", extra="train", purpose=f"spem {name}")
    with _compilations_told():
        import_module(COMMANDS[name][0]).run(rest)


@contextlib.contextmanager
def _compilations_told() -> Generator[None]:
    """Says on stderr how long kernels took to compile: a first command waits for it."""
    seconds: list[float] = []

    class Teller(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if " compiled in " in str(record.msg) and isinstance(record.args, tuple):
                seconds.append(float(str(record.args[-1])))
                if len(seconds) == 1:
                    print("compiling kernels (once, they are kept on disk) ...", file=sys.stderr)

    log, teller = logging.getLogger("spem.ops"), Teller(logging.INFO)
    level = log.level
    log.addHandler(teller)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(teller)
        log.setLevel(level)
        if seconds:
            print(f"compiled {len(seconds)} kernels in {sum(seconds):.1f} s", file=sys.stderr)


def usage() -> str:
    """The text of `spem --help`: one line per command."""
    lines = ["usage: spem COMMAND [OPTIONS]", "", "commands:"]
    lines += [f"  {name:<9} {line}" for name, (_, line) in COMMANDS.items()]
    lines += ["", "options:"]
    lines += ["  --debug    show the whole traceback of an error (any place in the line)"]
    lines += [
        "  --version  print the version",
        "",
        "`spem COMMAND --help` shows a command's options.",
    ]
    return "\n".join(lines)


def _answer(error: BaseException, *, debug: bool) -> int:
    """Say what went wrong in one line and return the exit code for it."""
    if isinstance(error, KeyboardInterrupt):  # a training says itself where it stopped, and by what
        print(f"spem: {str(error) or 'stopped.'}", file=sys.stderr)
        return getattr(error, "code", 130)
    if isinstance(error, BrokenPipeError):  # `spem list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    if isinstance(
        error, FloatingPointError
    ):  # a training diverged: neither a wrong call nor a fault
        print(f"spem: {error}", file=sys.stderr)
        return 1
    if _spoken(error):
        text = str(error)
        if isinstance(error, OSError) and error.filename is not None and error.strerror:
            text = f"{error.filename}: {error.strerror}"  # without the number of the error
        print(f"spem: {text}", file=sys.stderr)
        return 2
    print(f"spem: internal error: {type(error).__name__}: {error}", file=sys.stderr)
    if not debug:
        print("run again with --debug", file=sys.stderr)
    return 1


def _spoken(error: BaseException) -> bool:
    """Whether the message was written for the caller: about values, files, or by this package."""
    if isinstance(error, (ValueError, OSError, ImportError)):
        return True
    if type(error).__module__.startswith("spem."):
        return True
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    raised_in = str(frames[-1].f_globals.get("__name__", "")) if frames else ""
    return type(error) in (RuntimeError, TypeError) and raised_in.startswith("spem.")
