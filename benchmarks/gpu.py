"""All GPU work in one command: tests of the kernels, times of tails and training steps, training.

    python benchmarks/gpu.py DIR --minutes 9
    python benchmarks/gpu.py DIR --minutes 9 --experiment table1 --recipe paper

Each call ends within its minutes, and the next one goes on from what lies in DIR: state.json (which
stages are done), log.txt, tests.xml, tails.csv, steps.csv and training/, a results folder with its
checkpoints. Nothing is timed or trained on kernels whose tests failed; `--again tests` forgets it.

Status: 0 all is done, 1 a stage failed, 2 there is no CUDA device, 3 there is more to do.
"""

import argparse
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
TESTS = ("tests/ops/test_kernels.py", "tests/ops/test_tail.py", "tests/training/test_capture.py")
MAPS = ((128, 64, 32, 32), (128, 128, 16, 16), (128, 256, 8, 8))
DEPTHS = (11, 29, 164)
ATTENTIONS = ("none", "se", "spem")
WAYS = tuple(itertools.product(("reference", "triton"), ("eager", "graph")))
"""Composed of torch's operations or fused by Triton, called one by one or replayed as a graph."""
ROUNDS = 30
LEAST, GRACE = 60.0, 30.0
"""Seconds below which no stage is started, and those in which a stopped one writes a checkpoint."""

Row = dict[str, str]


def carry_on(commands: Mapping[str, Sequence[str]], out: Path, deadline: float) -> int:
    """Run the stages that are not done yet, one process each, until `deadline` (monotonic)."""
    out.mkdir(parents=True, exist_ok=True)
    state = read_state(out)
    for name, command in commands.items():
        if state.get(name) in ("done", "failed"):
            print(f"{name}: {state[name]} before", flush=True)
            continue
        if state.get("tests") == "failed":
            print(f"{name}: not started, since the tests failed", flush=True)
            continue
        left = deadline - time.monotonic()
        if left < LEAST:
            print(f"{name}: not started, {max(left, 0):.0f} s are too few", flush=True)
            return 3
        status = execute(command, out / "log.txt", left)
        if status is None:
            print(f"{name}: stopped, goes on in the next call", flush=True)
            return 3
        reason = f"status {status}, see log.txt" if status else ""
        if name == "tests" and not status and (idle := nothing_passed(out / "tests.xml")):
            reason = f"no test of {', '.join(idle)} passed: see tests.xml for why they were skipped"
        state[name] = "failed" if reason else "done"
        (out / "state.json").write_text(json.dumps(state) + "\n", encoding="utf-8")
        print(f"{name}: {state[name]}" + (f" ({reason})" if reason else ""))
    return 1 if "failed" in state.values() else 0


def nothing_passed(report: Path) -> list[str]:
    """The files of `TESTS` of which no test passed; pytest's status is 0 if all are skipped."""
    cases = ElementTree.parse(report).iter("testcase") if report.exists() else []
    passed = {
        case.get("classname", "")
        for case in cases
        if not any(case.find(how) is not None for how in ("skipped", "failure", "error"))
    }
    modules = {name: name.removesuffix(".py").replace("/", ".") for name in TESTS}
    return [name for name, module in modules.items() if not any(module in one for one in passed)]


