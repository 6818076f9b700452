"""Training runs: configs and recipes, the loop, run folders.

What needs torch is loaded when it is used; configs and recipes do not.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from spem.training.config import DataConfig, ModelConfig, OptimConfig, RunConfig, RuntimeConfig
from spem.training.progress import Progress, Silent
from spem.training.recipes import fast, paper, short, smoke
from spem.training.signals import Interrupted

if TYPE_CHECKING:
    from spem.training.distributed import process_group
    from spem.training.evaluation import Accuracy, evaluate, load_test_images
    from spem.training.folder import (
        DataIdentity,
        HeldError,
        Result,
        Run,
        Weights,
        read_metrics,
        read_result,
        read_run,
        read_weights,
        save_weights,
    )
    from spem.training.loop import train

__all__ = ["DataConfig", "ModelConfig", "OptimConfig", "RunConfig", "RuntimeConfig"]
__all__ += ["Interrupted", "Progress", "Silent", "fast", "paper", "short", "smoke"]
__all__ += ["Accuracy", "evaluate", "load_test_images", "process_group", "train"]
__all__ += ["DataIdentity", "HeldError", "Result", "Run", "Weights"]
__all__ += ["read_metrics", "read_result", "read_run", "read_weights", "save_weights"]

_HOME = {
    **dict.fromkeys(("Accuracy", "evaluate", "load_test_images"), "evaluation"),
    **{"process_group": "distributed", "train": "loop"},
}


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(f"spem.training.{_HOME.get(name, 'folder')}"), name)
    raise AttributeError(f"module 'spem.training' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
