"""Malformed calls and files, drawn at random from a list of kinds: a sentence, never status 0.

The kinds are what a person can get wrong: an option, a value, a name, a file. A case is a function
of a source of randomness; it may spoil the folder it stands in, which holds everything that a right
call needs, and returns the call.
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


CALLS = {
    "list": [],
    "cost": ["cifar:11", "--size", "16"],
    "attach": ["cifar:11", "spem", "--size", "16"],
    "train": ["smoke", "--epochs", "1", "--limit", "32", "--folder", "new"],
    "eval": ["run", "--predictions", "told.csv"],
    "export": ["run", "--out", "net.onnx"],
    "explain": ["run", "image.png", "--out", "e.png"],
    "share": ["run", "--folder", "out"],
}
"""A right call of each command, which the cases spoil."""
Case = Callable[[random.Random], list[str]]


def unknown_option(rng: random.Random) -> list[str]:
    name = rng.choice(list(CALLS))
    flags = cli.options_of(name).flags
    flag = rng.choice([f for f in flags if len(f) > 5])
    at = rng.randrange(3, len(flag))
    typo = rng.choice([f"{flag[:at]}q{flag[at:]}", flag[:at] + flag[at + 1 :]])
    call = [name, *CALLS[name]]
    call.insert(rng.randint(1, len(call)), "--no-such" if typo in flags else typo)
    return call


def missing_value(rng: random.Random) -> list[str]:
    name = rng.choice(["cost", "train", "eval", "export", "explain", "share"])
    flag = rng.choice([f for f, option in cli.options_of(name).flags.items() if option.metavar])
    return [name, *CALLS[name], flag]


def bad_number(rng: random.Random) -> list[str]:
    real = ["train --lr", "train --optim.momentum", "train --optim.mix-lr", "train --data.test"]
    whole = ["cost --classes", "cost --batch", "cost --size", "attach --size", "attach --stages"]
    whole += ["train --epochs", "train --batch", "train --depth", "train --limit", "export --opset"]
    whole += ["train --runtime.threads", "explain --blocks", "explain --top"]
    call = rng.choice(real + whole)
    values = ["", "-1", "nan", "inf", "1e999", "x", "1,5", "0x10", "--", "1 2", "\u0664x"]
    values += [] if call in real else ["9" * 40]
    name, flag = call.split()
    return [name, *CALLS[name], flag, rng.choice(values)]


def bad_name(rng: random.Random) -> list[str]:
    junk = "".join(rng.choices(string.printable + "\u2603\x1b\u202e", k=rng.randint(1, 40)))
    names = ["", " ", "/", "..", "~", "resnet", "cifar:", "cifar:0", "cifar:9999999999", "cifar:12"]
    names += ["timm:", "torchvision:", "hf-hub:me/net", "a" * 5000, "own.py", "-", "*", "a\x00b"]
    names += ["resnet50 ", "RESNET5O", "cifar:basic-57", ".", "./gone", "x" + junk]
    name = rng.choice(["cost", "attach", "eval", "export", "explain"])
    call = [name, rng.choice(names), *CALLS[name][1:]]
    return [*call, *(["--data", "digits"] if name == "eval" else [])]


def bad_attention(rng: random.Random) -> list[str]:
    specs = ["spme", "se(", "se(reduction=0)", "se(reduction=1e9)", "se(reduction='8')", "()", ""]
    specs += ["__import__('os').abort()", "spem(form=5)", "se(pool=mix(nan))", "(" * 3000, "se;se"]
    specs += ["se(reduction=8,reduction=8)", "none(x=1)", "spem spem", "\x1b[2J", "se(channels=3)"]
    specs += ["cbam(pools=5)", "eca(b=1e30)"]
    spec = rng.choice(specs)
    calls = [["attach", "cifar:11", spec], ["train", *CALLS["train"], "--attention", spec]]
    calls += [["cost", "cifar:11", "--attention", spec]]
    return rng.choice([*calls, ["export", "cifar:11", "--out", "x.onnx", "--attention", spec]])


def one_too_many(rng: random.Random) -> list[str]:
    name = rng.choice(list(CALLS))
    return [name, *(["s*"] if name == "list" else []), *CALLS[name], "surplus"]


def damaged_weights(rng: random.Random) -> list[str]:
    where = rng.choice(["weights.safetensors", "run", "shared"])
    path = Path(where)
    _damage(rng, path / "model.safetensors" if path.is_dir() else path)
    if where == "shared":
        return rng.choice([["cost", where], ["explain", where, "image.png"]])
    name = rng.choice(["cost", "eval", "export", "explain", "share"])
    return [name, where, *CALLS[name][1:]]


def damaged_table(rng: random.Random) -> list[str]:
    path = Path(rng.choice(["run/config.json", "run/result.json", "shared/config.json"]))
    kind = rng.random()
    if kind < 0.4:
        _damage(rng, path)
    elif kind < 0.6:
        path.unlink()
        _put_something(rng, path, "pipe", "folder")
    else:
        contents = [b"", b"{}", b"[]", b"null", b"[" * 100_000, b"\xff\xfe", b'{"a": 1e999}']
        path.write_bytes(rng.choice(contents))
    name = rng.choice(["eval", "share", "export"])
    return ["cost", "shared"] if path.parent.name == "shared" else [name, *CALLS[name]]


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


def _put_something(rng: random.Random, path: Path, *kinds: str) -> None:
    """Something that is not a file of ours."""
    match rng.choice(kinds):
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "loop":
            path.symlink_to(path)
        case "link":
            path.symlink_to("image.png")
        case "folder of files":
            path.mkdir()
            (path / rng.choice(["config.json", "README.md"])).write_text("mine")
        case "file":
            path.write_text("mine")
        case _:
            path.write_bytes(b"")


def not_a_file(rng: random.Random) -> list[str]:
    odd = rng.choice(["odd.safetensors"] * 4 + ["/dev/zero"])
    if odd != "/dev/zero":
        _put_something(rng, Path(odd).absolute(), "pipe", "folder", "loop", "empty file")
    calls = [["cost", odd], ["share", odd, "--folder", "out"], ["explain", odd, "image.png"]]
    calls += [["explain", "run", odd], ["eval", "run", "--data", odd]]
    calls += [["export", "cifar:11", "--weights", odd, "--out", "x.onnx"]]
    return rng.choice([*calls, ["train", *CALLS["train"], "--data", odd]])


def bad_image(rng: random.Random) -> list[str]:
    content = Path("image.png").read_bytes()
    spoiled = [b"", b"GIF89a", content[:40], content[:-6], b"\x00" * 100, content[8:], b"no image"]
    Path("image.png").write_bytes(rng.choice(spoiled))
    return ["explain", *CALLS["explain"]]


def bad_code(rng: random.Random) -> list[str]:
    """A network of one's own that is none."""
    spoiled = ["import nothing_of_this_name", "def net(:", "import sys; sys.exit(0)", "\x00", "1/0"]
    name = rng.choice(["number", "broken", "leaves", "gone", ""])
    if rng.random() < 0.5:
        Path("own.py").write_text(rng.choice(spoiled))
        name = "net"
    call = rng.choice([["cost"], ["attach"], ["export", "--out", "x.onnx"]])
    return [call[0], f"own.py:{name}", *call[1:]]


