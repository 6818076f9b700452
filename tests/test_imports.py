"""`import spem` stays light, and the parts of the package import only what they may."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "spem"

HEAVY = [
    "triton",
    "timm",
    "numba",
    "torchvision",
    "datasets",
    "matplotlib",
    "pandas",
    "scipy",
    "sklearn",
    "ray",
    "rich",
    "pyarrow",
    "PIL",
    "safetensors",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "huggingface_hub",
    "statsmodels",
    "jinja2",
]

# who may import whom inside the package; extras.py (which names the missing extra) and version.py
# are open to all
ARROWS: dict[str, set[str]] = {
    "extras": set(),
    "files": set(),
    "version": set(),
    "stats": set(),
    "seeding": set(),
    "depths": set(),
    "ops": {"ops"},
    # a module owns its initialisation, whose laws are seeding's
    "attention": {"seeding", "ops", "attention"},
    "models": {"seeding", "ops", "attention", "depths"},
    # attention in a host is fused as it is elsewhere
    "insert": {"ops", "attention", "insert"},
    "architectures": set(),
    # what attention computes is looked at in networks of any kind
    "gates": {"attention", "insert"},
    "data": {"seeding", "data"},
    # a result states its network's FLOPs
    "training": {
        *("seeding", "ops", "attention", "models", "insert", "gates", "data", "cost", "files"),
        *("depths", "training"),
    },
    "reproduce": {"seeding", "attention", "training", "stats", "files", "reproduce"},
    "cost": {"ops", "attention", "models", "insert"},
    "export": {"ops", "attention", "models", "insert", "files"},
    "explain": {"attention", "gates", "insert", "ops", "files"},
    # networks of others are rebuilt with what was attached to them
    "share": {"ops", "attention", "models", "architectures", "insert", "data", "export", "files"},
    # the commands import inside themselves only (see the test below)
    "cli": {
        "files",
        "stats",
        "seeding",
        "ops",
        "attention",
        "models",
        "architectures",
        "insert",
        "gates",
        "data",
        "training",
        "reproduce",
        "cost",
        "export",
        "explain",
        "share",
        "cli",
    },
}
# third parties a part may import at import time
THIRD_PARTIES: dict[str, set[str]] = {
    "extras": set(),
    "files": set(),
    "version": set(),
    "stats": set(),
    "seeding": {"torch"},
    "depths": set(),
    "ops": {"torch"},
    "attention": {"torch"},
    "models": {"torch"},
    "insert": {"torch"},
    "architectures": {"torch"},
    "gates": {"torch"},
    "data": {"torch", "numpy"},
    "training": {"torch", "numpy", "dacite"},
    "reproduce": {"torch", "numpy"},
    "cost": {"torch"},
    "export": {"torch"},
    "explain": {"torch"},
    "share": {"torch"},
    "cli": set(),
}
# third parties that only one place may import at all: a file, or a folder with all its files
CONFINED = {
    "triton": "ops/cuda/",
    "numba": "ops/cpu/",
    "llvmlite": "ops/cpu/",
    "ray": "reproduce/run.py",
}
# packages that nothing imports before their kernels are called
KERNELS = ("ops/cpu/", "ops/cuda/")
# files that are imported where a network of that package is fused
HOSTS = {"insert/fused_timm.py": "timm", "insert/fused_torchvision.py": "torchvision"}


# prints what `import spem` loads beside the standard library, then what all its names load
PROGRAM = """
import sys
import spem
loaded = lambda: print(*{name.partition(".")[0] for name in sys.modules} - sys.stdlib_module_names)
loaded()
for name in spem.__all__:
    getattr(spem, name)
spem.ops.plane_stats, spem.cost.count, spem.training.train
loaded()
"""


def test_import_is_light() -> None:
    """`import spem` loads no torch, and its names none of the heavy packages."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    at_first, later = (set(line.split()) for line in done.stdout.splitlines())
    assert "spem" in at_first
    assert not at_first & {"torch", "numpy", *HEAVY}
    assert "torch" in later
    assert not later & set(HEAVY)


def files() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def part_of(path: Path) -> str:
    """The row of the table a file belongs to: `attention` for attention/se.py."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(dotted name, whether it runs when the file is imported) of every import in a file."""

    def walk(node: ast.AST, at_import: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, at_import) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    package = ["spem", *path.relative_to(SOURCE).parts[:-1]]
                    package = package[: len(package) - child.level + 1]
                    base = ".".join([*package, *([child.module] if child.module else [])])
                yield from ((f"{base}.{alias.name}", at_import) for alias in child.names)
            else:
                function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                checking = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
                yield from walk(child, at_import and not function and not checking)

    return walk(ast.parse(path.read_text(encoding="utf-8")), True)


def test_the_package_was_found() -> None:
    assert {"__init__", "seeding", "ops", "attention", "models"} <= {
        part_of(path) for path in files()
    }


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_arrows(path: Path) -> None:
    part = part_of(path)
    if part in ("__init__", "__main__"):
        return
    assert part in ARROWS, f"{part} has no row in the table of imports"
    for name, at_import in imports(path):
        top, *rest = name.split(".")
        if top == "spem":
            target = rest[0] if rest else "__init__"
            allowed = ARROWS[part] | {part, "extras", "version"}
            assert target in allowed, f"{part} must not import {name}"
            if part == "cli":
                known = ("spem.training.progress", "spem.training.config")  # which load no torch
                light = target in ("cli", "extras") or name.startswith(known)
                assert not at_import or light, f"{name} belongs inside the command"
        elif top not in sys.stdlib_module_names:
            place = path.relative_to(SOURCE).as_posix()
            allowed_here = top in THIRD_PARTIES[part] or place.startswith(KERNELS)
            allowed_here = allowed_here or HOSTS.get(place) == top
            assert not at_import or allowed_here, f"{part} must not import {name} at import time"
            if top in CONFINED:
                assert place.startswith(CONFINED[top]), (
                    f"{top} may be imported in {CONFINED[top]} only"
                )


def test_nothing_at_the_top_of_the_package() -> None:
    for name, at_import in imports(SOURCE / "__init__.py"):
        light = name.partition(".")[0] in sys.stdlib_module_names or name.startswith("spem.version")
        assert not at_import or light, name


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_nothing_is_unpickled_freely(path: Path) -> None:
    """torch.load always gets weights_only=True; no plain pickle loader, eval or exec is used."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called == "torch.load":
            given = {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert given.get("weights_only") == "True", f"line {node.lineno}"
        assert called not in ("pickle.load", "pickle.loads", "pickle.Unpickler", "eval", "exec"), (
            f"line {node.lineno}"
        )
