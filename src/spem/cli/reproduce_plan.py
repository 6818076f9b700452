"""`spem reproduce --dry-run`: the runs with their cost, and an estimate of the time here."""

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from spem.cli.output import print_table

if TYPE_CHECKING:
    from pathlib import Path

    from spem.cli.reproduce import Request
    from spem.models import ResNet
    from spem.reproduce.experiments import Experiment
    from spem.training import RunConfig

SIZES = {"digits": (1437, 360), "cifar10": (50_000, 10_000), "cifar100": (50_000, 10_000)}
"""Training and test images of the data sets; others are taken for as large as CIFAR."""
MEASURED_IMAGES = 32
MEASURING_SECONDS = 30.0
"""After so long, what has not been measured is estimated from FLOPs."""
FORWARD_SHARE = 1 / 3
"""Time of an evaluated image by that of a trained one: forward without backward."""


def show_plan(
    experiments: "Sequence[Experiment]", configs: "Sequence[RunConfig]", request: "Request"
) -> None:
    """Print every cell with its seeds, state, FLOPs and time, and the time of all runs."""
    from spem.reproduce.grid import default_workers
    from spem.training.log import duration

    runs = request.results / "runs"
    states = {config.folder(runs): _state(config, runs) for config in configs}
    clock = _Clock()
    rows: list[list[str]] = []
    for one in experiments:
        for cell in one.cells:
            start = [one.name, cell.row, cell.data]
            if cell.config is None:
                rows.append([*start, *"----", "cannot be run", "-", "-"])
                continue
            folders = [replace(cell.config, seed=seed).folder(runs) for seed in one.seeds]
            done = [states[folder] for folder in folders]
            rows.append(
                [
                    *start,
                    cell.config.data.name,
                    str(cell.config.model.depth),
                    cell.config.model.attention,
                    " ".join(map(str, one.seeds)),
                    ", ".join(f"{done.count(s)} {s}" for s in dict.fromkeys(done)),
                    f"{clock.flops(cell.config) / 1e6:.1f}",
                    duration(clock.seconds(cell.config)),
                ]
            )
    columns = ["experiment", "row", "data", "trained on", "depth", "attention", "seeds", "runs"]
    print_table([*columns, "MFLOPs", "time each"], rows, align="llllrlllrr")
    missing = [c for c in configs if states[c.folder(runs)] not in ("finished", "diverged")]
    workers = request.workers or default_workers(configs, request.per_gpu)
    total = sum(clock.seconds(config) for config in missing)
    print(
        f"\n{len(configs)} runs, each once even where tables share it; {len(missing)} are to be "
        f"trained. Estimate for this machine: {duration(total)} of training, about "
        f"{duration(total / min(workers, max(1, len(missing))))} with {workers} at a time."
    )
    print(
        "MFLOPs: one image, forward, 2 a multiply-add. The time is an estimate from a few eager "
        "steps on an otherwise idle machine; runs side by side slow one another."
    )


class _Clock:
    """Estimates from short measurements, each made once."""

    def __init__(self) -> None:
        self._until = time.monotonic() + MEASURING_SECONDS
        self._known: dict[Any, tuple[RunConfig, float]] = {}
        self._flops: dict[Any, int] = {}

    def flops(self, config: "RunConfig") -> int:
        """Forward FLOPs of one image."""
        from spem.cost import count

        key = (config.model, _side(config))
        if key not in self._flops:
            side = _side(config)
            self._flops[key] = count(_network(config), (1, 3, side, side)).flops
        return self._flops[key]

    def seconds(self, config: "RunConfig") -> float:
        """Time of a whole run: its training steps, and an evaluation after each epoch."""
        train, test = SIZES.get(config.data.name, SIZES["cifar10"])
        train = min(train - config.data.val, config.data.limit or train)
        test = min(test, config.data.test_limit or test) + config.data.val
        images = train + FORWARD_SHARE * test
        return config.optim.epochs * images * self._seconds_an_image(config)

    def _seconds_an_image(self, config: "RunConfig") -> float:
        key = (config.model, config.runtime, _side(config))
        if key not in self._known:
            if self._known and time.monotonic() > self._until:
                # No more time to measure: from the known network most like it, by its FLOPs.
                like, seconds = min(self._known.values(), key=lambda k: self._unlike(k[0], config))
                return seconds * self.flops(config) / self.flops(like)
            self._known[key] = (config, _measure(config))
        return self._known[key][1]

    def _unlike(self, known: "RunConfig", asked: "RunConfig") -> tuple[float, bool]:
        distance = abs(math.log(self.flops(known) / self.flops(asked)))
        return round(distance, 1), known.model.attention != asked.model.attention


def _network(config: "RunConfig") -> "ResNet":
    from spem.training.checkpoint import build_model

    return build_model(config, classes=10)


def _side(config: "RunConfig") -> int:
    return config.data.size or (16 if config.data.name == "digits" else 32)


def _measure(config: "RunConfig") -> float:
    """Seconds an image of a training step, the faster of two after one that warms up."""
    import torch

    from spem.seeding import initialise
    from spem.training.step import execution, make_optimizer, make_step

    device = config.runtime.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    threads = config.runtime.threads or 1
    runtime = replace(config.runtime, device=device, step="eager", threads=threads)
    batch = min(config.optim.batch, MEASURED_IMAGES)
    with execution(runtime) as place:
        model = _network(config)
        initialise(model, 0)
        model = model.to(place).train()
        step = make_step(model, make_optimizer(model, config.optim), config.optim, runtime)
        side = _side(config)
        images = torch.randn(batch, 3, side, side, device=place)
        if runtime.precision == "bf16":
            images = images.bfloat16()
        labels = torch.arange(batch, device=place) % 10
        times: list[float] = []
        for _ in range(3):
            started = time.monotonic()
            float(step(images, labels).loss)
            times.append(time.monotonic() - started)
    return min(times[1:]) / batch


def _state(config: "RunConfig", runs: "Path") -> str:
    """How far a run is, by its folder."""
    from spem.training.diverged import read_diverged
    from spem.training.runs import CHECKPOINT, finished

    folder = config.folder(runs)
    try:
        if finished(config, folder) is not None:
            return "finished"
        if read_diverged(config, folder) is not None:
            return "diverged"
    except ValueError:
        return "damaged"
    return "begun" if (folder / CHECKPOINT).exists() else "missing"
