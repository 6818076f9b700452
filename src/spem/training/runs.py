"""The run folder: what is planned in it, and whether it holds the run one asks for.

`config.json` is written when a run is planned, `result.json` last of all; the presence of the
latter is the only sign of "finished".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from spem.training.checkpoint import load_checkpoint, load_json, save_json
from spem.training.choose_impl import choose_impl
from spem.training.config import SCHEMA, RunConfig, RuntimeConfig, differing_fields
from spem.training.results import Result, read_result
from spem.training.step import require_cuda

CONFIG, CHECKPOINT, WEIGHTS = "config.json", "checkpoint.pt", "model.safetensors"
ANSWERS, GATES = "answers.npy", "gates.json"
KEPT = ("device", "impl", "step", "threads", "channels_last", "deterministic")
"""Runtime fields that can change the last bits, and so stay as they were planned."""


def plan_run(
    config: RunConfig, folder: Path, message: Callable[[str], None], processes: int = 1
) -> RunConfig:
    """Resolve what a config leaves open, or take over how the folder's run was planned.

    A step "auto" stays so on a CPU, where the network is needed to choose one (`settle_step`).
    Several processes take their steps eagerly, and each on a device of its own: a run that one
    process planned otherwise goes on so.

    Args:
        config: the config asked for.
        folder: the run folder, already claimed.
        message: told when a resumed run keeps another device, thread count or step than asked.
        processes: how many train the run together.

    Raises:
        ValueError: the folder holds another run, one of its files is damaged, or the device, the
            implementation or the step cannot be used.
    """
    written = read_config(folder)
    stored = written or _checkpoint_config(folder)
    begun = (folder / CHECKPOINT).exists()
    runtime = config.runtime
    if stored is not None:
        require_same_run(stored, config, folder)
        # Before the first checkpoint nothing depends on the plan yet, and a wish may mend it (a
        # device that is not there); what was left open stays as it was planned.
        kept = KEPT if begun else _kept_open(runtime, stored.runtime)
        planned = replace(runtime, **{name: getattr(stored.runtime, name) for name in kept})
        runtime = planned if processes == 1 else _divided(planned, runtime)
        asked = _differing_wishes(config.runtime, runtime)
        if asked and begun:
            message(f"resuming as planned, so that the result stays exact: {asked}")
    try:
        if processes > 1:
            _require_divisible(runtime, processes)
            runtime = replace(runtime, step="eager")
        planned = replace(config, runtime=_resolved(runtime))
    except ValueError as error:
        if not begun:
            raise
        raise ValueError(f"{error} But the run in {folder} was begun this way.") from error
    if planned != written:
        save_config(planned, folder)
    return planned


def settle_step(config: RunConfig, folder: Path, step: Literal["eager", "compile"]) -> RunConfig:
    """Write down the step that a measurement chose, so that a resumed run keeps it."""
    settled = replace(config, runtime=replace(config.runtime, step=step))
    save_config(settled, folder)
    return settled


def save_config(config: RunConfig, folder: Path) -> None:
    """Write `config.json` of a run folder."""
    values = {"schema": SCHEMA, "id": config.id, "config": config.to_dict()}
    save_json(values, folder / CONFIG)


def require_same_run(stored: RunConfig, asked: RunConfig, folder: Path) -> None:
    """Refuse to continue one run with the config of another.

    Raises:
        ValueError: id or seed differ; the message names the fields.
    """
    if stored.id != asked.id:
        fields = differing_fields(stored.identity, asked.identity)
        raise ValueError(
            f"train: {folder} belongs to run {stored.id}, this config is {asked.id} ({fields}). "
            "Use another folder."
        )
    if stored.seed != asked.seed:
        raise ValueError(
            f"train: {folder} belongs to seed {stored.seed}, this config has seed {asked.seed}. "
            "Use another folder."
        )


def read_config(folder: Path) -> RunConfig | None:
    """Read `config.json` of a run folder; None if there is none.

    Raises:
        ValueError: the file is damaged, edited, or from another version.
    """
    path = Path(folder) / CONFIG
    if not path.exists():
        return None
    values = load_json(
        path,
        remedy="Delete it: a resumed run takes its config from the checkpoint, if there is one.",
    )
    try:
        return RunConfig.from_dict(values["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"load: {path} does not fit this version of spem. {error}") from error


def finished(config: RunConfig, folder: Path) -> Result | None:
    """Return the result of this very run if the folder holds it.

    Raises:
        ValueError: the folder holds the result of another run.
    """
    result = read_result(folder)
    if result is not None and (result.id, result.seed) != (config.id, config.seed):
        stored = read_config(folder)
        if stored is not None:
            require_same_run(stored, config, folder)
        raise ValueError(
            f"train: {folder} holds the result of run {result.id}, seed {result.seed}; this config "
            f"is {config.id}, seed {config.seed}. Use another folder."
        )
    return result


def _checkpoint_config(folder: Path) -> RunConfig | None:
    """How the folder's run was planned, from its checkpoint: `config.json` may have been lost."""
    checkpoint = folder / CHECKPOINT
    if not checkpoint.exists():
        return None
    return RunConfig.from_dict(load_checkpoint(checkpoint)["config"])


