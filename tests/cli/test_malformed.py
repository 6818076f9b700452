"""Malformed calls and files, drawn at random from a list of kinds: a sentence, never status 0.

The kinds are what a person can get wrong: an option, a value, a name, a file. A case is a function
of a source of randomness and a folder with everything that a right call would need; it returns the
call.
"""

from __future__ import annotations

import os
import random
import shutil
import string
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import spem
from spem import cli
from spem.training import Silent, recipes, train

EACH = 16
"""Calls of each kind."""

OWN = """
import sys
import torch
def net():
    pool = torch.nn.AdaptiveAvgPool2d(1)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), pool, torch.nn.Flatten())
def number(): return 3
def broken(): raise KeyError("lost")
def leaves(): sys.exit(0)
"""


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run, weights, a shared network, an image and own code."""
    from dataclasses import replace

    folder = tmp_path_factory.mktemp("right")
    config = recipes.smoke("spem", epochs=1)
    data = replace(config.data, size=8, limit=32, test_limit=20)
    train(replace(config, data=data), folder / "run", progress=Silent())
    shutil.copy(folder / "run" / "model.safetensors", folder / "weights.safetensors")
    spem.save_pretrained(spem.resnet(11, attention="se"), folder / "shared")
    Image.new("RGB", (20, 16), (200, 30, 60)).save(folder / "image.png")
    (folder / "own.py").write_text(OWN)
    save_file({"x": torch.zeros(3)}, folder / "strange.safetensors")
    return folder


def calls(place: Path) -> dict[str, list[str]]:
    """A right call of each command, which the cases spoil."""
    return {
        "list": [],
        "cost": ["cifar:11", "--size", "16"],
        "attach": ["cifar:11", "spem", "--size", "16"],
        "train": ["smoke", "--epochs", "1", "--limit", "32", "--folder", str(place / "new")],
        "eval": [str(place / "run"), "--predictions", str(place / "told.csv")],
        "export": [str(place / "run"), "--out", str(place / "net.onnx")],
        "explain": [str(place / "run"), str(place / "image.png"), "--out", str(place / "e.png")],
        "share": [str(place / "run"), "--folder", str(place / "out")],
    }


Case = Callable[[random.Random, Path], list[str]]


def unknown_option(rng: random.Random, place: Path) -> list[str]:
    name = rng.choice(list(calls(place)))
    flags = [f for f in _flags(name) if len(f) > 5]
    flag = list(rng.choice(flags or ["--json"]))
    at = rng.randrange(3, len(flag))
    typo = rng.choice(["".join([*flag[:at], "q", *flag[at:]]), "".join(flag[:at] + flag[at + 1 :])])
    if typo in _flags(name) or len(typo) < 4:
        typo = "--no-such"
    call = [name, *calls(place)[name]]
    call.insert(rng.randint(1, len(call)), typo)
    return call


def _flags(name: str) -> list[str]:
    return list(cli.options_of(name).flags)


def missing_value(rng: random.Random, place: Path) -> list[str]:
    name = rng.choice(["cost", "train", "eval", "export", "explain", "share"])
    flag = rng.choice([f for f, option in cli.options_of(name).flags.items() if option.metavar])
    return [name, *calls(place)[name], flag]


def bad_number(rng: random.Random, place: Path) -> list[str]:
    name, flag = rng.choice(
        [
            *(("cost", "--classes"), ("cost", "--batch"), ("cost", "--size"), ("attach", "--size")),
            *(("train", "--epochs"), ("train", "--batch"), ("train", "--depth"), ("train", "--lr")),
            *(("train", "--optim.momentum"), ("train", "--optim.mix-lr"), ("train", "--limit")),
            *(("train", "--data.test"), ("train", "--runtime.threads"), ("export", "--opset")),
            *(("explain", "--blocks"), ("explain", "--top"), ("attach", "--stages")),
        ]
    )
    values = ["", "-1", "nan", "inf", "1e999", "x", "9" * 40, "1,5", "0x10", "--", "1 2", "\u0664x"]
    value = rng.choice(
        values[:-6] + values[-5:] if flag in ("--lr", "--optim.momentum") else values
    )
    return [name, *calls(place)[name], flag, value]


def bad_name(rng: random.Random, place: Path) -> list[str]:
    junk = "".join(rng.choices(string.printable + "\u2603\x1b\u202e", k=rng.randint(1, 40)))
    names = ["", " ", "/", "..", "~", "resnet", "cifar:", "cifar:0", "cifar:9999999999", "cifar:12"]
    names += ["timm:", "torchvision:", "hf-hub:me/net", "a" * 5000, "own.py", "-", "*", "a\x00b"]
    names += ["resnet50 ", "RESNET5O", "cifar:basic-57", f"{place}", f"{place}/gone", "x" + junk]
    name = rng.choice(["cost", "attach", "eval", "export", "explain"])
    call = [name, *calls(place)[name]]
    call[1] = rng.choice(names)
    return [*call, *(["--data", "digits"] if name == "eval" else [])]


def bad_attention(rng: random.Random, place: Path) -> list[str]:
    specs = ["spme", "se(", "se(reduction=0)", "se(reduction=1e9)", "se(reduction='8')", "()", ""]
    specs += ["__import__('os').abort()", "spem(form=5)", "se(pool=mix(nan))", "(" * 3000, "se;se"]
    specs += ["se(reduction=8,reduction=8)", "none(x=1)", "spem spem", "\x1b[2J", "se(channels=3)"]
    spec = rng.choice(specs)
    return rng.choice(
        [
            ["cost", "cifar:11", "--attention", spec],
            ["attach", "cifar:11", spec],
            ["train", "smoke", "--attention", spec, "--folder", str(place / "new")],
            ["export", "cifar:11", "--attention", spec, "--out", str(place / "x.onnx")],
        ]
    )


def one_too_many(rng: random.Random, place: Path) -> list[str]:
    name = rng.choice(list(calls(place)))
    more = ["s*"] if name == "list" else []
    return [name, *more, *calls(place)[name], "surplus"]


def damaged_weights(rng: random.Random, place: Path) -> list[str]:
    path = rng.choice([place / "weights.safetensors", place / "run" / "model.safetensors"])
    path = rng.choice([path, place / "shared" / "model.safetensors"])
    _damage(rng, path)
    if path.parent.name == "shared":
        image = str(place / "image.png")
        return rng.choice([["cost", str(path.parent)], ["explain", str(path.parent), image]])
    network = str(path if path.parent == place else path.parent)
    name = rng.choice(["cost", "eval", "export", "explain", "share"])
    return [name, network, *calls(place)[name][1:]]


def damaged_table(rng: random.Random, place: Path) -> list[str]:
    path = place / rng.choice(["run/config.json", "run/result.json", "shared/config.json"])
    if rng.random() < 0.5:
        _damage(rng, path)
    else:
        contents = [b"", b"{}", b"[]", b"null", b"[" * 100_000, b"\xff\xfe", b'{"a": 1e999}']
        path.write_bytes(rng.choice(contents))
    if path.parent.name == "shared":
        return ["cost", str(path.parent)]
    name = rng.choice(["eval", "share", "export"])
    return [name, *calls(place)[name]]


def _damage(rng: random.Random, path: Path) -> None:
    content = bytearray(path.read_bytes())
    match rng.randrange(4):
        case 0:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(7)
        case 1:
            del content[rng.randrange(len(content) - 1) :]
        case 2:
            start = rng.randrange(len(content) // 2)
            content[start : start + 64] = bytes(b ^ 0x55 for b in content[start : start + 64])
        case _:
            content[:8] = (2**62).to_bytes(8, "little")
    path.write_bytes(content)


def not_a_file(rng: random.Random, place: Path) -> list[str]:
    """Something else stands where a file should be: a pipe, a device, a folder, a loop of links."""
    path = place / "odd"
    kind = rng.choice(["pipe", "folder", "loop", "zero", "empty"])
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "zero":
        path = Path("/dev/zero")
    else:
        path.write_bytes(b"")
    weights = place / "odd.safetensors"
    if kind != "zero":
        path.rename(weights) if kind != "loop" else weights.symlink_to(weights)
    odd = str(path if kind == "zero" else weights)
    return rng.choice(
        [
            ["cost", odd],
            ["share", odd, "--folder", str(place / "out")],
            ["explain", odd, str(place / "image.png")],
            ["explain", str(place / "run"), odd],
            ["export", "cifar:11", "--weights", odd, "--out", str(place / "x.onnx")],
            ["eval", str(place / "run"), "--data", odd],
            ["train", "smoke", "--data", odd, "--folder", str(place / "new")],
        ]
    )


def bad_image(rng: random.Random, place: Path) -> list[str]:
    path = place / "image.png"
    content = path.read_bytes()
    spoiled = [b"", b"GIF89a", content[:40], content[:-6], b"\x00" * 100, content[8:], b"no image"]
    path.write_bytes(rng.choice(spoiled))
    return ["explain", *calls(place)["explain"]]


def bad_code(rng: random.Random, place: Path) -> list[str]:
    """A network of one's own that is none."""
    own = place / "own.py"
    functions = ["own.py:number", "own.py:broken", "own.py:leaves", "own.py:gone", "own.py:"]
    spoiled = ["import nothing_of_this_name", "def net(:", "import sys; sys.exit(0)", "\x00", "1/0"]
    name = rng.choice(functions)
    if rng.random() < 0.5:
        own.write_text(rng.choice(spoiled))
        name = "own.py:net"
    network = f"{place}/{name}"
    out = ["--out", str(place / "x.onnx")]
    return rng.choice([["cost", network], ["attach", network], ["export", network, *out]])


