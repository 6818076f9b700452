"""Training runs: configs and recipes, the loop, run folders.

Names are loaded when they are used: configs and recipes need no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spem.training.config import *  # noqa: F403
    from spem.training.distributed import *  # noqa: F403
    from spem.training.evaluation import *  # noqa: F403
    from spem.training.folder import *  # noqa: F403
    from spem.training.loop import *  # noqa: F403
    from spem.training.progress import *  # noqa: F403
    from spem.training.recipes import *  # noqa: F403
    from spem.training.signals import *  # noqa: F403

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
