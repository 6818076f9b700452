"""`spem bench`: what attention costs on this machine, in the step that trains and in inference."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from statistics import median
from typing import Annotated, Any, Literal

from spem.cli.network import Named, Size, is_trained, load_network
from spem.cli.options import RARE, Json
from spem.cli.output import print_json, print_table
from spem.training.config import Impl, RuntimeConfig

ROUNDS, SECONDS = 5, 0.4
"""Timings of each network, and the length of one."""
ARMS = ("none", "se", "eca", "spem")
TRAINED = "as trained"
_WHOM = "whom to time (default none se eca spem; trained weights as they are)"
_DEVICE = "cpu or cuda; else cuda where there is any"
_IMPL = "of the blocks' tails: reference, formula, numba, triton"
_QUICK = "small batches and few rounds, to see that it runs"


def run(
    network: Named = "cifar:29",
    *,
    attention: Annotated[Sequence[str], "ATTENTION", _WHOM] = (),
    batch: Annotated[int, "N", "images a step"] = 128,
    size: Size = None,
    device: Annotated[str | None, "DEVICE", _DEVICE] = None,
    threads: Annotated[int | None, "N", "CPU threads; else torch's choice"] = None,
    precision: Annotated[Literal["fp32", "bf16"], "of the training step"] = "fp32",
    impl: Annotated[Impl | None, "IMPL", _IMPL, RARE] = None,
    quick: Annotated[bool, _QUICK] = False,
    json: Json = False,
) -> None:
    """Time a training step and inference with each attention and of the plain network.

    All networks take turns, round by round; ratios are medians over rounds of the times of one
    round, which a busy machine disturbs less than the times themselves.
    """
    import torch
    from torch.utils.benchmark import Timer

    from spem.training.environment import hardware
    from spem.training.loop import resolved
    from spem.training.step import execution

    asked = attention or ((TRAINED,) if is_trained(network) else ARMS)
    plain = TRAINED if asked == (TRAINED,) else "none"
    arms = list(dict.fromkeys(asked if plain in asked else (plain, *asked)))
    runtime = RuntimeConfig(
        device=device or "auto", precision=precision, threads=threads or 0, impl=impl
    )
    runtime = replace(resolved(runtime, 1), impl=impl, step="eager")
    rounds, seconds, batch = (2, 0.05, min(batch, 16)) if quick else (ROUNDS, SECONDS, batch)
    timers: dict[tuple[str, str], tuple[Any, int]] = {}
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    with execution(runtime):
        calls = {name: _calls(network, name, size, batch, runtime) for name in arms}
        for name, kinds in calls.items():
            for kind, call in kinds.items():
                print(f"warming up {name}, {kind}", file=sys.stderr, flush=True)
                timer = Timer("call()", globals={"call": call}, num_threads=runtime.threads)
                once = timer.timeit(1).mean  # kernels are compiled before
                timers[name, kind] = (timer, max(1, round(seconds / once)))
        for turn in range(rounds):
            print(f"round {turn + 1} of {rounds}", file=sys.stderr, flush=True)
            for key, (timer, number) in timers.items():
                times[key].append(1000 * timer.timeit(number).mean)
    rows: dict[str, dict[str, Any]] = {name: {"attention": name} for name in arms}
    for (name, kind), own in times.items():
        pairs = zip(own, times[plain, kind], strict=True)
        rows[name][f"{kind}, ms"] = median(own)
        rows[name][f"{kind}, ratio"] = median(mine / plain for mine, plain in pairs)
    machine, table = hardware(torch.device(runtime.device), runtime.threads), list(rows.values())
    if json:
        print_json({"network": network, "batch": batch, "hardware": machine, "rows": table})
        return
    columns = list(table[0])
    cells = [[row["attention"], *(f"{row[name]:.3g}" for name in columns[1:])] for row in table]
    print_table(columns, cells, title=f"{network}, batch {batch}, {precision}, {machine}")


def _calls(
    network: str, attention: str, size: int | None, batch: int, runtime: Any
) -> dict[str, Callable[[], object]]:
    """A training step and a forward pass of one network, as functions without arguments."""
    import torch

    from spem.training import OptimConfig
    from spem.training.step import make_optimizer, make_step

    attached = attention not in ("none", TRAINED)
    kind: Any = {"attention": attention, "start": "module"} if attached else {}
    known = load_network(network, size=size, **kind)
    layout = {"memory_format": torch.channels_last}
    model = known.model.to(runtime.device, **layout)
    trained, optim = deepcopy(model).train(), OptimConfig()
    images = torch.randn(known.shape(batch), device=runtime.device).contiguous(**layout)
    with torch.no_grad():
        outputs = model(images[:1])
    if not isinstance(outputs, torch.Tensor) or outputs.dim() != 2:
        found = list(outputs.shape) if isinstance(outputs, torch.Tensor) else type(outputs).__name__
        raise ValueError(f"{network} answers {found}. Name a network that answers [n, classes].")
    labels = torch.arange(batch, device=runtime.device) % outputs.shape[1]
    step = make_step(trained, make_optimizer(trained, optim), optim, runtime)
    inputs = images.bfloat16() if runtime.precision == "bf16" else images
    infer = torch.inference_mode()(lambda: model(images))
    return {"training step": lambda: step(inputs, labels), "inference": infer}
