"""Channel attention for convolutional networks: SPEM, its competitors, their comparison."""

from importlib import import_module
from types import ModuleType

from spem import attention, ops
from spem.attention import (
    CBAM,
    ECA,
    ELA,
    ESE,
    FCA,
    GC,
    GCT,
    GE,
    NAM,
    SE,
    SGE,
    SPA,
    SPEM,
    SRM,
    AttentionSpec,
    ChannelAttention,
    CoordAtt,
    GSoP,
    Mix,
    Needs,
    Scale,
    SimAM,
    Triplet,
    create_attention,
    learned_mixes,
    list_attention,
    param_groups,
    penalty,
    register_attention,
)
from spem.insert import attach, attn_layer, detach
from spem.models import ResNet, load_official, resnet
from spem.seeding import initialise, keyed_generator

__version__ = "0.1.0"

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
    "ResNet",
    "Scale",
    "SimAM",
    "Triplet",
    "attach",
    "attention",
    "attn_layer",
    "create_attention",
    "detach",
    "initialise",
    "keyed_generator",
    "learned_mixes",
    "list_attention",
    "load_official",
    "ops",
    "param_groups",
    "penalty",
    "register_attention",
    "resnet",
]

# Reachable after a bare `import spem`, but loaded only when they are used.
_LAZY = frozenset({"cost", "data", "training"})


def __getattr__(name: str) -> ModuleType:
    if name in _LAZY:
        return import_module(f"spem.{name}")
    raise AttributeError(f"module 'spem' has no attribute {name!r}")
