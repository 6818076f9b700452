"""Pooling strategies on plane statistics: average, maximum, minimum, and their mix by lambda.

A pool is described by ``"avg"``, ``"max"``, ``"min"``, ``"srp"``, a `Mix` or an `SRP`, and built by
`make_pool` into a module that takes `PlaneStats` to a descriptor [N, C] in at least float32.
"""

import ctypes
import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from spem.attention.descriptor import Pool
from spem.attention.precision import at_hand
from spem.attention.srp import SRP, RegionPool
from spem.ops import PlaneStats
from spem.ops.stats import compute_dtype

Parametrization = Literal["squares", "anchored", "sigmoid"]


@dataclass(frozen=True)
class Mix:
    """Mix-pooling with a constant or learned lambda: a description, not a module.

    Formula:
        u = lambda max + (1 - lambda) min.

        ``squares`` (the paper's): lambda = p0^2 / (p0^2 + p1^2), p = (0.5, 0.5) at the start,
        penalty p0^2 + p1^2.

        ``anchored``: the same lambda, penalty (p0^2 + p1^2 - 1/2)^2, so |p| stays near its start.

        ``sigmoid``: lambda = sigmoid(l), one logit l = 0 at the start, penalty l^2.

    Args:
        lam: A constant lambda in [0, 1] (1 is max pooling, 0 min pooling), or None for a learned
            one.
        parametrization: How a learned lambda is parametrised; must be left alone for a constant.

    Raises:
        ValueError: lam lies outside [0, 1], or the parametrization is unknown or given with a
            constant.

    Paper: Mix-Pooling Strategy for Attention Mechanism (2022), arXiv 2208.10322, eqs. (2), (3),
    (8).
    """

    lam: float | None = None
    parametrization: Parametrization = "squares"

    def __post_init__(self) -> None:
        allowed = get_args(Parametrization)
        if self.parametrization not in allowed:
            raise ValueError(
                f"Mix: parametrization={self.parametrization!r} is unknown. "
                f"Use one of {', '.join(allowed)}."
            )
        if self.lam is None:
            return
        if isinstance(self.lam, bool) or not isinstance(self.lam, (int, float)):
            raise ValueError(f"Mix: lam={self.lam!r} is not a number. Use one in [0, 1], or None.")
        if not 0.0 <= self.lam <= 1.0:
            raise ValueError(
                f"Mix: lam={self.lam} lies outside [0, 1]. Use a weight in [0, 1], or None."
            )
        if self.parametrization != "squares":
            raise ValueError(
                f"Mix: parametrization={self.parametrization!r} needs a learned lambda. "
                f"Leave lam={self.lam} out, or the parametrization."
            )
        # mix(1) and mix(1.0) are the same pool and must have the same text.
        object.__setattr__(self, "lam", float(self.lam))

    def __str__(self) -> str:
        if self.lam is not None:
            return f"mix({self.lam!r})"
        return (
            "mix()"
            if self.parametrization == "squares"
            else f"mix(parametrization={self.parametrization})"
        )


PoolSpec = Literal["avg", "max", "min", "srp"] | Mix | SRP


class Single(Pool):
    """One statistic as the descriptor: average, maximum or minimum pooling."""

    _STATISTIC: ClassVar[dict[str, str]] = {"avg": "mean", "max": "max", "min": "min"}

    def __init__(self, name: Literal["avg", "max", "min"]) -> None:
        super().__init__()
        self.name = name
        self.statistics = (self._STATISTIC[name],)

    def forward(self, stats: PlaneStats) -> Tensor:
        """The mean, maximum or minimum, [N, C]."""
        value = getattr(stats, self.statistics[0])
        assert value is not None
        return value

    def extra_repr(self) -> str:
        """The pool's name."""
        return self.name


class MixPool(Pool):
    """u = lambda max + (1 - lambda) min; subclasses say where lambda comes from."""

    statistics = ("max", "min")

    @property
    def lam(self) -> Tensor:
        """The weight of the maximum, a 0-dim tensor in at least float32."""
        raise NotImplementedError

    def constant(self) -> float | None:
        """lambda as a number where it is at hand as one: less work than with a tensor."""
        return None

    def forward(self, stats: PlaneStats) -> Tensor:
        """The mixed descriptor, [N, C]."""
        highest, lowest = _extrema(stats)
        constant = self.constant()
        if constant is not None:
            return torch.add(constant * highest, lowest, alpha=1.0 - constant)
        lam = self.lam.to(highest.dtype)
        # Not lerp, which gives another result for infinities.
        return torch.addcmul(lam * highest, 1.0 - lam, lowest)


def _extrema(stats: PlaneStats) -> tuple[Tensor, Tensor]:
    assert stats.max is not None
    assert stats.min is not None
    return stats.max, stats.min


