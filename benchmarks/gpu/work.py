"""The stages' own work, each in a process of its own: a fault of a kernel ends that one only.

python benchmarks/gpu/work.py STAGE OUT IMAGES
"""

import os
import sys
import tarfile
import tempfile
import typing
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "src"))

DEPTH = 164
NO_GPU = ("test_kernel_registers", "test_cpu", "test_threads")
"""Tests that use no GPU, where minutes are few."""
TRAVELS = (".json", ".jsonl", ".txt", ".pt", ".safetensors")
STEPS = (
    {"dtype": "float32", "layout": "channels_last"},
    {"dtype": "bfloat16", "layout": "channels_last"},
    {"dtype": "float32", "layout": "contiguous"},
    {
        "depth": DEPTH,
        "layout": "channels_last",
        "attentions": ("none", "se", "eca", "spem"),
    },
)


def tests(out: Path) -> int:
    """The operators' tests with real Triton; its record is a JUnit file."""
    import pytest

    os.environ.pop("TRITON_INTERPRET", None)
    record = out / "tests.xml"
    arguments = ["-q", "-W", "ignore", f"--junitxml={record}", "-p", "no:cacheprovider"]
    if sys.modules.get("xdist") is not None or _installed("xdist"):
        arguments += ["-n", "4"]
    os.chdir(REPOSITORY)
    arguments += [f"--ignore=tests/ops/{name}.py" for name in NO_GPU]
    code = int(pytest.main([*arguments, "tests/ops"]))
    if code == 0 and not kernel_tests(record):
        print("no test of the Triton kernels (tests/ops/test_kernels.py) ran and passed")
        return 1
    return code


def kernel_tests(record: Path) -> int:
    """How many tests of the kernels passed; on a machine with a GPU they run on it."""
    if not record.exists():
        return 0
    cases = ET.parse(record).getroot().iter("testcase")
    passed = [str(case.get("classname")) for case in cases if not len(case)]
    return sum(name.endswith("test_kernels") for name in passed)


def ops(out: Path) -> int:
    """The tails; maps that the table has are not timed again."""
    from spem.bench.report import failures
    from spem.bench.runs import measure
    from spem.bench.settings import Settings

    rows = measure(
        "ops", Settings(device="cuda", rounds=30, warm_up=5), path=out / "ops.csv", resume=True
    )
    print("\n".join(failures(rows)))
    return 0


def step(out: Path) -> int:
    """Training steps of several kinds, in one table; kinds that it has are not timed again."""
    from spem.bench import table
    from spem.bench.facts import commit
    from spem.bench.settings import Settings
    from spem.bench.step import Workload, run_step

    path = out / "step.csv"
    rows = table.select(table.read(path), {"commit": commit()})
    for kind in STEPS:
        work = Workload(**kind)  # pyright: ignore[reportArgumentType]
        if table.select(rows, work.columns):
            continue
        settings = Settings(device="cuda", rounds=30, warm_up=5, compiled=False)
        rows += run_step(settings, work)
        table.write(rows, path)
    return 0


def train(out: Path, attention: str, images: Path) -> int:
    """The paper's run of one network; its folder travels as one file."""
    from spem.training import recipes
    from spem.training import train as train_run
    from spem.training.config import RuntimeConfig
    from spem.training.log import PlainLines

    archive = out / f"train-{attention}.tar"
    kinds = typing.get_args(typing.get_type_hints(RuntimeConfig)["step"])
    kind = next(name for name in ("graph", "compile", "eager") if name in kinds)
    recipe = recipes.paper("cifar10", DEPTH, attention)
    runtime = replace(
        recipe.runtime, device="cuda", channels_last=True, step=kind, checkpoint_minutes=2.0
    )
    data = replace(recipe.data, root=str(images))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        unpack(archive, folder)
        try:
            train_run(replace(recipe, data=data, runtime=runtime), folder, progress=PlainLines())
        except KeyboardInterrupt as stopped:  # its checkpoint is written
            print(stopped)
            return getattr(stopped, "code", 130)
        except (FileNotFoundError, ImportError) as error:
            print(f"train needs the images of CIFAR-10 (--images) and what reads them: {error}")
            return 1
        finally:
            pack(folder, archive)
    return 0


def unpack(archive: Path, folder: Path) -> None:
    """Puts a run folder where it was; an absent archive is an empty one."""
    folder.mkdir(parents=True)
    if archive.exists():
        with tarfile.open(archive) as file:
            file.extractall(folder, filter="data")


def pack(folder: Path, archive: Path) -> None:
    """Writes a run folder's files into one, without claims and temporary files."""
    temporary = archive.with_name(f".{archive.name}.tmp")
    with tarfile.open(temporary, "w") as file:
        for path in sorted(folder.iterdir()):
            if path.is_file() and path.suffix in TRAVELS:
                file.add(path, arcname=path.name)
    temporary.replace(archive)


def _installed(module: str) -> bool:
    from importlib.util import find_spec

    return find_spec(module) is not None


def main(arguments: list[str]) -> int:
    stage, out, images = arguments[0], Path(arguments[1]), Path(arguments[2])
    kind, _, attention = stage.partition("-")
    if kind == "train":
        return train(out, attention, images)
    return {"tests": tests, "ops": ops, "step": step}[kind](out)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except FloatingPointError as error:  # a provider is wrong, or a training diverged
        print(error)
        sys.exit(1)
