"""Every registered module as a graph: of torch.export, and of ONNX run by onnxruntime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from export.graphs import FORBIDDEN, expected, loaded, maps, module, operators, ran
from tolerance import TOLERANCE

import spem
from spem.export import to_onnx

FAST = {
    *("se", "spem", "se(pool=srp)"),  # of plane statistics, learned mixes, a median
    *("eca", "srm", "gsop"),  # along the channels, deviations, covariances
    *("cbam", "coord", "gc"),  # gates of positions, and what adds to the map
    *("fca", "sk", "iebn", "dia"),  # of one size, beside, instead of a norm, with a state
}
"""One of each kind; the others are slow tests."""
ALL = [*spem.list_attention(), "ge(form=theta)", "ge(form=theta_plus)", "ge(extent=2)"]
ALL += ["se(pool=mix())", "se(pool=srp)", "spem(form=code)"]
ALL += ["spem(form=figure, reweight=unshared_sum)"]
SPECS = [pytest.param(s, marks=() if s in FAST else pytest.mark.slow) for s in ALL]
FIXED = {"fca", "ge(form=theta)", "ge(form=theta_plus)"}
"""Modules that are built for maps of one size."""
SHAPE, BATCH, SIZE = (2, 64, 8, 8), (3, 64, 8, 8), (1, 64, 11, 14)


@pytest.mark.parametrize("spec", SPECS)
def test_onnx(spec: str, tmp_path: Path) -> None:
    """Another batch, and another height and width wherever the definition allows it."""
    attention, path = module(spec), tmp_path / "module.onnx"
    dynamic = spec not in FIXED
    exported = to_onnx(attention, path, SHAPE, dynamic_size=dynamic, check=False)
    for shape in [SHAPE, BATCH, (1, *SHAPE[1:]), *([SIZE] if dynamic else [])]:
        x = maps(*shape)
        y = expected(attention, x)
        np.testing.assert_allclose(ran(path, x), y, **TOLERANCE[torch.float32])
        assert not np.allclose(y, x.numpy(), atol=1e-2)  # attention is at work
    found = operators(path)
    assert exported.operators == {name: found.count(name) for name in sorted(set(found))}
    assert not FORBIDDEN & set(found)
    assert not [name for name in found if name.startswith("Scatter")]
    axes = loaded(path).graph.input[0].type.tensor_type.shape.dim
    names = ["batch", "", "height", "width"] if dynamic else ["batch", "", "", ""]
    assert [axis.dim_param for axis in axes] == names


@pytest.mark.parametrize("spec", SPECS)
def test_torch_export(spec: str) -> None:
    """By torch alone, nothing of this package around it."""
    attention = module(spec)
    batch = {0: torch.export.Dim("batch")}
    example = maps(2, 64, 8, 8)
    with torch.no_grad():
        program = torch.export.export(attention, (example,), dynamic_shapes=(batch,))
        x = maps(5, 64, 8, 8)
        found = program.module()(x)
    np.testing.assert_allclose(found.numpy(), expected(attention, x), **TOLERANCE[torch.float32])


@pytest.mark.parametrize("spec", sorted(FIXED))
def test_a_module_of_one_size_refuses_others(spec: str, tmp_path: Path) -> None:
    attention = module(spec)
    host = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 1), attention)
    name = spec.partition("(")[0]
    with pytest.raises(ValueError, match=rf"1 \({name}\) is built for maps of one size"):
        to_onnx(host, tmp_path / "host.onnx", (2, 3, 8, 8), dynamic_size=True)
    with pytest.raises(ValueError, match="Leave dynamic_size=True out"):
        to_onnx(attention, tmp_path / "module.onnx", SHAPE, dynamic_size=True)
    assert not list(tmp_path.iterdir())
