"""Training runs: configs and recipes, the loop, run folders.

Names are loaded when they are used: configs and recipes need no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spem.training.config import (
        DataConfig,
        ModelConfig,
        OptimConfig,
        RunConfig,
        RuntimeConfig,
    )
    from spem.training.distributed import process_group
    from spem.training.evaluation import Accuracy, evaluate, load_test_images
    from spem.training.folder import (
        DataIdentity,
        HeldError,
        Result,
        Run,
        Weights,
        load_weights,
        read_config,
        read_metrics,
        read_result,
        read_run,
        read_weights,
        save_weights,
    )
    from spem.training.loop import train
    from spem.training.progress import Progress, Silent
    from spem.training.recipes import fast, paper, short, smoke
    from spem.training.signals import Interrupted

__all__ = [
    "Accuracy",
    "DataConfig",
    "DataIdentity",
    "HeldError",
    "Interrupted",
    "ModelConfig",
    "OptimConfig",
    "Progress",
    "Result",
    "Run",
    "RunConfig",
    "RuntimeConfig",
    "Silent",
    "Weights",
    "evaluate",
    "fast",
    "load_test_images",
    "load_weights",
    "paper",
    "process_group",
    "read_config",
    "read_metrics",
    "read_result",
    "read_run",
    "read_weights",
    "save_weights",
    "short",
    "smoke",
    "train",
]

_NAMES = {
    "config": ("DataConfig", "ModelConfig", "OptimConfig", "RunConfig", "RuntimeConfig"),
    "distributed": ("process_group",),
    "evaluation": ("Accuracy", "evaluate", "load_test_images"),
    "folder": (
        *("DataIdentity", "HeldError", "Result", "Run", "Weights", "load_weights", "read_config"),
        *("read_metrics", "read_result", "read_run", "read_weights", "save_weights"),
    ),
    "loop": ("train",),
    "progress": ("Progress", "Silent"),
    "recipes": ("fast", "paper", "short", "smoke"),
    "signals": ("Interrupted",),
}
_HOME = {name: home for home, names in _NAMES.items() for name in names}
_MODULES = (*_NAMES, "capture", "environment", "inside", "sets", "step")


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"spem.training.{_HOME[name]}"), name)
    if name in _MODULES:
        return import_module(f"spem.training.{name}")
    raise AttributeError(f"module 'spem.training' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
