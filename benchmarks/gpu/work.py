"""The stages' own work, each in a process of its own: a fault of a kernel ends that one only.

python benchmarks/gpu/work.py STAGE OUT IMAGES
"""

import math
import os
import sys
import tarfile
import tempfile
import typing
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

if typing.TYPE_CHECKING:
    from spem.bench.tails import Case

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "src"))

DEPTH = 164
NO_GPU = ("test_kernel_registers", "test_cpu", "test_threads")
"""Tests that use no GPU, where minutes are few."""
LEAST = {"test_kernels": 300, "test_tail": 25}
"""How many tests with Triton must have passed, by file, before any speed is measured."""
TRAINING = ("tests/training/test_capture.py", "tests/training/test_loop.py")
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


class OnlyGpu:
    """A plugin of pytest: of the training's tests those that need a GPU."""

    def pytest_collection_modifyitems(self, items: list[typing.Any]) -> None:
        items[:] = [item for item in items if _needs_gpu(item)]


def _needs_gpu(item: typing.Any) -> bool:
    reasons = [mark.kwargs.get("reason") for mark in item.iter_markers("skipif")]
    return "needs a CUDA device" in reasons


def tests(out: Path) -> int:
    """The operators' tests with real Triton, then training's; their record is a JUnit file."""
    import pytest

    os.environ.pop("TRITON_INTERPRET", None)
    record = out / "tests.xml"
    os.chdir(REPOSITORY)
    arguments = [f"--junitxml={record}", *pytest_options()]
    if _installed("xdist"):
        arguments += ["-n", "4"]
    arguments += [f"--ignore=tests/ops/{name}.py" for name in NO_GPU]
    code = int(pytest.main([*arguments, "tests/ops"]))
    if code != 0:
        return code
    passed = kernel_tests(record)
    for name, least in LEAST.items():
        if passed[name] < least:
            print(f"only {passed[name]} tests of tests/ops/{name}.py ran Triton: {least} expected")
            return 1
    if not _installed("safetensors"):
        print("training is not tested: it needs safetensors")
        return 0
    return int(pytest.main([*pytest_options(), *TRAINING], plugins=[OnlyGpu()]))


def pytest_options() -> list[str]:
    """Options under which pytest alone is enough: settings of absent plugins are no errors."""
    options = ["-q", "-W", "ignore", "-p", "no:cacheprovider"]
    options += ["-o", "addopts=--import-mode=importlib"]
    return [*options, "-p", "no:randomly"] if _installed("pytest_randomly") else options


def kernel_tests(record: Path) -> dict[str, int]:
    """How many tests with Triton passed, by file; on a machine with a GPU they run on it."""
    passed = dict.fromkeys(LEAST, 0)
    cases = ET.parse(record).getroot().iter("testcase") if record.exists() else ()
    for case in cases:
        file = str(case.get("classname")).rpartition(".")[2]
        with_triton = file == "test_kernels" or "triton" in str(case.get("name"))
        if file in passed and with_triton and not len(case):
            passed[file] += 1
    return passed


def first_maps() -> tuple[list["Case"], list["Case"]]:
    """What of the operators is timed before all else: maps, and maps with compiled tails too."""
    import torch
    from spem.bench.ops import cases
    from spem.bench.tails import Case

    every = [c for c in cases(torch.device("cuda")) if c.op == "bn_train"]
    small = [
        Case("bn_train", 16, 256, 8, 8, dtype=dtype, layout="channels_last")
        for dtype in ("bfloat16", "float32")
    ]
    # Compiling takes far longer than measuring.
    both = [c for c in every if c.shape == (128, 64, 32, 32) and c.layout == "channels_last"]
    return [c for c in every if c not in both and _mebibytes(c) >= 4] + small, both


def _mebibytes(case: "Case") -> float:
    return math.prod(case.shape) * (2 if case.dtype == "bfloat16" else 4) / (1 << 20)


def ops(out: Path, part: str = "") -> int:
    """The tails; maps that the table has are not timed again."""
    from spem.bench import table
    from spem.bench.ops import run_ops
    from spem.bench.report import failures
    from spem.bench.settings import Settings

    path = out / "ops.csv"
    rows = table.read(path)
    settings = Settings(device="cuda", rounds=30, warm_up=5)
    kinds: list[tuple[Settings, list[Case] | None]] = [(settings, None)]
    if part == "first":
        maps, both = first_maps()
        kinds = [(settings, both), (replace(settings, compiled=False), maps)]
    for here, only in kinds:
        rows = run_ops(here, only=only, kept=rows, save=lambda found: table.write(found, path))
    return told(failures(rows))


def step(out: Path) -> int:
    """Training steps of several kinds, in one table; kinds that it has are not timed again."""
    import torch
    from spem.bench import table
    from spem.bench.facts import facts
    from spem.bench.ops import SAME_RUN
    from spem.bench.report import failures
    from spem.bench.settings import Settings
    from spem.bench.step import Workload, run_step

    path = out / "step.csv"
    settings = Settings(device="cuda", rounds=30, warm_up=5, compiled=False)
    here = {"rounds": str(settings.rounds), **facts(torch.device("cuda"))}
    rows = table.select(table.read(path), {name: here[name] for name in SAME_RUN})
    rows = table.without_failed(rows, tuple(Workload().columns))
    for kind in STEPS:
        work = Workload(**kind)  # pyright: ignore[reportArgumentType]
        if table.select(rows, work.columns):
            continue
        rows += run_step(settings, work)
        table.write(rows, path)
    return told(failures(rows))


def told(failed: list[str]) -> int:
    """Says who could not run; 1 if anybody."""
    if failed:
        print("could not run: " + "; ".join(failed))
    return 1 if failed else 0


def train(out: Path, attention: str, images: Path) -> int:
    """The paper's run of one network; its folder travels as one file."""
    from spem.training import recipes
    from spem.training import train as train_run
    from spem.training.config import RuntimeConfig
    from spem.training.progress import PlainLines

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
    kind, _, part = stage.partition("-")
    if kind == "train":
        return train(out, part, images)
    if kind == "ops":
        return ops(out, part)
    return {"tests": tests, "step": step}[kind](out)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (FloatingPointError, RuntimeError) as error:
        from spem.bench.checks import BenchError

        if not isinstance(error, (FloatingPointError, BenchError)):
            raise
        # A provider is wrong, or a training diverged.
        print(error)
        sys.exit(1)
