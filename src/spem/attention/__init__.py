"""Channel-attention modules, their pooling slot, registry and text form.

A new module adds one import line here.
"""

from spem.attention.base import (
    ChannelAttention,
    Needs,
    attention_class,
    learned_mixes,
    list_attention,
    param_groups,
    penalty,
    register_attention,
)
from spem.attention.cbam import CBAM
from spem.attention.coord import CoordAtt
from spem.attention.eca import ECA
from spem.attention.ela import ELA
from spem.attention.ese import ESE
from spem.attention.fca import FCA
from spem.attention.gc import GC
from spem.attention.gct import GCT
from spem.attention.ge import GE
from spem.attention.gsop import GSoP
from spem.attention.nam import NAM
from spem.attention.pooling import Mix, make_pool
from spem.attention.scale import Scale
from spem.attention.se import SE
from spem.attention.sge import SGE
from spem.attention.simam import SimAM
from spem.attention.spa import SPA
from spem.attention.spec import AttentionSpec, as_spec, create_attention, spec_text
from spem.attention.spem import SPEM
from spem.attention.srm import SRM
from spem.attention.triplet import Triplet

__all__ = [
    "CBAM",
    "ECA",
    "ELA",
    "ESE",
    "FCA",
    "GC",
    "GCT",
    "GE",
    "NAM",
    "SE",
    "SGE",
    "SPA",
    "SPEM",
    "SRM",
    "AttentionSpec",
    "ChannelAttention",
    "CoordAtt",
    "GSoP",
    "Mix",
    "Needs",
    "Scale",
    "SimAM",
    "Triplet",
    "as_spec",
    "attention_class",
    "create_attention",
    "learned_mixes",
    "list_attention",
    "make_pool",
    "param_groups",
    "penalty",
    "register_attention",
    "spec_text",
]
