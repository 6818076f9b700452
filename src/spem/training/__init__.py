"""Training runs: configs and recipes, the loop, run folders.

Names are loaded when they are used: configs and recipes need no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spem.training.config import (
        DataConfig as DataConfig,
        ModelConfig as ModelConfig,
        OptimConfig as OptimConfig,
        RunConfig as RunConfig,
        RuntimeConfig as RuntimeConfig,
    )
    from spem.training.distributed import process_group as process_group
    from spem.training.evaluation import (
        Accuracy as Accuracy,
        evaluate as evaluate,
        load_test_images as load_test_images,
    )
    from spem.training.folder import (
        DataIdentity as DataIdentity,
        HeldError as HeldError,
        Result as Result,
        Run as Run,
        Weights as Weights,
        read_metrics as read_metrics,
        read_result as read_result,
        read_run as read_run,
        read_weights as read_weights,
        save_weights as save_weights,
    )
    from spem.training.loop import train as train
    from spem.training.progress import (
        Progress as Progress,
        Silent as Silent,
    )
    from spem.training.recipes import (
        fast as fast,
        paper as paper,
        short as short,
        smoke as smoke,
    )
    from spem.training.signals import Interrupted as Interrupted

_NAMES = {
    "config": ("DataConfig", "ModelConfig", "OptimConfig", "RunConfig", "RuntimeConfig"),
    "distributed": ("process_group",),
    "evaluation": ("Accuracy", "evaluate", "load_test_images"),
    "folder": (
        *("DataIdentity", "HeldError", "Result", "Run", "Weights"),
        *("read_metrics", "read_result", "read_run", "read_weights", "save_weights"),
    ),
    "loop": ("train",),
    "progress": ("Progress", "Silent"),
    "recipes": ("fast", "paper", "short", "smoke"),
    "signals": ("Interrupted",),
}
_HOME = {name: home for home, names in _NAMES.items() for name in names}
_MODULES = (*_NAMES, "environment", "sets", "step")


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return sorted(_HOME)
    if name in _HOME:
        return getattr(import_module(f"spem.training.{_HOME[name]}"), name)
    if name in _MODULES:
        return import_module(f"spem.training.{name}")
    raise AttributeError(f"module 'spem.training' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*_HOME, *_MODULES})
