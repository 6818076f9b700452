"""The run folder: what is planned, what it ran on, what came out.

`config.json` is written when a run is planned, `result.json` last of all; the presence of the
latter is the only sign of "finished".
"""

from __future__ import annotations

import dataclasses
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import torch

from spem.training.checkpoint import load_checkpoint, load_json, save_json, write_atomic
from spem.training.config import SCHEMA, RunConfig, differing_fields

CONFIG, ENVIRONMENT, RESULT = "config.json", "environment.json", "result.json"
CHECKPOINT, WEIGHTS = "checkpoint.pt", "model.safetensors"
KEPT = ("device", "impl", "step", "threads")
"""Runtime fields that can change the last bits, and so stay as they were planned."""


@dataclass(frozen=True)
class Result:
    """What `result.json` holds; accuracies are percent, times seconds.

    `accuracy` and `loss` are those of the last epoch on the test set. `best_accuracy` is the test
    accuracy of `best_epoch`, which was selected on the set named by `best_selected_on`.
    """

    id: str
    seed: int
    dataset: str
    depth: int
    attention: str
    epochs: int
    accuracy: float
    loss: float
    train_accuracy: float
    train_loss: float
    validation_accuracy: float | None
    best_accuracy: float
    best_epoch: int
    best_selected_on: str
    parameters: int
    attention_parameters: int
    flops: int | None
    steps: int
    train_seconds: float
    evaluation_seconds: float
    step_seconds: float
    """Median over epochs of the time of a training step."""
    images_per_second: float
    hardware: str
    versions: dict[str, str]
    train_sha256: str
    test_sha256: str


def plan_run(config: RunConfig, folder: Path, message: Callable[[str], None]) -> RunConfig:
    """Resolve what a config leaves open, or take over how the folder's run was planned.

    Args:
        config: the config asked for.
        folder: the run folder, already claimed.
        message: told when a resumed run keeps another device, thread count or step than asked.

    Raises:
        ValueError: the folder holds another run, or one of its files is damaged.
    """
    stored = _stored_config(folder)
    if stored is None:
        planned = replace(config, runtime=_resolved(config))
    else:
        require_same_run(stored, config, folder)
        kept = {name: getattr(stored.runtime, name) for name in KEPT}
        planned = replace(config, runtime=replace(config.runtime, **kept))
        open_choice = {"device": "auto", "impl": None, "step": None, "threads": 0}
        asked = {n: v for n in KEPT if (v := getattr(config.runtime, n)) not in (open_choice[n], kept[n])}
        if asked:
            differing = ", ".join(f"{n} {kept[n]} (asked: {asked[n]})" for n in asked)
            message(f"resuming as planned, so that the result stays exact: {differing}")
    if planned != stored:
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
        path, remedy="Delete it: a resumed run takes its config from the checkpoint, if there is one."
    )
    try:
        return RunConfig.from_dict(values["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"load: {path} does not fit this version of spem. {error}") from error


def read_result(folder: Path) -> Result | None:
    """Read `result.json` of a run folder; None if the run has not finished.

    Raises:
        ValueError: the file is damaged, edited, or from another version.
    """
    path = Path(folder) / RESULT
    if not path.exists():
        return None
    values = load_json(path, remedy="Delete it and run the same training again.")
    try:
        return Result(**values)
    except TypeError as error:
        raise ValueError(
            f"load: {path} does not fit this version of spem ({error}). "
            "Delete it and run the same training again."
        ) from error


def write_result(result: Result, folder: Path) -> None:
    """Write `result.json`, which declares the run finished."""
    save_json(dataclasses.asdict(result), folder / RESULT)


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
            f"train: {folder} holds the result of run {result.id}, seed {result.seed}; this config is "
            f"{config.id}, seed {config.seed}. Use another folder."
        )
    return result


def record_environment(folder: Path, data: dict[str, str], runtime: dict[str, Any]) -> None:
    """Append to `environment.json` what this part of the run runs on; a resume adds another part."""
    path = folder / ENVIRONMENT
    try:
        sessions = cast("list[dict[str, Any]]", json.loads(path.read_text())["sessions"])
    except (OSError, ValueError, KeyError, TypeError):
        sessions = []
    sessions.append(
        {
            "versions": versions(),
            "platform": platform.platform(),
            "hardware": hardware(torch.device(runtime["device"]), runtime["threads"]),
            "commit": _commit(),
            "command": sys.argv,
            "data_sha256": data,
        }
    )
    write_atomic(path, json.dumps({"sessions": sessions}, indent=2).encode() + b"\n")


def versions() -> dict[str, str]:
    """Versions of what computes the result."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("spem", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def hardware(device: torch.device, threads: int) -> str:
    """Name of the GPU, or of the processor with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = models[0] if models else name
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"


def _stored_config(folder: Path) -> RunConfig | None:
    """How the folder's run was planned: from `config.json`, else from the checkpoint."""
    stored = read_config(folder)
    checkpoint = folder / CHECKPOINT
    if stored is None and checkpoint.exists():
        stored = RunConfig.from_dict(load_checkpoint(checkpoint)["config"])
    return stored


def _resolved(config: RunConfig) -> Any:
    runtime = config.runtime
    device = runtime.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    threads = runtime.threads or torch.get_num_threads()
    return replace(runtime, device=device, threads=threads, impl=runtime.impl or "reference")


def _commit() -> str | None:
    """Commit of the checkout this package runs from, with "-dirty" if it was changed; None elsewhere."""
    here = Path(__file__).resolve().parent
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        asked = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return asked.stdout.strip() or None if asked.returncode == 0 else None
