"""Pools: what makes one number of a plane. `make_pool` builds them from their descriptions."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from spem.attention.options import Device, Dtype, fraction, one_of, positive_int, unit
from spem.ops import PlaneStats
from spem.ops.library import has_hooks
from spem.ops.stats import compute_dtype
from spem.seeding import keyed_generator

Parametrization = Literal["squares", "anchored", "sigmoid"]
Per = Literal["image", "channel", "batch"]


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
        lam: A constant lambda in [0, 1] (1 is max pooling, 0 min pooling); None for a learned one.
        parametrization: How a learned lambda is parametrised; must be left alone for a constant.

    Paper: Mix-Pooling Strategy for Attention Mechanism, arXiv 2208.10322, eqs. (2), (3), (8).
    """

    lam: float | None = None
    parametrization: Parametrization = "squares"

    def __post_init__(self) -> None:
        one_of("Mix", get_args(Parametrization), parametrization=self.parametrization)
        if self.lam is None:
            return
        unit("Mix", lam=self.lam)
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
        other = self.parametrization != "squares"
        return f"mix(parametrization={self.parametrization})" if other else "mix()"


@dataclass(frozen=True)
class SRP:
    """Stochastic region pooling: a description, not a module.

    Formula:
        In training the mean over ``regions`` boxes (their means averaged) whose sides are ``share``
        of the map's, each at a place drawn uniformly; in evaluation the mean over the whole map.

    Args:
        share: Side of a box over the side of the map, in (0, 1]; rounded, at least one position.
        regions: Boxes a descriptor.
        per: What has boxes of its own: every ``"image"``, every ``"channel"`` of every image, or
            the ``"batch"``.

    Paper: Stochastic Region Pooling: Make Attention More Expressive (2019), arXiv 1904.09853.

    Differences: how the paper chooses regions is not known to us; all three options are ours. Not
    for activation checkpointing, under which a block that runs again would draw other boxes.
    """

    share: float = 0.5
    regions: int = 1
    per: Per = "image"

    def __post_init__(self) -> None:
        fraction("SRP", share=self.share)
        positive_int("SRP", regions=self.regions)
        one_of("SRP", get_args(Per), per=self.per)
        object.__setattr__(self, "share", float(self.share))

    def __str__(self) -> str:
        given, plain = vars(self), self.__dataclass_fields__
        changed = [f"{k}={given[k]}" for k in sorted(given) if given[k] != plain[k].default]
        return f"srp({', '.join(changed)})" if changed else "srp"


PoolSpec = Literal["avg", "max", "min", "srp"] | Mix | SRP


class Pool(nn.Module):
    """Takes plane statistics to a descriptor [N, C]; ``statistics`` names those it reads."""

    statistics: tuple[str, ...] = ()
    needs_map: bool = False
    """Whether it must be given the map in training."""
    text: str = ""
    """Its description."""

    def forward(self, stats: PlaneStats) -> Tensor:
        """The descriptor, [N, C]."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Its description."""
        return self.text


class Single(Pool):
    """One statistic as the descriptor: average, maximum or minimum pooling."""

    def __init__(self, name: Literal["avg", "max", "min"]) -> None:
        super().__init__()
        self.name = name
        self.statistics = ("mean" if name == "avg" else name,)

    def forward(self, stats: PlaneStats) -> Tensor:
        """The mean, maximum or minimum, [N, C]."""
        return getattr(stats, self.statistics[0])


def is_average(pool: nn.Module) -> bool:
    """Whether a pool is the average and nothing else, without hooks."""
    return type(pool) is Single and pool.name == "avg" and not has_hooks(pool)


class FixedMix(Pool):
    """Mix-pooling with a constant lambda; no parameter, no penalty.

    The constant is a Python number, not a buffer: it belongs to the configuration, so loading
    weights must not change it and ``half()`` must not round it.
    """

    statistics = ("max", "min")

    def __init__(self, lam: float) -> None:
        super().__init__()
        self.value = float(lam)

    @property
    def lam(self) -> Tensor:
        """The constant, on the CPU (a 0-dim tensor mixes with any device)."""
        return torch.tensor(self.value, dtype=torch.float64)

    def numbers(self) -> tuple[float, tuple[float, ...], None]:
        """lambda, its derivatives by the parameter, and the parameter, of which there is none."""
        return self.value, (), None

    def forward(self, stats: PlaneStats) -> Tensor:
        """The mixed descriptor, [N, C]."""
        assert stats.max is not None
        assert stats.min is not None
        return torch.add(self.value * stats.max, stats.min, alpha=1.0 - self.value)