def bad_output(rng: random.Random, place: Path) -> list[str]:
    """Where the result should go stands something that is not to be replaced, or nothing."""
    ending = {"eval": "csv", "export": "onnx", "explain": "png", "share": ""}
    name = rng.choice(list(ending))
    path = place / f"odd.{ending[name]}".rstrip(".")
    match rng.choice(
        ["link", "pipe", "folder", "deep"] if name != "share" else ["foreign", "file"]
    ):
        case "link":
            path.symlink_to(place / "image.png")
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "deep":
            path = place / "gone" / path.name
        case "foreign":
            path.mkdir()
            (path / rng.choice(["config.json", "README.md"])).write_text("mine")
        case _:
            path.write_text("mine")
    return [name, *calls(place)[name][:-1], str(path)]


def other_classes(rng: random.Random, place: Path) -> list[str]:
    """Images on which an accuracy would mean nothing."""
    for split in ("train", "test"):
        for k in range(rng.choice([10, 3])):
            folder = place / "photos" / split / f"kind {k}"
            folder.mkdir(parents=True)
            Image.new("RGB", (8, 8), (20 * k, 9, 9)).save(folder / "a.png")
    return ["eval", str(place / "run"), "--data", str(place / "photos")]


def foreign_folder(rng: random.Random, place: Path) -> list[str]:
    """A training into a folder that holds files of somebody else."""
    new = place / "new"
    new.mkdir()
    (new / rng.choice(["model.safetensors", "metrics.jsonl", "notes.txt", "x.tmp"])).write_text("x")
    return ["train", *calls(place)["train"]]


