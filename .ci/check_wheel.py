"""Checks the built packages: what is in them, and that the wheel works with torch and numpy alone.

python .ci/check_wheel.py dist

The wheel is installed without its dependencies into an empty folder. A fresh interpreter then uses
it while every package that torch and numpy do not bring themselves is made unimportable, as it
would be after a bare `pip install spem`.
"""

import subprocess
import sys
import tarfile
import tempfile
import zipfile
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Runs with the wheel's folder as the only argument.
INSIDE = r"""
import importlib.abc
import importlib.metadata as metadata
import pathlib
import re
import sys

CORE = ("torch", "numpy")


def brought_by(*names):
    found, queue = set(), list(names)
    while queue:
        name = re.sub(r"[-_.]+", "-", queue.pop()).lower()
        if name in found:
            continue
        try:
            requirements = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        found.add(name)
        queue += [re.match(r"[\w.-]+", line)[0] for line in requirements if "extra ==" not in line]
    return found


class Absent(importlib.abc.MetaPathFinder):
    def __init__(self, allowed):
        self.blocked = {
            module
            for module, owners in metadata.packages_distributions().items()
            if not allowed & {re.sub(r"[-_.]+", "-", owner).lower() for owner in owners}
        } - {"spem"}

    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] in self.blocked:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)
        return None


finder = Absent(brought_by(*CORE))
assert {"rich", "datasets", "sklearn", "timm"} <= finder.blocked, "the check checks nothing"
sys.meta_path.insert(0, finder)
sys.path.insert(0, sys.argv[1])

import torch

import spem

assert spem.__file__.startswith(sys.argv[1]), f"spem was imported from {spem.__file__}"
maps = torch.randn(2, 64, 8, 8)
for name in spem.list_attention():
    assert spem.create_attention(name, 64, size=8)(maps).shape == maps.shape, name
model = spem.resnet(11, attention="spem")
loss = model(torch.randn(2, 3, 32, 32)).square().mean() + 0.1 * spem.penalty(model)
loss.backward()
assert all(p.grad is not None for p in model.parameters())

from spem.cli import main

assert main(["list"]) == 0
table = pathlib.Path(sys.argv[1], "runs.csv")
table.write_text("module,seed,accuracy\n")
for call in (["stats", str(table)], ["compare", "none", "se"], ["train", "smoke"]):
    assert main(call) == 2
"""


def check_contents(wheel: Path, sdist: Path) -> str:
    """Compares the packages with the sources and returns the wheel's version."""
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("spem/")}
        (metadata,) = [name for name in archive.namelist() if name.endswith("METADATA")]
        facts = Parser().parsestr(archive.read(metadata).decode())
    files = [
        p for p in (ROOT / "src/spem").rglob("*") if p.is_file() and "__pycache__" not in p.parts
    ]
    sources = {p.relative_to(ROOT / "src").as_posix() for p in files}
    require(packed == sources, f"wheel and src differ in {sorted(packed ^ sources)}")
    require("spem/py.typed" in packed, "the wheel lacks py.typed")
    needed = [line for line in facts.get_all("Requires-Dist", []) if "extra ==" not in line]
    names = sorted(line.partition(">")[0] for line in needed)
    require(names == ["numpy", "torch"], f"the wheel needs {names}")
    with tarfile.open(sdist) as archive:
        folders = {name.split("/")[1] for name in archive.getnames() if "/" in name}
    require("src" in folders and "tests" in folders, f"the sdist holds {sorted(folders)}")
    extra = folders & {"results", "runs", ".venv", ".venv-oldest", "dist"}
    require(not extra, f"the sdist holds {sorted(extra)}")
    return str(facts["Version"])


def check_alone(wheel: Path) -> None:
    """Uses the wheel where nothing but torch and numpy can be imported."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
        subprocess.run([*pip, "--target", folder, str(wheel)], check=True)
        done = subprocess.run(
            [sys.executable, "-I", "-c", INSIDE, folder],
            capture_output=True,
            text=True,
            check=False,
        )
    said = done.stderr.strip()
    require("Traceback" not in said, f"the wheel does not work alone:\n{said}")
    # The last steps, commands that need an extra, say how to get it.
    require(
        done.returncode == 0 and said.count('pip install ".[train]"') == 3,
        f"commands without their extra ended with status {done.returncode} and said:\n{said}",
    )


def require(condition: bool, message: str) -> None:
    if not condition:
        sys.exit(f"check_wheel: {message}")


def main() -> None:
    folder = Path(sys.argv[1])
    (wheel,) = folder.glob("spem-*.whl")
    (sdist,) = folder.glob("spem-*.tar.gz")
    version = check_contents(wheel, sdist)
    check_alone(wheel)
    print(f"spem {version}: the wheel works with torch and numpy alone")


if __name__ == "__main__":
    main()
