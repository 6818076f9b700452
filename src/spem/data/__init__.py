"""Images: sources, the set held in memory, the epoch's plan, crop and flip, normalisation.

Names are loaded when they are used: `names` and `folder` need no torch, so that a command can look
at its data before anything slow happens.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spem.data.epoch import EpochPlan, augment, epoch_plan, normalise
    from spem.data.folder import decode
    from spem.data.images import ImageSet, Split, checksum, hold_out
    from spem.data.names import HUB_IDS, NORMALISATION
    from spem.data.sources import check_images, load_images

__all__ = [
    "HUB_IDS",
    "NORMALISATION",
    "EpochPlan",
    "ImageSet",
    "Split",
    "augment",
    "check_images",
    "checksum",
    "decode",
    "epoch_plan",
    "hold_out",
    "load_images",
    "normalise",
]

_HOME = {
    **dict.fromkeys(("HUB_IDS", "NORMALISATION"), "names"),
    **dict.fromkeys(("EpochPlan", "augment", "epoch_plan", "normalise"), "epoch"),
    **dict.fromkeys(("ImageSet", "Split", "checksum", "hold_out"), "images"),
    **dict.fromkeys(("check_images", "load_images"), "sources"),
    "decode": "folder",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'spem.data' has no attribute {name!r}")
    return getattr(import_module(f"spem.data.{_HOME[name]}"), name)
