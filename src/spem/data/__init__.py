"""Images: sources, the set held in memory, the epoch's plan, crop and flip, normalisation."""

from spem.data.augment import NORMALISATION, EpochPlan, augment, epoch_plan, normalise
from spem.data.images import ImageSet, Split, checksum, hold_out
from spem.data.sources import HUB_IDS, load_images

__all__ = [
    "HUB_IDS",
    "NORMALISATION",
    "EpochPlan",
    "ImageSet",
    "Split",
    "augment",
    "checksum",
    "epoch_plan",
    "hold_out",
    "load_images",
    "normalise",
]