CASES: list[Case] = [unknown_option, missing_value, bad_number, bad_name, bad_attention]
CASES += [one_too_many, damaged_weights, damaged_table, not_a_file, bad_image, bad_code]
CASES += [bad_output, other_classes, foreign_folder]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
@pytest.mark.filterwarnings("ignore")  # the numbers are checked here, not what libraries say
def test_malformed(
    case: Case,
    right: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for seed in range(EACH):
        place = tmp_path / f"place{seed}"
        shutil.copytree(right, place)
        args = case(random.Random(f"{case.__name__} {seed}"), place)
        before = _left(place)
        status = cli.main(args)
        told = capsys.readouterr()
        shown = f"seed {seed}: {args}\n{told.err[-600:]}"
        assert status in (1, 2), f"status {status}: {shown}"
        assert told.err.startswith("spem"), shown
        assert not any(word in told.err for word in ("Traceback", "internal error", "\x1b")), shown
        assert len(told.err) < 1500, shown
        assert _left(place) == before, f"{shown}: files changed"


def _left(place: Path) -> dict[str, object]:
    """Every file by its name, with its content."""
    paths = [path for path in place.rglob("*") if "__pycache__" not in path.parts]
    return {str(p): p.read_bytes() if p.is_file() else p.is_symlink() for p in paths}
