"""Channel-attention modules, their pooling slot, registry and text form.

A new module adds one import line here, which makes its class a name of `spem` as well.
"""
# ruff: noqa: F401
# pyright: reportUnusedImport=false

from spem.attention.bam import BAM
from spem.attention.base import (
    PLACES,
    ChannelAttention,
    Needs,
    attention_parameters,
    param_groups,
    register_attention,
)
from spem.attention.cbam import CBAM
from spem.attention.coord import CoordAtt
from spem.attention.dia import DIA
from spem.attention.ean import EAN
from spem.attention.eca import ECA
from spem.attention.ela import ELA
from spem.attention.ese import ESE
from spem.attention.fca import FCA
from spem.attention.gc import GC
from spem.attention.gct import GCT
from spem.attention.ge import GE
from spem.attention.gsop import GSoP
from spem.attention.iebn import IEBN
from spem.attention.nam import NAM
from spem.attention.pooling import SRP, Mix, learned_mixes, make_pool, penalty
from spem.attention.scale import Scale
from spem.attention.se import SE
from spem.attention.sge import SGE
from spem.attention.simam import SimAM
from spem.attention.sk import SK
from spem.attention.spa import SPA
from spem.attention.spec import (
    AttentionSpec,
    as_spec,
    attention_class,
    create_attention,
    list_attention,
    spec_text,
)
from spem.attention.spem import SPEM
from spem.attention.srm import SRM
from spem.attention.triplet import Triplet

__all__ = [
    "BAM", "CBAM", "DIA", "EAN", "ECA", "ELA", "ESE", "FCA", "GC", "GCT", "GE", "IEBN", "NAM", "SE",
    "SGE", "SK", "SPA", "SPEM", "SRM", "SRP", "AttentionSpec", "ChannelAttention", "CoordAtt",
    "GSoP", "Mix", "Needs", "Scale", "SimAM", "Triplet", "create_attention", "learned_mixes",
    "list_attention", "param_groups", "penalty", "register_attention"
]  # fmt: skip
