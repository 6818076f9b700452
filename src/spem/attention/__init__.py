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
from spem.attention.eca import ECA
from spem.attention.pooling import Mix, make_pool
from spem.attention.scale import Scale
from spem.attention.se import SE
from spem.attention.sge import SGE
from spem.attention.spec import AttentionSpec, as_spec, create_attention, spec_text
from spem.attention.spem import SPEM
from spem.attention.srm import SRM

__all__ = [
    "CBAM",
    "ECA",
    "SE",
    "SGE",
    "SPEM",
    "SRM",
    "AttentionSpec",
    "ChannelAttention",
    "Mix",
    "Needs",
    "Scale",
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
