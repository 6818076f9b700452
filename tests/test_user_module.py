"""`spem compare --module`: a module of the user's own beside the registered ones."""

from __future__ import annotations

import csv
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import spem
from spem.cli import main
from spem.cli.network import register_from_file
from spem.models import resnet
from spem.seeding import initialise

PLAIN = """
import torch
from torch import nn

class Mine(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels) * 0.5 + 3)
        self.norm = nn.BatchNorm2d(channels)
        nn.init.constant_(self.norm.weight, 0.125)

    def forward(self, x):
        return x * self.weight[:, None, None].sigmoid() + self.norm(x)

class WrongShape(nn.Module):
    def __init__(self, channels):
        super().__init__()

    def forward(self, x):
        return x.mean((2, 3))

class NoChannels(nn.Module):
    def forward(self, x):
        return x

something = 3
"""
OURS = """
from spem.attention import ChannelAttention, Needs

class Half(ChannelAttention):
    needs = Needs(statistics=("mean",))

    def gate_from(self, stats):
        return stats.mean * 0 + 0.5
"""


pytestmark = pytest.mark.usefixtures("clean_registry")


def write(folder: Path, text: str = PLAIN) -> Path:
    path = folder / "my_module.py"
    path.write_text(text)
    return path


def test_a_class_that_declares_nothing_gets_every_statistic(tmp_path: Path):
    undeclared = OURS.replace('    needs = Needs(statistics=("mean",))\n', "")
    undeclared = undeclared.replace("stats.mean * 0", "(stats.max - stats.min + stats.var) * 0")
    assert "needs =" not in undeclared
    label = register_from_file(f"{write(tmp_path, undeclared)}:Half")
    x = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(spem.create_attention(label, 8)(x), 0.5 * x)


def test_a_plain_module_becomes_part_of_the_network(tmp_path: Path):
    label = register_from_file(f"{write(tmp_path)}:Mine")
    assert label.startswith("mine_")
    x = torch.randn(2, 64, 5, 5)
    model = resnet(11, attention=label)
    module = model.layer1[0].attention
    inner = module.inner  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
    torch.testing.assert_close(module(x), inner(x))  # pyright: ignore[reportOptionalCall]
    torch.testing.assert_close(x * module.gate(x) + module.shift(x), inner(x))  # pyright: ignore[reportOptionalMemberAccess]


def test_it_is_drawn_by_its_own_law_and_by_the_seed(tmp_path: Path):
    label = register_from_file(f"{write(tmp_path)}:Mine")

    def draw(seed: int) -> dict[str, torch.Tensor]:
        model = resnet(11, attention=label)
        initialise(model, seed)
        return {k: v.clone() for k, v in model.state_dict().items()}

    first, again, other = draw(1), draw(1), draw(2)
    assert all(torch.equal(first[k], again[k]) for k in first)
    weight, norm = "layer2.0.attention.inner.weight", "layer2.0.attention.inner.norm.weight"
    assert not torch.equal(first[weight], other[weight])
    assert abs(float(first[weight].mean()) - 3) < 0.25  # N(3, 0.5) of 128 values
    assert torch.equal(first[norm], torch.full((128,), 0.125))
    # the backbone is that of every other network of the seed
    plain = resnet(11)
    initialise(plain, 1)
    assert all(torch.equal(v, first[k]) for k, v in plain.state_dict().items())


def test_an_edited_file_is_another_module(tmp_path: Path):
    path = write(tmp_path)
    first = register_from_file(f"{path}:Mine")
    assert register_from_file(f"{path}:Mine") == first
    path.write_text(PLAIN.replace("* 0.5", "* 0.25"))
    assert register_from_file(f"{path}:Mine") != first


def test_a_channel_attention_keeps_its_fused_tail(tmp_path: Path):
    label = register_from_file(f"{write(tmp_path, OURS)}:Half")
    module = resnet(11, attention=label).layer1[0].attention
    assert module is not None
    assert module.why_composed() is None


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Mime", "unknown class 'Mime'. Did you mean Mine"),
        ("something", "unknown class 'something'"),
        ("WrongShape", r"on a map \[2, 64, 8, 8\]: it must return .* got \[2, 64\]"),
        ("NoChannels", r"does not work as NoChannels\(64\)"),
        ("", "does not name the class"),
    ],
)
def test_what_cannot_be_used_is_said(tmp_path: Path, name: str, words: str):
    with pytest.raises(ValueError, match=words):
        register_from_file(f"{write(tmp_path)}:{name}")


def test_files_that_cannot_be_used(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no file"):
        register_from_file(f"{tmp_path / 'none.py'}:Mine")
    with pytest.raises(ValueError, match="cannot be imported: SyntaxError"):
        register_from_file(f"{write(tmp_path, 'class Mine(:')}:Mine")


@pytest.mark.slow
def test_workers_know_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if importlib.util.find_spec("ray") is None:  # imported too early it leaves this machine
        pytest.skip("Ray is not installed")
    monkeypatch.chdir(tmp_path)
    args = ["compare", "none", "--module", f"{write(tmp_path).name}:Mine", "--data", "digits"]
    args += ["--size", "8", "--limit", "32", "--epochs", "1", "--seeds", "1", "--workers", "2"]
    assert main(args) == 0
    with (tmp_path / "comparison" / "runs.csv").open() as file:
        assert [row["status"] for row in csv.DictReader(file)] == ["finished", "finished"]


def test_a_file_that_exits_is_a_mistake_in_every_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = write(tmp_path, "import sys\nsys.exit(0)")
    assert main(["list", "--module", f"{path}:Mine"]) == 2
    told = capsys.readouterr()
    assert not told.out
    assert "cannot be imported: SystemExit: 0" in told.err


@pytest.mark.slow
def test_compare_runs_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = write(tmp_path)
    args = ["compare", "none", "--module", f"{path}:Mine", "--data", "digits", "--epochs", "1"]
    args += ["--limit", "64", "--seeds", "2", "--runs", str(tmp_path / "r"), "--out", str(tmp_path)]
    assert main(args) == 0
    with (tmp_path / "runs.csv").open(newline="") as file:
        names = [row["module"] for row in csv.DictReader(file)]
    assert [name.partition("_")[0] for name in names] == ["none", "mine", "none", "mine"]
    assert "mine_" in capsys.readouterr().out
    # what it trained is read by other commands, in other processes, once they are told the class
    folder = next(p.parent for p in (tmp_path / "r").rglob("model.safetensors") if "mine" in str(p))
    for more, code, says in ((["--module", f"{path}:Mine"], 0, "test images"), ([], 2, "mine_")):
        command = [sys.executable, "-m", "spem", "eval", str(folder), *more]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        assert says in (done.stderr if code else done.stdout)
