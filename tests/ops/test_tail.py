"""Every gradient of every tail in every implementation equals the reference's in float64."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator

import pytest
import torch
from ops.tails import DATA, GATES, NORMS, SHAPES, Tail, error, home, pairwise, possible, tail
from tolerance import TAIL
from torch import Tensor

from spem.ops.dispatch import unsupported

LAYOUTS = (torch.contiguous_format, torch.channels_last)
KINDS = [
    ("formula", torch.float64),
    ("numba", torch.float64),
    ("formula", torch.float32),
    ("numba", torch.float32),
    ("triton", torch.float32),
]
# The gate itself is the same code everywhere: all of them in float64, every fourth in float32.
CASES = [
    (impl, dtype, gate)
    for impl, dtype in KINDS
    for gate in list(GATES)[:: 1 if dtype == torch.float64 else 4]
]


def needs(impl: str, dtype: torch.dtype, device: str = "cpu") -> None:
    reason = unsupported(impl, device, dtype)
    if reason is not None:
        pytest.skip(f"{impl} {reason}")


EVERY = list(itertools.product(NORMS, DATA, LAYOUTS))


def cases(impl: str, gate: str) -> Iterator[tuple[tuple[int, ...], str, str, torch.memory_format]]:
    """A fifth of all shapes, norms, data and layouts, another one for every gate; the interpreter
    of Triton is slow and gets less."""
    for k, shape in enumerate(SHAPES):
        start = (k + list(GATES).index(gate) + len(impl)) % 5
        slow = impl == "triton" and shape[2] * shape[3] > 300
        some = EVERY[:1] if slow else EVERY[start::5]
        yield from ((shape, *case) for case in some if possible(gate, shape, case[0]))


@pytest.mark.parametrize(("impl", "dtype", "gate"), CASES, ids=lambda v: str(v).split(".")[-1])
def test_all_gradients(impl: str, dtype: torch.dtype, gate: str) -> None:
    needs(impl, dtype, home(impl))
    for shape, norm, data, layout in cases(impl, gate):
        arguments = (gate, shape, norm, data)
        # float32 problems are compared with float64 on the same float32 numbers.
        expected = tail(*arguments, memory_format=layout).results("reference")
        problem = tail(*arguments, dtype=dtype, memory_format=layout, device=home(impl))
        twin = copy.deepcopy(problem)
        composed = twin.results("reference") if dtype != torch.float64 else expected
        compare(problem.results(impl), expected, composed, dtype, f"{shape} {norm} {data} {layout}")


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


HALF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pairwise(
    impl=("formula", "numba", "triton"),
    dtype=HALF,
    gate=("none", "spem", "se(reduction=1)", "eca", "srm", "wavy"),
)
def test_half_precision(gate: str, impl: str, dtype: torch.dtype) -> None:
    """In half precision a fused tail is at most twice as wrong as composed modules, plus an ulp."""
    needs(impl, dtype, home(impl))
    for shape in ((4, 5, 3, 3), (4, 3, 8, 8), (2, 3, 14, 14)):
        for norm in NORMS:
            for layout in LAYOUTS:
                if not possible(gate, shape, norm):
                    continue
                problem = tail(
                    gate, shape, norm, dtype=dtype, memory_format=layout, device=home(impl)
                )
                exact = in_float64(problem).results("reference")
                composed = copy.deepcopy(problem).results("reference")
                found = problem.results(impl)
                for name, value in exact.items():
                    # The interpreter of Triton truncates to bfloat16 where a GPU rounds.
                    ulps = 2 if impl == "triton" else 1
                    allowed = 2 * error(composed[name], value) + ulps * HALF[dtype]
                    wrong = error(found[name], value)
                    assert wrong <= allowed, f"{shape} {norm} {layout} {name}: {wrong:.2g}"


def in_float64(problem: Tail) -> Tail:
    """The same numbers in float64."""
    double = copy.deepcopy(problem)
    for module in (double.norm, double.gate):
        if module is not None:
            module.double()
    for name in ("z", "residual"):
        setattr(double, name, getattr(problem, name).detach().double().requires_grad_())
    double.weights = problem.weights.double()
    return double