class LearnedMix(Pool):
    """Mix-pooling with a learned lambda, 0.5 at the start; `Mix` has the formulas.

    Its parameter is called p, or logit; lambda and all else is computed in at least float32.
    """

    statistics = ("max", "min")
    p: nn.Parameter
    logit: nn.Parameter

    def __init__(
        self, parametrization: Parametrization, *, device: Device = None, dtype: Dtype = None
    ) -> None:
        super().__init__()
        self.parametrization = parametrization
        self._name, size = ("logit", ()) if parametrization == "sigmoid" else ("p", (2,))
        parameter = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
        self.register_parameter(self._name, parameter)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the parameter to its start, lambda = 0.5."""
        start = 0.0 if self.parametrization == "sigmoid" else 0.5
        nn.init.constant_(self.get_parameter(self._name), start)

    @property
    def lam(self) -> Tensor:
        """lambda, 0-dim; of p exact for any |p| above the smallest normal float32, 0.5 below."""
        p = self._wide()
        if self.parametrization == "sigmoid":
            return torch.sigmoid(p)
        scale = p.detach().abs().amax(0)  # with its axis, which ONNX asks for
        # The true gradient is of order 1/|p| and overflows where |p| is subnormal; there lambda is
        # 1/2 with gradient 0. Written so that a NaN in p is not taken for zero.
        vanished = scale < torch.finfo(torch.float32).tiny
        q = (p / torch.where(vanished, 1.0, scale)).square()
        total = torch.where(vanished, 1.0, q[0] + q[1])
        return torch.where(vanished, 0.5, q[0] / total)

    def numbers(self) -> tuple[float, tuple[float, ...], Tensor]:
        """lambda, its derivatives by the parameter, and the parameter.

        Read from the CPU, where ``lam`` and its gradient take some thirty operations of torch.
        """
        parameter: Tensor = getattr(self, self._name)  # which `functional_call` may have replaced
        if self.parametrization == "sigmoid":
            lam = 0.5 + 0.5 * math.tanh(0.5 * float(parameter.detach()))
            return lam, (lam * (1.0 - lam),), parameter
        a, b = parameter.tolist()
        scale = max(abs(a), abs(b))
        if scale < torch.finfo(torch.float32).tiny:
            return 0.5, (0.0, 0.0), parameter
        a, b = a / scale, b / scale
        total = a * a + b * b
        slope = 2.0 * a * b / (total * total * scale)
        return a * a / total, (slope * b, -slope * a), parameter

    def forward(self, stats: PlaneStats) -> Tensor:
        """The mixed descriptor, [N, C]."""
        assert stats.max is not None
        assert stats.min is not None
        lam = self.lam.to(stats.max.dtype)
        # Not lerp, which gives another result for infinities.
        return torch.addcmul(lam * stats.max, 1.0 - lam, stats.min)

    @property
    def magnitude(self) -> Tensor:
        """The size of the parameter behind lambda: |p|, or |l|, 0-dim."""
        return torch.linalg.vector_norm(self._wide())

    def penalty(self) -> Tensor:
        """The regulariser without its coefficient, 0-dim."""
        squared = self._wide().square().sum()
        return (squared - 0.5).square() if self.parametrization == "anchored" else squared

    def _wide(self) -> Tensor:
        value: Tensor = getattr(self, self._name)
        return value.to(compute_dtype(value.dtype))


class RegionPool(Pool):
    """The pool that `SRP` describes.

    Its draws are a hash of (its key, the number of batches seen, image, channel, box, axis), in
    integers on the device of the map: nothing depends on a global generator, a resumed training
    draws what the uninterrupted one would have drawn, and a compiled or captured step draws new
    ones. Both numbers are saved with the weights.
    """

    statistics = ("mean",)
    needs_map = True
    draws: Tensor

    def __init__(self, spec: SRP, *, device: Device = None) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("draws", torch.zeros(2, dtype=torch.int64, device=device))

    def reseed(self, seed: int, name: str) -> None:
        """Restarts the sequence of a seed and a place in the network."""
        key = torch.randint(2**31, (), generator=keyed_generator(seed, name), device="cpu")
        with torch.no_grad():
            self.draws.copy_(torch.stack([key, torch.zeros_like(key)]))

    def forward(self, stats: PlaneStats) -> Tensor:
        """The mean over random boxes in training, over the map in evaluation, [N, C]."""
        if not self.training:
            assert stats.mean is not None
            return stats.mean
        if stats.map is None:
            raise TypeError("SRP: needs the map in training; call the module, not gate_from.")
        x = stats.map.to(compute_dtype(stats.map.dtype))
        means = [self._mean(x, box) for box in range(self.spec.regions)]
        with torch.no_grad():
            self.draws[1].add_(1)
        return torch.stack(means).mean(0)

    def _mean(self, x: Tensor, box: int) -> Tensor:
        """The mean over one box of every plane."""
        starts = self._starts(x, box)
        for axis in reversed(range(2, x.dim())):
            side, start = self._side(x.shape[axis]), starts[axis - 2][..., None]
            position = torch.arange(x.shape[axis], device=x.device)
            inside = (position >= start) & (position < start + side)  # [N or 1, C or 1, extent]
            weight = inside.to(x.dtype) / side
            x = (x * weight[(..., *[None] * (axis - 2), slice(None))]).sum(axis)
        return x

    def _starts(self, x: Tensor, box: int) -> list[Tensor]:
        """Where a box starts on each axis, [N or 1, C or 1]."""
        per, device = self.spec.per, x.device
        image = torch.arange(x.shape[0] if per != "batch" else 1, device=device)[:, None]
        channel = torch.arange(x.shape[1] if per == "channel" else 1, device=device)
        key = _hash(_hash(self.draws[0]) ^ self.draws[1])
        cell = _hash(_hash(_hash(key ^ image) ^ channel) ^ box)
        return [
            _hash(cell ^ axis) * (extent - self._side(extent) + 1) >> 32
            for axis, extent in enumerate(x.shape[2:], 1)
        ]

    def _side(self, extent: int) -> int:
        return max(1, math.floor(self.spec.share * extent + 0.5))


def _hash(value: Tensor) -> Tensor:
    """Integers in [0, 2^32) to such integers that look random; no product leaves int64."""
    mask, factor = 0xFFFFFFFF, 0x45D9F3B
    value = (value + 0x9E3779B9) & mask
    value = ((value ^ (value >> 16)) * factor) & mask
    value = ((value ^ (value >> 16)) * factor) & mask
    return value ^ (value >> 16)


def make_pool(pool: PoolSpec, *, device: Device = None, dtype: Dtype = None) -> Pool:
    """Builds the module a pool specification describes.

    Raises:
        ValueError: The specification is none of ``"avg"``, ``"max"``, ``"min"``, ``"srp"``, `Mix`,
            `SRP`.
    """
    if pool == "srp" or isinstance(pool, SRP):
        built = RegionPool(pool if isinstance(pool, SRP) else SRP(), device=device)
    elif not isinstance(pool, Mix):
        if pool not in ("avg", "max", "min"):
            raise ValueError(
                f"pool={pool!r} is unknown. Use 'avg', 'max', 'min', Mix(), Mix(0.3) or 'srp'."
            )
        built = Single(pool)
    elif pool.lam is not None:
        built = FixedMix(pool.lam)
    else:
        built = LearnedMix(pool.parametrization, device=device, dtype=dtype)
    built.text = str(pool)
    return built


def learned_mixes(model: nn.Module) -> list[tuple[str, LearnedMix]]:
    """Every learned mix of a model with its name, shared ones once."""
    return [(name, mix) for name, mix in model.named_modules() if isinstance(mix, LearnedMix)]


def penalty(model: nn.Module) -> Tensor:
    """The sum of the penalties of a model's learned mixes, without the paper's coefficient 0.1.

    Formula:
        sum over blocks of p0^2 + p1^2 (`Mix`: squares; the others name theirs). A sum, so it grows
        with depth; 0.5 a block at the start.

    Returns:
        A 0-dim tensor in at least float32; zero for a model without learned mixes.

    Paper: Mix-Pooling Strategy for Attention Mechanism (2022), arXiv 2208.10322, eq. (8).
    """
    parts = [mix.penalty() for _, mix in learned_mixes(model)]
    if parts:
        return torch.stack(parts).sum()
    first = next(model.parameters(), None)
    return torch.zeros((), device=None if first is None else first.device)
