"""Images: sources, the set held in memory, the epoch's plan, crop and flip, normalisation.

Names are imported on first use: all but `images` need no torch, so that a command can check its
data before anything slow happens.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spem.data.folder import decode
    from spem.data.images import EpochPlan, ImageSet, Split, augment, checksum
    from spem.data.images import epoch_plan, hold_out, normalise  # isort: skip
    from spem.data.names import HUB_IDS, NORMALISATION
    from spem.data.sources import check_images, load_images

__all__ = ["EpochPlan", "ImageSet", "Split", "augment", "checksum", "epoch_plan", "hold_out"]
__all__ += ["HUB_IDS", "NORMALISATION", "check_images", "decode", "load_images", "normalise"]


def __getattr__(name: str) -> Any:
    for home in ("names", "folder", "sources", "images") if name in __all__ else ():
        module = import_module(f"spem.data.{home}")
        if name in vars(module):
            return getattr(module, name)
    raise AttributeError(f"module 'spem.data' has no attribute {name!r}")