def _resolved(runtime: RuntimeConfig) -> RuntimeConfig:
    """Fill in what was left open, and refuse what cannot be had."""
    device = runtime.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    _require_device(device)
    kind = torch.device(device).type
    step = runtime.step
    if step == "auto" and kind != "cpu":
        step = "graph" if kind == "cuda" else "eager"
    if step == "graph":
        require_cuda(kind)
    threads = runtime.threads or torch.get_num_threads()
    settled = replace(runtime, device=device, threads=threads, step=step)
    return replace(settled, impl=choose_impl(settled, kind).impl)


def _divided(planned: RuntimeConfig, asked: RuntimeConfig) -> RuntimeConfig:
    """A plan of one process without what only one can do, unless that is asked for again."""
    step = "eager" if asked.step in ("auto", "eager") else planned.step
    device = planned.device
    if device != asked.device:
        device = device.partition(":")[0]
    return replace(planned, step=step, device=device)


def _require_divisible(runtime: RuntimeConfig, processes: int) -> None:
    """Refuse what several processes cannot do together.

    Raises:
        ValueError: a compiled or captured step, one device for all, or one without collectives.
    """
    if runtime.step in ("compile", "graph"):
        raise ValueError(
            f"train: runtime.step={runtime.step!r} is for one process, and {processes} train this "
            "run. Use 'eager' or 'auto'."
        )
    if runtime.device not in ("auto", "cpu", "cuda"):
        raise ValueError(
            f"train: runtime.device={runtime.device!r} cannot serve {processes} processes, each of "
            "which takes a device of its own. Use 'cuda', 'cpu' or 'auto'."
        )


def _require_device(device: str) -> None:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"train: runtime.device={device!r} cannot be used ({reason}). Use 'cpu' or 'auto'."
        ) from None


def _left_open(asked: RuntimeConfig, name: str) -> bool:
    """Whether a field was left to the planning, and so is no wish."""
    open_values = {"device": "auto", "impl": None, "step": "auto", "threads": 0}
    return name in open_values and getattr(asked, name) == open_values[name]


def _kept_open(asked: RuntimeConfig, planned: RuntimeConfig) -> tuple[str, ...]:
    """The fields left open, but for those that were chosen for a device or step now changed."""
    changed = {name for name in KEPT if getattr(asked, name) != getattr(planned, name)}
    changed -= {name for name in KEPT if _left_open(asked, name)}
    anew: tuple[str, ...] = ()
    if "device" in changed:
        anew = ("impl", "step")
    elif "step" in changed:
        anew = ("impl",)
    return tuple(name for name in KEPT if _left_open(asked, name) and name not in anew)


def _differing_wishes(asked: RuntimeConfig, planned: RuntimeConfig) -> str:
    """Name the kept fields that were asked for otherwise."""
    return ", ".join(
        f"{name} {getattr(planned, name)} (asked: {getattr(asked, name)})"
        for name in KEPT
        if getattr(asked, name) != getattr(planned, name) and not _left_open(asked, name)
    )
