"""The public names and signatures."""

from __future__ import annotations

import inspect

import pytest
from tolerance import PRINTED
from torch import nn

import spem

NAMES = {
    "SPEM",
    "SE",
    "CBAM",
    "ECA",
    "SRM",
    "SGE",
    "Scale",
    "CoordAtt",
    "ELA",
    "ESE",
    "FCA",
    "GC",
    "GCT",
    "GE",
    "GSoP",
    "NAM",
    "SimAM",
    "SPA",
    "Triplet",
    "Mix",
    "ChannelAttention",
    "Needs",
    "AttentionSpec",
    "create_attention",
    "list_attention",
    "register_attention",
    "penalty",
    "param_groups",
    "learned_mixes",
    "attn_layer",
    "attach",
    "detach",
    "resnet",
    "load_official",
    "initialise",
    "inspect",
    "save_pretrained",
    "from_pretrained",
    "push_to_hub",
    "to_onnx",
}
PARTS = {
    "ops": {
        "Choice",
        "PlaneStats",
        "bn_gate_tail",
        "choose",
        "gate_tail",
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
    "export": {"to_onnx", "quantize_onnx"},
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


def test_all_holds_the_public_names() -> None:
    assert set(spem.__all__) >= NAMES
    for name in spem.__all__:
        assert hasattr(spem, name), name
        assert name == "__version__" or not name.startswith("_")


def test_version() -> None:
    assert spem.__version__.split(".")[0].isdigit()


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
