"""Calls: help, version, mistakes. One style, at once, without torch."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import pytest

import spem
from spem import cli
from spem.cli import export
from spem.cli.options import RARE, Json, Option, Options, number


@pytest.fixture(autouse=True)
def eighty_columns(own_folder: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


TRY = [
    Option("try.count", ("--count", "--try.count"), "N", "how often", number(1, int)),
    Option("try.flip", ("--try.flip",), "", "turn it", lambda _: True, rare=True),
    Option("try.flip", ("--try.no-flip",), "", "the opposite", lambda _: False, rare=True),
]


def run(
    first: Annotated[str | None, "FIRST", "what to try"] = None,
    *,
    rate: Annotated[float, "RATE", "how fast", number(0)] = 1.5,
    shift: Annotated[float | None, "how far", RARE] = None,
    mode: Annotated[Literal["alpha", "beta"] | None, "which"] = None,
    names: Annotated[Sequence[str], "NAME", "of whom"] = (),
    json: Json = False,
    **given: Annotated[Any, TRY],
) -> None:
    """Try it."""


def options() -> Options:
    return Options("try", run)


@pytest.mark.parametrize(
    ("args", "values"),
    [
        ([], {"first": None, "rate": 1.5, "names": (), "json": False}),
        (["--rate", "2", "x"], {"first": "x", "rate": 2.0}),
        (["--try.count=3", "--json"], {"count": 3, "json": True}),
        (["--shift", "-1e-3"], {"shift": -1e-3}),
        (["--shift", "-2", "x"], {"shift": -2.0, "first": "x"}),
        (["--try.no-flip"], {"try.flip": False}),
        (["--try.no_flip"], {"try.flip": False}),
        (["--", "-x"], {"first": "-x"}),
        (["--names", "a", "b", "--rate=1", "x"], {"names": ("a", "b"), "first": "x"}),
        (["--names=a", "x"], {"names": ("a",), "first": "x"}),
        (["--names", "a", "b", "--rate=1", "--names=c"], {"names": ("a", "b", "c")}),
    ],
)
def test_values(args: list[str], values: dict[str, Any]) -> None:
    read = options().read(args)
    assert read is not None
    names = {"count": "try.count", "shift": "shift"}
    assert {name: read[names.get(name, name)] for name in values} == values
    assert ("try.flip" in read) == any("flip" in arg for arg in args)  # else its own default holds


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--rat", "2"], "unknown option --rat. Did you mean --rate?"),
        (["--zzz"], "unknown option --zzz. See spem try --help-all."),
        (["--rate", "x"], "--rate: 'x' is not a number from 0 on."),
        (["--rate", "-1"], "--rate: '-1' is not a number from 0 on."),
        (["--rate", "nan"], "--rate: 'nan' is not a number from 0 on."),
        (["--try.count", "0"], "--try.count: '0' is not a whole number from 1 on."),
        (["--count", "1.5"], "--count: '1.5' is not a whole number from 1 on."),
        (["--count", "9" * 5000], "is not a whole number from 1 on."),
        (["--mode", "alhpa"], "unknown value 'alhpa'. Did you mean alpha? Known: alpha, beta."),
        (["--rate"], "--rate needs a value, RATE. See spem try --help."),
        (["--rate", "--json"], "--rate needs a value, RATE. See spem try --help."),
        (["a", "b"], "'b' is one argument too many: spem try [FIRST]. See spem try --help."),
        (["--json=1"], "--json takes no value. See spem try --help."),
        (["--rate="], "--rate needs a value, RATE. See spem try --help."),
        (["--names", "a", ""], "--names needs a value, NAME. See spem try --help."),
        ([""], "an argument is empty. See spem try --help."),
    ],
)
def test_mistakes_name_what_was_typed_and_what_to_do(args: list[str], says: str) -> None:
    with pytest.raises(ValueError, match=f"{re.escape(says)}$"):
        options().read(args)


def test_an_argument_that_is_missing() -> None:
    def run(first: Annotated[str, "FIRST", "what to try"]) -> None: ...

    with pytest.raises(ValueError, match=r"FIRST is missing: spem try FIRST"):
        Options("try", run).read([])


def test_messages_of_the_library_get_the_flags_that_were_typed() -> None:
    o = options()
    o.read(["--try.count", "3"])
    said = "rate=-1 is too small; try.count=3 too. Leave rate= out, and accurate=1 in."
    said += " Use a lower try.count (try.count 3 -> 4), try.counter 5, a/try.count."
    want = "--rate -1 is too small; --try.count 3 too. Leave --rate out, and accurate=1 in."
    want += " Use a lower --try.count (--try.count 3 -> 4), try.counter 5, a/try.count."
    assert o.in_flags(said) == want
    for said in (
        "try.count: neither a known set nor a folder.",  # begins with what was typed
        "The rate of this mode, and its names.",  # words that are names of options too
    ):
        assert o.in_flags(said) == said
    said = "Pass dynamic_batch=False."  # of to_onnx
    assert Options("export", export.run).in_flags(said) == "Pass --fixed-batch."
    said = "count=3 fits se(count=4). With runtime.rate=2, flip=True turns it."
    want = "--try.count 3 fits se(count=4). With --rate 2, --try.flip turns it."
    assert o.in_flags(said) == want


def test_who_asked_for_an_implementation_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "impl='triton' needs a CUDA tensor. Use impl=None or 'reference'."
    train, cost = cli.options_of("train"), cli.options_of("cost")
    train.read(["smoke", "--runtime.impl", "triton"])
    want = "--runtime.impl 'triton' needs a CUDA tensor. Use no --runtime.impl or 'reference'."
    assert train.in_flags(said) == want
    monkeypatch.setenv("SPEM_IMPL", "triton")
    assert train.in_flags(said) == want
    want = "SPEM_IMPL='triton' needs a CUDA tensor. Use no SPEM_IMPL or 'reference'."
    assert cost.in_flags(said) == want
    cost.read(["cifar:11"])
    assert cost.in_flags(said) == want


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_fits_a_screen_and_is_complete(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([name, "--help"]) == 0
    short = capsys.readouterr().out
    assert short.startswith(f"usage: spem {name}")
    assert cli.main(["help", name]) == 0
    assert capsys.readouterr().out == short
    assert cli.main([name, "--help-all"]) == 0
    everything = capsys.readouterr().out
    for text in (short, everything):
        assert max(map(len, text.splitlines())) <= 80
    flags = [line.split()[0] for line in short.splitlines() if line.startswith("  --")]
    assert len(flags) <= 16
    for option in cli.options_of(name).options:
        assert all(flag in everything for flag in option.flags)
        assert option.help


def test_help_on_a_tiny_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "3")
    assert cli.main(["train", "--help-all"]) == 0
    assert "usage: spem train" in capsys.readouterr().out


def test_help_has_a_line_for_each_command(capsys: pytest.CaptureFixture[str]) -> None:
    for args in ([], ["--help"], ["help"]):
        assert cli.main(args) == 0
        told = capsys.readouterr().out
        for name, (_, line) in cli.COMMANDS.items():
            assert any(text.split()[:1] == [name] and line in text for text in told.splitlines())
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"spem {spem.__version__}\n"


def test_help_and_mistakes_need_no_torch() -> None:
    """Nor another heavy package: in this process, their import is a fault."""
    calls = [["--help"], ["--version"], ["trian"], ["train", "smoke", "--lr", "x"]]
    for name in cli.COMMANDS:
        calls += [[name, "--help"], [name, "--help-all"], [name, "--hlep"]]
    heavy = ["torch", "timm", "pandas", "scipy", "matplotlib", "datasets", "rich", "numba"]
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({heavy}));"
        f"from spem.cli import main; print([main(args) for args in {calls}])"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    statuses = [0, 0, 2, 2, *[0, 0, 2] * len(cli.COMMANDS)]
    assert done.stdout.splitlines()[-1:] == [str(statuses)], done.stderr
    for name in cli.COMMANDS:
        assert f"spem {name}: unknown option --hlep. " in done.stderr
    assert "Did you mean train?" in done.stderr
    assert "internal error" not in done.stderr


def test_debug_anywhere_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    for args in (["--debug", "list", "zz"], ["list", "--debug", "zz"], ["list", "zz", "--debug"]):
        assert cli.main(args) == 2
        assert "Traceback" in capsys.readouterr().err


def test_faults_inside(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise KeyError("lost")

    monkeypatch.setattr("spem.cli.listing.describe", broken)
    assert cli.main(["list"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("spem list: internal error: KeyError: 'lost'\n")
    assert told.endswith("run again with --debug\n")
    assert "Traceback" not in told


def test_messages_cannot_steer_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", "a\x1b[2Jb"]) == 2
    assert "\x1b" not in capsys.readouterr().err