class FixedMix(MixPool):
    """Mix-pooling with a constant lambda; no parameter, no penalty.

    The constant is a Python number, not a buffer: it belongs to the configuration, so loading
    weights must not change it and ``half()`` must not round it.
    """

    def __init__(self, lam: float) -> None:
        super().__init__()
        self.value = float(lam)

    @property
    def lam(self) -> Tensor:
        """The constant, on the CPU (a 0-dim tensor mixes with any device)."""
        return torch.tensor(self.value, dtype=torch.float64)

    def constant(self) -> float:
        """The constant."""
        return self.value

    def extra_repr(self) -> str:
        """The constant."""
        return f"lam={self.value}"


class LearnedMix(MixPool):
    """Mix-pooling with a learned lambda; `penalty` is its regulariser, without coefficient."""

    @property
    def magnitude(self) -> Tensor:
        """The size of the parameter behind lambda: |p|, or |l|; 0-dim, at least float32."""
        raise NotImplementedError

    def penalty(self) -> Tensor:
        """The regulariser, a 0-dim tensor in at least float32."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Sets the parameter to its start, lambda = 0.5."""
        raise NotImplementedError


class SquaresMix(LearnedMix):
    """lambda = p0^2 / (p0^2 + p1^2); with ``anchored`` the penalty holds |p|^2 at 1/2."""

    def __init__(
        self,
        *,
        anchored: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.anchored = anchored
        self.p = nn.Parameter(torch.empty(2, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """p = (0.5, 0.5)."""
        nn.init.constant_(self.p, 0.5)

    @property
    def lam(self) -> Tensor:
        """lambda, exact for any |p| above the smallest normal float32, 0.5 below."""
        p = self.p.to(compute_dtype(self.p.dtype))
        scale = p.detach().abs().amax(0)  # with its axis, which ONNX asks for
        # The true gradient is of order 1/|p| and overflows where |p| is subnormal; there lambda is
        # 1/2 with gradient 0. Written so that a NaN in p is not taken for zero.
        vanished = scale < torch.finfo(torch.float32).tiny
        q = (p / torch.where(vanished, 1.0, scale)).square()
        total = torch.where(vanished, 1.0, q[0] + q[1])
        return torch.where(vanished, 0.5, q[0] / total)

    def constant(self) -> float | None:
        """`lam` to the bit, without a dozen operators for two numbers: on a CPU, no gradient."""
        values = at_hand(self.p)
        if values is None:
            return None
        narrow = values.dtype == torch.float32
        a, b = values.tolist()
        if math.isnan(a) or math.isnan(b):
            return math.nan
        scale = max(abs(a), abs(b))
        if scale < torch.finfo(torch.float32).tiny:
            return 0.5

        def rounded(x: float) -> float:  # of one operation in double, as float32 has it
            return ctypes.c_float(x).value if narrow else x

        a, b = (rounded(rounded(x / scale) ** 2) for x in (a, b))
        return rounded(a / rounded(a + b))

    @property
    def magnitude(self) -> Tensor:
        """|p| = sqrt(p0^2 + p1^2)."""
        p = self.p.to(compute_dtype(self.p.dtype))
        return torch.linalg.vector_norm(p)

    def penalty(self) -> Tensor:
        """p0^2 + p1^2, or (p0^2 + p1^2 - 1/2)^2 when anchored."""
        total = self.p.to(compute_dtype(self.p.dtype)).square().sum()
        return (total - 0.5).square() if self.anchored else total

    def extra_repr(self) -> str:
        """The parametrisation's name."""
        return "anchored" if self.anchored else "squares"


class SigmoidMix(LearnedMix):
    """lambda = sigmoid(logit), logit = 0 at the start."""

    def __init__(
        self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.empty((), device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """logit = 0."""
        nn.init.zeros_(self.logit)

    @property
    def lam(self) -> Tensor:
        """sigmoid(logit)."""
        return torch.sigmoid(self._wide())

    def constant(self) -> float | None:
        """`lam` without a gradient."""
        values = at_hand(self.logit)
        return None if values is None else float(torch.sigmoid(values))

    @property
    def magnitude(self) -> Tensor:
        """|logit|."""
        return self._wide().abs()

    def penalty(self) -> Tensor:
        """logit^2."""
        return self._wide().square()

    def _wide(self) -> Tensor:
        return self.logit.to(compute_dtype(self.logit.dtype))


def make_pool(
    pool: PoolSpec,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Pool:
    """Builds the module a pool specification describes.

    Raises:
        ValueError: The specification is none of ``"avg"``, ``"max"``, ``"min"``, ``"srp"``, `Mix`,
            `SRP`.
    """
    if isinstance(pool, Mix):
        if pool.lam is not None:
            return FixedMix(pool.lam)
        if pool.parametrization == "sigmoid":
            return SigmoidMix(device=device, dtype=dtype)
        return SquaresMix(anchored=pool.parametrization == "anchored", device=device, dtype=dtype)
    if pool == "srp" or isinstance(pool, SRP):
        return RegionPool(SRP() if pool == "srp" else pool, device=device)
    if pool == "avg" or pool == "max" or pool == "min":
        return Single(pool)
    raise ValueError(
        f"pool={pool!r} is unknown. Use 'avg', 'max', 'min', Mix(), Mix(0.3) or 'srp'."
    )
