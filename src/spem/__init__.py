"""Channel attention for convolutional networks: SPEM, its competitors, their comparison."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

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
from spem.gates import inspect
from spem.insert import attach, attn_layer, detach
from spem.models import ResNet, load_official, resnet
from spem.seeding import initialise, keyed_generator

if TYPE_CHECKING:
    from spem.export import to_onnx
    from spem.hub import from_pretrained, push_to_hub, save_pretrained

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
    "from_pretrained",
    "initialise",
    "inspect",
    "keyed_generator",
    "learned_mixes",
    "list_attention",
    "load_official",
    "ops",
    "param_groups",
    "penalty",
    "push_to_hub",
    "register_attention",
    "resnet",
    "save_pretrained",
    "to_onnx",
]

# Reachable after a bare `import spem`, but loaded only when they are used.
_LAZY = frozenset({"cost", "data", "explain", "export", "hub", "training"})
_LAZY_NAMES = {
    "from_pretrained": "hub",
    "push_to_hub": "hub",
    "save_pretrained": "hub",
    "to_onnx": "export",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return import_module(f"spem.{name}")
    if name in _LAZY_NAMES:
        return getattr(import_module(f"spem.{_LAZY_NAMES[name]}"), name)
    raise AttributeError(f"module 'spem' has no attribute {name!r}")