def read_state(out: Path) -> dict[str, str]:
    path = out / "state.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def execute(command: Sequence[str], log: Path, seconds: float) -> int | None:
    """A process's status; None where it was stopped because the time was over."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT / "benchmarks")])
    with log.open("ab") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=ROOT
        )
        try:
            return process.wait(max(seconds - GRACE, 0))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return None


def time_table(kinds: Sequence[Row], make: Callable[[Row, str, str], object], path: Path) -> None:
    """Time every way of every kind against the others of that kind; those in the table are kept."""
    import torch
    from record import facts, in_turns, read, write

    rows = read(path)
    for kind in kinds:
        if any(kind.items() <= row.items() for row in rows):
            continue
        calls: dict[str, Callable[[], object]] = {}
        notes: dict[str, str] = {}
        for impl, step in WAYS:
            try:
                calls[f"{impl} {step}"] = make(kind, impl, step)  # pyright: ignore[reportArgumentType]
            except (RuntimeError, ValueError, ImportError) as error:
                notes[f"{impl} {step}"] = " ".join(str(error).split())[:200]
        times = in_turns(calls, ROUNDS)
        for impl, step in WAYS:
            own, plain = times.get(f"{impl} {step}"), times.get("reference eager")
            cells: Row = {}
            if own and plain:
                ratios = [a / b for a, b in zip(own, plain, strict=True)]
                cells = {
                    "time_ms": f"{statistics.median(own):.4f}",
                    "to_plain": f"{statistics.median(ratios):.3f}",
                }
            note = notes.get(f"{impl} {step}", "")
            device = facts(torch.device("cuda"))
            rows.append(kind | {"impl": impl, "way": step} | cells | {"note": note} | device)
        write(rows, path)


def tail(kind: Row, impl: str, way: str, device: str = "cuda") -> Callable[[], object]:
    """Norm, attention, addition and ReLU of a block, forward and backward."""
    import torch

    import spem

    shape = [int(size) for size in kind["map"].split("x")]
    z, residual, up = (
        torch.randn(shape, device=device, dtype=getattr(torch, kind["dtype"]))
        .contiguous(memory_format=torch.channels_last)
        .requires_grad_()
        for _ in range(3)
    )
    norm = torch.nn.BatchNorm2d(shape[1], device=device)
    name = kind["attention"]
    module = None if name == "none" else spem.create_attention(name, shape[1]).to(device)
    weights = [*norm.parameters(), *(() if module is None else module.parameters())]

    def once() -> object:
        with spem.ops.use_impl(impl):
            if module is None:
                y = spem.ops.bn_gate_tail(z, residual, norm)
            else:
                y = module.tail(z, residual, norm)
            return torch.autograd.grad(y, [z, residual, *weights], up, allow_unused=True)

    once()
    return recorded(once) if way == "graph" else once


def recorded(call: Callable[[], object]) -> Callable[[], object]:
    """A call as a CUDA graph."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def training_step(kind: Row, impl: str, way: str, device: str = "cuda") -> Callable[[], object]:
    """The step that trains, of a CIFAR ResNet."""
    import torch

    import spem
    from spem.training import OptimConfig, RuntimeConfig
    from spem.training.step import make_optimizer, make_step

    runtime = RuntimeConfig(device=device, precision="bf16", step=way, impl=impl)  # pyright: ignore[reportArgumentType]
    model = spem.resnet(int(kind["depth"]), attention=kind["attention"])
    model = model.to(device, memory_format=torch.channels_last).train()  # pyright: ignore[reportCallIssue]
    optim, batch = OptimConfig(), int(kind["batch"])
    images = torch.randn(batch, 3, 32, 32, device=device, dtype=torch.bfloat16)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.arange(batch, device=device) % 10
    step = make_step(model, make_optimizer(model, optim), optim, runtime)

    def once() -> object:
        with spem.ops.use_impl(impl):
            return step(images, labels)

    once()
    return once


def stages(out: Path, experiment: str, recipe: str, images: Path | None) -> dict[str, list[str]]:
    """The command of each stage, in order."""
    python, out = sys.executable, out.resolve()
    own = [python, str(Path(__file__).resolve()), str(out), "--only"]
    root = [] if images is None else ["--root", str(images.resolve())]
    tests = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
    training = [python, "-m", "spem", "reproduce", experiment, "--recipe", recipe, *root]
    return {
        "tests": [*tests, f"--junitxml={out / 'tests.xml'}"],
        "tails": [*own, "tails"],
        "steps": [*own, "steps"],
        "training": [*training, "--results", str(out / "training")],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    began = time.monotonic()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="DIR", help="folder of everything")
    parser.add_argument("--minutes", type=float, default=9.0, help="length of this call")
    parser.add_argument("--experiment", default="scratch", help="of spem reproduce")
    parser.add_argument("--recipe", default="study", help="of spem reproduce")
    parser.add_argument("--images", type=Path, help="folder that holds cifar10")
    parser.add_argument("--again", action="append", default=[], help="forget how a stage ended")
    parser.add_argument("--only", choices=("tails", "steps"), help="this table alone, at once")
    given = parser.parse_args(arguments)
    import torch

    if not torch.cuda.is_available():
        print("gpu: torch sees no CUDA device here, so there is nothing to do.", file=sys.stderr)
        return 2
    if given.only == "tails":
        maps = ["x".join(map(str, shape)) for shape in MAPS]
        found = itertools.product(maps, ("bfloat16", "float32"), ATTENTIONS)
        kinds = [{"map": m, "dtype": d, "attention": a} for m, d, a in found]
        time_table(kinds, tail, given.out / "tails.csv")
        return 0
    if given.only == "steps":
        found = itertools.product(map(str, DEPTHS), ATTENTIONS)
        kinds = [{"depth": d, "batch": "128", "attention": a} for d, a in found]
        time_table(kinds, training_step, given.out / "steps.csv")
        return 0
    state = {name: how for name, how in read_state(given.out).items() if name not in given.again}
    if given.again:
        (given.out / "state.json").write_text(json.dumps(state) + "\n", encoding="utf-8")
    commands = stages(given.out, given.experiment, given.recipe, given.images)
    return carry_on(commands, given.out, began + 60 * given.minutes)


if __name__ == "__main__":
    sys.exit(main())
