"""The run folder: what is planned in it, and whether it holds the run one asks for.

`config.json` is written when a run is planned, `result.json` last of all; the presence of the
latter is the only sign of "finished".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from spem.training.checkpoint import load_checkpoint, load_json, save_json
from spem.training.config import SCHEMA, RunConfig, RuntimeConfig, differing_fields
from spem.training.results import Result, read_result

CONFIG, CHECKPOINT, WEIGHTS = "config.json", "checkpoint.pt", "model.safetensors"
KEPT = ("device", "impl", "step", "threads", "channels_last", "deterministic")
"""Runtime fields that can change the last bits, and so stay as they were planned."""


def plan_run(config: RunConfig, folder: Path, message: Callable[[str], None]) -> RunConfig:
    """Resolve what a config leaves open, or take over how the folder's run was planned.

    Args:
        config: the config asked for.
        folder: the run folder, already claimed.
        message: told when a resumed run keeps another device, thread count or step than asked.

    Raises:
        ValueError: the folder holds another run, one of its files is damaged, or the device cannot
            be used.
    """
    written = read_config(folder)
    stored = written or _checkpoint_config(folder)
    if stored is None:
        planned = replace(config, runtime=_resolved(config.runtime))
    else:
        require_same_run(stored, config, folder)
        begun = (folder / CHECKPOINT).exists()
        # Before the first checkpoint nothing depends on the plan yet, and a wish may mend it (a
        # device that is not there); what was left open stays as it was planned.
        fields = KEPT if begun else [f for f in KEPT if _left_open(config.runtime, f)]
        kept = {name: getattr(stored.runtime, name) for name in fields}
        planned = replace(config, runtime=replace(config.runtime, **kept))
        asked = _differing_wishes(config.runtime, stored.runtime)
        if asked and begun:
            message(f"resuming as planned, so that the result stays exact: {asked}")
    _require_device(planned.runtime.device)
    if planned != written:
        values = {"schema": SCHEMA, "id": planned.id, "config": planned.to_dict()}
        save_json(values, folder / CONFIG)
    return planned


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
    device = runtime.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    threads = runtime.threads or torch.get_num_threads()
    return replace(runtime, device=device, threads=threads, impl=runtime.impl or "reference")


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
    open_values = {"device": "auto", "impl": None, "threads": 0}
    return name in open_values and getattr(asked, name) == open_values[name]


def _differing_wishes(asked: RuntimeConfig, planned: RuntimeConfig) -> str:
    """Name the kept fields that were asked for otherwise."""
    return ", ".join(
        f"{name} {getattr(planned, name)} (asked: {getattr(asked, name)})"
        for name in KEPT
        if getattr(asked, name) != getattr(planned, name) and not _left_open(asked, name)
    )
