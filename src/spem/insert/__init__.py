"""Attention in other people's networks: finding the places, putting it in, taking it out."""

from spem.insert.attach import attach, attn_layer, detach, find_sites
from spem.insert.families import RULES, Rule
from spem.insert.fold import FoldedSite, FoldReport, fold
from spem.insert.sites import Site
from spem.insert.start import CarriedSE, FromAverage, IdentityStart
from spem.insert.wrap import AfterNorm, BeforeModule, true_keys

__all__ = [
    "RULES",
    "AfterNorm",
    "BeforeModule",
    "CarriedSE",
    "FoldReport",
    "FoldedSite",
    "FromAverage",
    "IdentityStart",
    "Rule",
    "Site",
    "attach",
    "attn_layer",
    "detach",
    "find_sites",
    "fold",
    "true_keys",
]
