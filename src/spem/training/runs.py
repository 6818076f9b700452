"""Names that callers still import from here; goes with them."""

from pathlib import Path
from typing import Any

from spem.training.config import RunConfig
from spem.training.folder import (
    CHECKPOINT,
    CONFIG,
    WEIGHTS,
    Result,
    read_config,
    read_result,
    require_same_run,
)

ANSWERS, GATES = "answers.npy", "gates.json"

__all__ = [
    "ANSWERS",
    "CHECKPOINT",
    "CONFIG",
    "GATES",
    "WEIGHTS",
    "finished",
    "plan_run",
    "read_config",
]


def finished(config: RunConfig, folder: Path) -> Result | None:
    """The result of this very run if the folder holds it."""
    result = read_result(folder)
    stored = read_config(folder) if result is not None else None
    if stored is not None:
        require_same_run(stored, config, folder)
    return result


def plan_run(config: RunConfig, folder: Path, message: Any, processes: int = 1) -> RunConfig:
    """Runs are planned when they are trained."""
    return config
