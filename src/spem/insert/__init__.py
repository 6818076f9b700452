"""Attention in other people's networks: finding the places, putting it in, taking it out."""

from spem.insert.attach import attach, detach, find_sites
from spem.insert.existing import CarriedSE, FromAverage
from spem.insert.families import RULES, Rule
from spem.insert.fused import FusedBlock
from spem.insert.identity import IdentityStart
from spem.insert.keys import Around
from spem.insert.layer import attn_layer
from spem.insert.sites import Site
from spem.insert.wrap import AfterNorm, BeforeModule

__all__ = [
    "RULES",
    "AfterNorm",
    "Around",
    "BeforeModule",
    "CarriedSE",
    "FromAverage",
    "FusedBlock",
    "IdentityStart",
    "Rule",
    "Site",
    "attach",
    "attn_layer",
    "detach",
    "find_sites",
]
