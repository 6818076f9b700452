"""Every gradient of every tail in every implementation equals the reference's in float64."""

from __future__ import annotations

import pytest
import torch
from ops.tails import DATA, GATES, NORMS, SHAPES, error, possible, tail
from tolerance import TAIL
from torch import Tensor

from spem.ops.choice import obstacle

LAYOUTS = (torch.contiguous_format, torch.channels_last)
KINDS = [
    ("formula", torch.float64),
    ("numba", torch.float64),
    ("formula", torch.float32),
    ("numba", torch.float32),
    ("triton", torch.float32),
]
GATE = pytest.mark.parametrize("gate", GATES)


def needs(impl: str, dtype: torch.dtype) -> None:
    reason = obstacle(impl, "cpu", dtype)
    if reason is not None:
        pytest.skip(f"{impl} {reason}")


def cases(impl: str, shape: tuple[int, ...]) -> list[tuple[str, str, torch.memory_format]]:
    """Norms, data and layouts; the interpreter of Triton is slow and gets a sample."""
    every = [(n, d, m) for n in NORMS for d in DATA for m in LAYOUTS]
    if impl != "triton":
        return every
    if shape[2] * shape[3] > 300:
        return every[:1]
    return [("train", "coarse", LAYOUTS[0]), ("train", "random", LAYOUTS[1]), *every[6::5]]


@GATE
@pytest.mark.parametrize(("impl", "dtype"), KINDS, ids=lambda v: str(v).removeprefix("torch."))
def test_all_gradients(gate: str, impl: str, dtype: torch.dtype) -> None:
    needs(impl, dtype)
    for shape in SHAPES:
        for norm, data, layout in cases(impl, shape):
            if not possible(gate, shape, norm):
                continue
            arguments = (gate, shape, norm, data)
            # float32 problems are compared with float64 on the same float32 numbers.
            expected = tail(*arguments, memory_format=layout).results("reference")
            problem = tail(*arguments, dtype=dtype, memory_format=layout)
            composed = problem.results("reference") if dtype != torch.float64 else expected
            found = tail(*arguments, dtype=dtype, memory_format=layout).results(impl)
            compare(found, expected, composed, dtype, f"{shape} {norm} {data} {layout}")


def compare(
    found: dict[str, Tensor],
    expected: dict[str, Tensor],
    composed: dict[str, Tensor],
    dtype: torch.dtype,
    what: str,
) -> None:
    """Some problems are ill-conditioned (two values a channel): there composed modules are as
    wrong in this dtype, and a fused tail may be a few times that."""
    assert found.keys() == expected.keys(), what
    for name, value in expected.items():
        allowed = TAIL[dtype] + 8 * error(composed[name], value)
        wrong = error(found[name], value)
        assert wrong <= allowed, f"{what}: {name} is off by {wrong:.2g}, allowed {allowed:.2g}"
