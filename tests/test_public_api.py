"""The public names and signatures."""

from __future__ import annotations

import ast
import inspect
from importlib import import_module
from pathlib import Path

import pytest
from tolerance import PRINTED
from torch import nn

import spem
from spem.attention.spec import attention_class

NAMES = {
    # every registered class
    "BAM",
    "CBAM",
    "CoordAtt",
    "DIA",
    "EAN",
    "ECA",
    "ELA",
    "ESE",
    "FCA",
    "GC",
    "GCT",
    "GE",
    "GSoP",
    "IEBN",
    "NAM",
    "SE",
    "SGE",
    "SK",
    "SPA",
    "SPEM",
    "SRM",
    "Scale",
    "SimAM",
    "Triplet",
    # their pools, registry and specs
    "AttentionSpec",
    "ChannelAttention",
    "Mix",
    "Needs",
    "SRP",
    "create_attention",
    "learned_mixes",
    "list_attention",
    "param_groups",
    "penalty",
    "register_attention",
    # networks
    "ResNet",
    "attach",
    "attn_layer",
    "detach",
    "find_sites",
    "fold",
    "inspect",
    "load_official",
    "resnet",
    "initialise",
    "keyed_generator",
    # files
    "from_pretrained",
    "push_to_hub",
    "save_pretrained",
    "to_onnx",
}
PARTS = {
    "ops": {
        "Choice",
        "PlaneStats",
        "bn_gate_tail",
        "choose",
        "gate_tail",
        "norm_relu",
        "plane_stats",
        "use_impl",
        "why_composed",
    },
    "training": {
        "train",
        "process_group",
        "evaluate",
        "RunConfig",
        "ModelConfig",
        "DataConfig",
        "OptimConfig",
        "RuntimeConfig",
    },
    "cost": {"count", "Cost"},
    "export": {"to_onnx"},
    "reproduce": {"load_runs"},
    "stats": {"compare"},
}

# name -> (options with their defaults) after the leading positional arguments
SIGNATURES: dict[str, tuple[list[str], dict[str, object]]] = {
    "SPEM": (["channels"], {"form": "text", "reweight": "shared_sum"}),
    "SE": (["channels"], {"reduction": 16, "bias": True, "pool": "avg"}),
    "CBAM": (["channels"], {"reduction": 16, "pools": ("avg", "max"), "kernel": 7}),
    "ECA": (["channels"], {"kernel": None, "gamma": 2, "b": 1, "pool": "avg"}),
    "SRM": (["channels"], {"pool": "avg"}),
    "SGE": (["channels"], {"groups": 64, "pool": "avg"}),
    "Scale": (["channels"], {"start": 0.0320586}),
    "create_attention": (["spec", "channels"], {"device": None, "dtype": None}),
    "attn_layer": (["spec"], {}),
    "attach": (
        ["model", "attention"],
        {
            "where": None,
            "include": None,
            "stages": None,
            "replace": False,
            "start": "identity",
            "fuse": False,
            "dry_run": False,
            "input_shape": None,
        },
    ),
    "detach": (["model"], {}),
    "param_groups": (["model", "lr", "weight_decay"], {"mix_lr": None}),
    "resnet": (["depth", "classes"], {"attention": None, "block": "bottleneck"}),
    "load_official": (["path"], {}),
    "initialise": (["model", "seed"], {"scope": "backbone"}),
    "penalty": (["model"], {}),
    "learned_mixes": (["model"], {}),
}


def test_these_are_the_public_names() -> None:
    assert set(spem.__all__) == NAMES
    assert set(dir(spem)) >= NAMES | {*PARTS, "explain", "data", "insert"}
    for name in (*NAMES, *PARTS):
        assert hasattr(spem, name), name


def test_every_registered_class_is_one_of_them() -> None:
    classes = {attention_class(name) for name in spem.list_attention()}
    ours = {cls for cls in classes if cls.__module__.startswith("spem.attention.")}
    assert {getattr(spem, cls.__name__) for cls in ours} == ours
    assert {cls.__name__ for cls in ours} <= NAMES


def test_what_type_checkers_are_told_is_what_there_is() -> None:
    """The names of the block under TYPE_CHECKING, against where `__getattr__` looks."""
    source = Path(spem.__file__).read_text(encoding="utf-8")
    told: dict[str, str] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("spem"):
            told |= {alias.name: node.module or "" for alias in node.names}
    assert told.pop("*") == "spem.attention"
    names = {name: home for name, home in told.items() if home not in ("spem", "spem.version")}
    assert set(names) | set(spem.attention.__all__) == NAMES
    for name, home in names.items():
        assert getattr(spem, name) is getattr(import_module(home), name)
    for name in told.keys() - names.keys() - {"__version__"}:
        assert getattr(spem, name) is import_module(f"spem.{name}")


def test_star_import() -> None:
    found: dict[str, object] = {}
    exec("from spem import *", found)
    assert found.keys() >= NAMES


@pytest.mark.parametrize("part", PARTS)
def test_parts_are_reachable_after_a_bare_import(part: str) -> None:
    module = getattr(spem, part)
    for name in PARTS[part]:
        assert hasattr(module, name), f"spem.{part}.{name}"
        assert name in module.__all__


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name: str) -> None:
    positional, options = SIGNATURES[name]
    parameters = inspect.signature(getattr(spem, name)).parameters
    found = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert found == positional
    for option, default in options.items():
        assert parameters[option].kind is inspect.Parameter.KEYWORD_ONLY
        expected = pytest.approx(default, abs=PRINTED) if isinstance(default, float) else default
        assert parameters[option].default == expected
    if isinstance(getattr(spem, name), type) and issubclass(getattr(spem, name), nn.Module):
        keywords = {p.name for p in parameters.values() if p.kind is p.KEYWORD_ONLY}
        assert {"device", "dtype"} <= keywords


def test_the_default_pool_of_spem_is_a_learned_mix() -> None:
    assert [name for name, _ in spem.learned_mixes(spem.SPEM(4))] == ["pool"]
    assert spem.Mix().lam is None
    assert spem.Mix(0.3).lam == 0.3
    assert spem.Mix().parametrization == "squares"


@pytest.mark.parametrize("name", sorted(NAMES))
def test_everything_public_says_what_it_is(name: str) -> None:
    assert (getattr(spem, name).__doc__ or "").strip()


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        spem.nothing_of_the_kind  # noqa: B018
