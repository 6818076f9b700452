"""The frame around the code: versions, pinned packages and docstring examples."""

from __future__ import annotations

import doctest
import pkgutil
import re
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

import spem

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MODULES = sorted(m.name for m in pkgutil.walk_packages(spem.__path__, "spem."))


def canonical(requirement: str) -> str:
    name = re.match(r"[\w.-]+", requirement)
    assert name is not None, f"{requirement!r} names no package"
    return re.sub(r"[-_.]+", "-", name[0]).lower()


def pins(file: str) -> list[str]:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_version_is_the_same_everywhere() -> None:
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.M)
    assert cited is not None
    assert spem.__version__ == PROJECT["version"] == cited[1]
    assert f"## [{spem.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8") or (
        f"first version, {spem.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    )


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-oldest.txt"])
def test_constraints_are_exact_versions(file: str) -> None:
    """Names and versions only: no address of a package index, no path."""
    for line in pins(file):
        assert re.fullmatch(r"[A-Za-z0-9][\w.-]*==[\w.+!]+", line), line


def test_every_dependency_is_pinned() -> None:
    extras = PROJECT["optional-dependencies"]
    wanted = {canonical(line) for line in PROJECT["dependencies"]}
    wanted |= {canonical(line) for group in extras.values() for line in group} - {"spem"}
    missing = wanted - {canonical(line) for line in pins("constraints.txt")}
    assert not missing
    assert PROJECT["dependencies"] == ["numpy>=1.26", "torch>=2.6"]  # the core stays this small


def test_oldest_torch_is_the_lower_bound() -> None:
    assert "torch==2.6.0" in pins("constraints-oldest.txt")


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    result = doctest.testmod(import_module(name))
    assert result.failed == 0