def bad_output(rng: random.Random) -> list[str]:
    """Where the result should go stands something that is not to be replaced, or nothing."""
    name = rng.choice(["eval", "export", "explain", "share"])
    *call, out = CALLS[name]
    if name == "share":
        _put_something(rng, Path(out), "folder of files", "file")
    elif rng.random() < 0.25:
        out = f"gone/{out}"
    else:
        _put_something(rng, Path(out), "link", "pipe", "folder")
    return [name, *call, out]


def other_classes(rng: random.Random) -> list[str]:
    """Images on which an accuracy would mean nothing."""
    for split in ("train", "test"):
        for k in range(rng.choice([10, 3])):
            folder = Path("photos") / split / f"kind {k}"
            folder.mkdir(parents=True)
            Image.new("RGB", (8, 8), (20 * k, 9, 9)).save(folder / "a.png")
    return ["eval", "run", "--data", "photos"]


def foreign_folder(rng: random.Random) -> list[str]:
    """A training into a folder that holds files of somebody else."""
    path = Path("new") / rng.choice(["model.safetensors", "metrics.jsonl", "notes.txt", "x.tmp"])
    path.parent.mkdir()
    path.write_text("x")
    return ["train", *CALLS["train"]]


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
    for seed in range(EACH):
        place = tmp_path / f"place{seed}"
        shutil.copytree(right, place)
        monkeypatch.chdir(place)
        args = case(random.Random(f"{case.__name__} {seed}"))
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
