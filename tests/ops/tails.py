"""Tails to test: maps, norms and gates with everything random, and the gradients of one tail."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pytest
import torch
from attention.drawing import generator, randomise
from torch import Tensor, nn

import spem
from spem.ops import PlaneStats, bn_gate_tail, gate_tail
from spem.ops.stats import STATISTICS

SPECS = (
    *("spem", "spem(form=code)", "spem(form=figure)", "spem(reweight=unshared_sum)"),
    *("spem(reweight=none)", "spem(pool=mix(0.3))", "spem(pool=mix(parametrization=sigmoid))"),
    *("se(reduction=1)", "se(reduction=1,pool=mix())", "se(reduction=1,pool=max)"),
    *("eca", "eca(pool=min)", "srm", "srm(pool=mix())", "scale"),
    *("gct", "ese", "ese(pool=mix())", "ge"),
)
"""A tail of every module with a gate of plane statistics, of every form and kind of pool."""


def pairwise(**axes: Iterable[object]) -> pytest.MarkDecorator:
    """Parametrises with just enough cases that any two values of two axes meet in one.

    A fault of one value or of two together shows as in the whole product, at a tenth of its price.
    """
    values = [list(axis) for axis in axes.values()]
    left = list(itertools.product(*(range(len(axis)) for axis in values)))
    random.Random(0).shuffle(left)

    def pairs(case: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
        return set(itertools.combinations(enumerate(case), 2))

    missing, chosen = set().union(*map(pairs, left)), []
    while missing:
        best = max(left, key=lambda case: len(pairs(case) & missing))
        missing -= pairs(best)
        chosen.append([axis[k] for axis, k in zip(values, best, strict=True)])
    ids = ["-".join(str(v).removeprefix("torch.") for v in case) for case in chosen]
    return pytest.mark.parametrize(list(axes), chosen, ids=ids)


class WavyGate(nn.Module):
    """A gate of all four statistics that is neither monotone nor bounded to [0, 1]."""

    statistics = STATISTICS

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(4, channels))

    def gate_from(self, stats: PlaneStats) -> Tensor:
        assert stats.mean is not None
        assert stats.var is not None
        assert stats.max is not None
        assert stats.min is not None
        w = self.w.to(stats.mean.dtype)
        spread = torch.log1p(stats.var)
        return torch.sin(w[0] * stats.mean + w[1] * spread) + w[2] * stats.max * stats.min + w[3]


class IdentityStart(nn.Module):
    """1 + alpha (v - 1) around another gate."""

    def __init__(self, inner: spem.ChannelAttention) -> None:
        super().__init__()
        self.inner, self.statistics = inner, inner.statistics
        self.alpha = nn.Parameter(torch.empty(()))

    def gate_from(self, stats: PlaneStats) -> Tensor:
        v = self.inner.gate_from(stats)
        return 1 + self.alpha.to(v.dtype) * (v - 1)


GATES: dict[str, Callable[[int], nn.Module] | None] = {
    "none": None,
    **{spec: (lambda c, spec=spec: spem.create_attention(spec, c)) for spec in SPECS},
    "identity start": lambda c: IdentityStart(spem.create_attention("spem", c)),
    "wavy": WavyGate,
}

SHAPES = (
    *((6, 3, 1, 1), (6, 4, 1, 2), (4, 5, 3, 3), (2, 1, 7, 7), (1, 3, 8, 8), (4, 3, 5, 13)),
    *((4, 17, 4, 4), (1, 2, 16, 16), (1, 2, 31, 33), (1, 1, 56, 56)),
)
NORMS = ("train", "eval", "none")
DATA = ("random", "coarse", "constant")


@dataclass
class Tail:
    """One tail with its inputs, in one dtype and memory layout."""

    z: Tensor
    residual: Tensor
    norm: nn.BatchNorm2d | None
    gate: nn.Module | None
    weights: Tensor
    """The incoming gradient of y."""

    def parameters(self) -> dict[str, Tensor]:
        named: dict[str, Tensor] = {"z": self.z, "residual": self.residual}
        if self.norm is not None:
            named |= {"gamma": self.norm.weight, "beta": self.norm.bias}
        if self.gate is not None:
            named |= dict(self.gate.named_parameters())
        return named

    def forward(self, impl: str | None) -> Tensor:
        gate = None if self.gate is None else self.gate.gate_from
        read = STATISTICS if self.gate is None else self.gate.statistics
        if self.norm is None:
            return gate_tail(self.z, self.residual, gate, statistics=read, impl=impl)
        return bn_gate_tail(self.z, self.residual, self.norm, gate, statistics=read, impl=impl)

    def results(self, impl: str | None) -> dict[str, Tensor]:
        """The output, every gradient and the running statistics."""
        named = self.parameters()
        for tensor in named.values():
            tensor.grad = None
        y = self.forward(impl)
        y.backward(self.weights.expand_as(y))
        found = {"y": y.detach()}
        found |= {f"d {name}": t.grad for name, t in named.items() if t.grad is not None}
        if self.norm is not None:
            found |= {
                "mean": self.norm.running_mean.clone(),
                "var": self.norm.running_var.clone(),
            }
        return found


def tail(
    gate: str,
    shape: tuple[int, ...],
    norm: str = "train",
    data: str = "random",
    dtype: torch.dtype = torch.float64,
    memory_format: torch.memory_format = torch.contiguous_format,
    key: object = 0,
    device: str = "cpu",
) -> Tail:
    """Draw a tail. The values are exact in ``dtype``'s float32 or bfloat16, so that all dtypes get
    the same problem, and gammas of both signs and zero occur where there are channels for them."""
    rng = generator("tail", gate, shape, norm, data, key)
    exact = torch.float32 if dtype == torch.float64 else dtype

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=rng, dtype=torch.float64)

    channels = shape[1]
    z = 1.5 * draw(*shape) + 0.7
    if data == "coarse":
        z = (2 * z).round() / 2
    if data == "constant":
        z = z[:, :, :1, :1].expand(shape).clone()
    bn = None
    if norm != "none":
        bn = randomise(nn.BatchNorm2d(channels), "tail", gate, shape, key).to(device, dtype)
        with torch.no_grad():
            bn.weight[0::3] = bn.weight[0::3].abs() + 0.2
            bn.weight[1::3] = -bn.weight[1::3].abs() - 0.2
            bn.weight[2::3] = 0.0
        bn.train(norm == "train")
    make = GATES[gate]
    module = None if make is None else randomise(make(channels), "gate", gate, shape, key)

    def as_map(x: Tensor) -> Tensor:
        x = x.to(exact).to(device, dtype)
        return x.contiguous(memory_format=memory_format) if x.dim() == 4 else x

    return Tail(
        as_map(z).requires_grad_(),
        as_map(draw(*shape)).requires_grad_(),
        bn,
        None if module is None else module.to(device, dtype).train(norm != "eval"),
        as_map(draw(*shape)),
    )


def possible(gate: str, shape: tuple[int, ...], norm: str) -> bool:
    """Whether definitions allow the tail, and its gradients are more than rounding: SRM norms over
    the batch, of which two images say too little; GCT compares channels, of which one has none."""
    if norm == "train" and shape[0] * shape[2] * shape[3] < 2:
        return False
    if gate == "gct" and shape[1] == 1:
        return False
    if not gate.startswith("srm"):
        return True
    return shape[2] * shape[3] > 1 and (norm == "eval" or shape[0] > 2)


def error(found: Tensor, expected: Tensor) -> float:
    """The largest difference against the largest expected magnitude (or 1e-3, if that is less)."""
    if expected.numel() == 0:
        return 0.0 if found.shape == expected.shape else float("inf")
    scale = max(float(expected.abs().max()), 1e-3)
    difference = found.detach().double().to(expected.device) - expected.detach().double()
    return float(difference.abs().max()) / scale


def home(impl: str) -> str:
    """Where gradients are tested: Triton on a GPU, in its interpreter where there is none."""
    return "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"
