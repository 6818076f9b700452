"""Images: sources, the set held in memory, the epoch's plan, crop and flip, normalisation.

Names are imported on first use: `names` and `folder` need no torch, so that a command can check
its data before anything slow happens.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spem.data.folder import decode
    from spem.data.images import (
        EpochPlan,
        ImageSet,
        Split,
        augment,
        checksum,
        epoch_plan,
        hold_out,
        normalise,
    )
    from spem.data.names import HUB_IDS, NORMALISATION
    from spem.data.sources import check_images, load_images

__all__ = ["EpochPlan", "ImageSet", "Split", "augment", "checksum", "epoch_plan", "hold_out"]
__all__ += ["HUB_IDS", "NORMALISATION", "check_images", "decode", "load_images", "normalise"]

_HOME = {
    **dict.fromkeys(("HUB_IDS", "NORMALISATION"), "names"),
    **dict.fromkeys(("check_images", "load_images"), "sources"),
    "decode": "folder",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'spem.data' has no attribute {name!r}")
    return getattr(import_module(f"spem.data.{_HOME.get(name, 'images')}"), name)
