"""Adding a module is two files: the page's two steps, done in a copy of the sources."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from spem.cli.network import register_from_file
from spem.models import resnet

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "my_attention.py"
PAGE = (ROOT / "docs" / "add.md").read_text(encoding="utf-8")
IMPORT = "from spem.attention.span import Span"

USE = """
import sys
import torch
import spem
from spem.cli import main

assert spem.__file__.startswith(sys.argv[1]), spem.__file__
module = spem.create_attention("span", 64)
with torch.no_grad():
    module.weight.normal_(), module.bias.normal_()
x = torch.randn(2, 64, 5, 7)
spread = x.amax((2, 3)) - x.amin((2, 3))
gate = 1 / (1 + torch.exp(-(module.weight * spread + module.bias)))
torch.testing.assert_close(module(x), x * gate[..., None, None])
assert module.why_composed() is None  # it runs in the fused tail
norm, r = torch.nn.BatchNorm2d(64), torch.randn(2, 64, 5, 7)
with spem.ops.use_impl("formula"):
    fused = module.tail(x, r, norm)
torch.testing.assert_close(fused, torch.relu(module(norm(x)) + r), rtol=1e-4, atol=1e-5)
model = spem.resnet(11, attention="span")
spem.initialise(model, 0)
model(torch.randn(2, 3, 32, 32)).sum().backward()
assert all(p.grad is not None for p in model.parameters())
groups = spem.param_groups(model, lr=0.1, weight_decay=1e-4)
assert len(groups[1]["params"]) == 3 and groups[1]["weight_decay"] == 0  # its weights, undecayed
assert main(["list", "span"]) == 0 and main(["cost", "cifar:11", "--attention", "span"]) == 0
"""


def in_copy(copy: Path, *arguments: str) -> str:
    environment = dict(os.environ, PYTHONPATH=str(copy / "src"), OMP_NUM_THREADS="1")
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=copy,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources and the attention's tests, with the two changes of the page and no other."""
    copy = tmp_path_factory.mktemp("copy")
    shutil.copytree(
        ROOT / "src" / "spem",
        copy / "src" / "spem",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    (copy / "tests").mkdir()
    shutil.copytree(
        ROOT / "tests" / "attention",
        copy / "tests" / "attention",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    for name in ("tests/conftest.py", "tests/tolerance.py", "pyproject.toml"):
        shutil.copy(ROOT / name, copy / name)
    assert "src/spem/attention/span.py" in PAGE
    assert f"\n{IMPORT}\n" in PAGE
    shutil.copy(EXAMPLE, copy / "src" / "spem" / "attention" / "span.py")
    init = copy / "src" / "spem" / "attention" / "__init__.py"
    lines = init.read_text(encoding="utf-8").splitlines(keepends=True)
    last = max(k for k, line in enumerate(lines) if line.startswith("from spem.attention."))
    init.write_text("".join([*lines[: last + 1], IMPORT + "\n", *lines[last + 1 :]]))
    return copy


def test_two_files_are_enough(copy: Path) -> None:
    said = in_copy(copy, "-c", USE, str(copy))
    assert "span" in said
    assert "max, min" in said


@pytest.mark.slow
def test_the_contract_finds_it(copy: Path) -> None:
    arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:randomly"]
    # Compiling takes the most time, and test_two_files_are_enough has run the formula itself.
    arguments += ["tests/attention/test_contract.py", "-k", "span and not compiles"]
    said = in_copy(copy, *arguments)
    passed = next(int(line.split()[0]) for line in said.splitlines() if " passed" in line)
    assert passed >= 8


@pytest.mark.usefixtures("clean_registry")
def test_the_same_file_is_compared_from_where_it_lies() -> None:
    """What `spem compare --module` does before it trains; test_user_module.py trains."""
    assert "--module examples/my_attention.py:Span" in PAGE
    label = register_from_file(f"{EXAMPLE}:Span")
    module = resnet(11, attention=label).layer1[0].attention
    assert module is not None
    assert module.why_composed() is None
    assert module.start_gate == 0.5
