"""Images: sources, the set held in memory, the epoch's plan, crop and flip, normalisation.

What `images` holds needs torch and is imported on first use, so that a command can check its data
before anything slow happens.
"""

from typing import TYPE_CHECKING, Any

from spem.data.folder import decode
from spem.data.names import HUB_IDS, NORMALISATION
from spem.data.sources import check_images, load_images

if TYPE_CHECKING:
    from spem.data.images import EpochPlan, ImageSet, Split, augment, checksum
    from spem.data.images import epoch_plan, hold_out, normalise  # isort: skip

__all__ = ["EpochPlan", "ImageSet", "Split", "augment", "checksum", "epoch_plan", "hold_out"]
__all__ += ["HUB_IDS", "NORMALISATION", "check_images", "decode", "load_images", "normalise"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'spem.data' has no attribute {name!r}")
    from spem.data import images

    return getattr(images, name)
