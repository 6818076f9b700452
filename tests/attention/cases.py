"""Every module with every option that changes its formula, beside its oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from attention import oracles, oracles_wide
from torch import nn

import spem
from spem import attention

CHANNELS = 8

REWEIGHTS = (
    "shared_sum",
    "unshared_sum",
    "sum_of_sigmoids",
    "product_of_sigmoids",
    "sigmoid_of_product",
    "linear_sum",
    "linear_product",
    "double_sigmoid",
    "max_only",
    "min_only",
    "none",
)

# label -> (how to make the constructor's argument, the oracle's word for it)
POOLS: dict[str, tuple[Callable[[], object], oracles.Pool]] = {
    "avg": (lambda: "avg", "avg"),
    "max": (lambda: "max", "max"),
    "min": (lambda: "min", "min"),
    "mix0.3": (lambda: spem.Mix(0.3), 0.3),
    "squares": (spem.Mix, "squares"),
    "anchored": (lambda: spem.Mix(parametrization="anchored"), "anchored"),
    "sigmoid": (lambda: spem.Mix(parametrization="sigmoid"), "sigmoid"),
}


@dataclass(frozen=True)
class Case:
    """One module: how it is made for CHANNELS channels, and the oracle of its gate.

    Attributes:
        sized: It is built for one map size; ``make`` takes it.
        shift: The oracle of what it adds to the map.
        whole: The oracle of the output, for a module that replaces a layer.
        stopped: Parameters whose gradient leaves something out, as the definition says.
        idle: Parameters that the output does not depend on in training: a constant before a norm or
            a softmax, which takes it away again.
    """

    label: str
    make: Callable[..., nn.Module]
    gate: Callable[
        ..., np.ndarray
    ]  # (parameters, x), or (parameters, x, training=...) with batch statistics
    any_rank: bool
    batch_statistics: bool = False
    sized: bool = False
    shift: Callable[..., np.ndarray] | None = None
    whole: Callable[..., np.ndarray] | None = None
    stopped: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()

    def module(self, *size: int) -> nn.Module:
        """A new module, for maps of a size where it must know it."""
        return self.make(size) if self.sized else self.make()

    def output(
        self, parameters: oracles.Parameters, x: np.ndarray, *, training: bool
    ) -> np.ndarray:
        """The oracle's x * gate + shift, or what else the module is."""
        if self.whole is not None:
            return self.whole(parameters, x, training=training)
        y = x * self.expected(parameters, x, training=training)
        return y if self.shift is None else y + self.shift(parameters, x)

    def expected(
        self, parameters: oracles.Parameters, x: np.ndarray, *, training: bool
    ) -> np.ndarray:
        """The oracle's gate."""
        if self.batch_statistics:
            return self.gate(parameters, x, training=training)
        return self.gate(parameters, x)


def _spem(form: str, variant: str, pool: str) -> Case:
    make_pool, word = POOLS[pool]
    return Case(
        f"spem-{form}-{variant}-{pool}",
        lambda: spem.SPEM(CHANNELS, form=form, reweight=variant, pool=make_pool()),
        partial(oracles.spem, form=form, variant=variant, pool=word),
        any_rank=True,
    )


def _pooling(pool: str) -> list[Case]:
    make_pool, word = POOLS[pool]
    return [
        Case(
            f"se-{pool}",
            lambda: spem.SE(CHANNELS, reduction=2, pool=make_pool()),
            partial(oracles.se, pool=word),
            any_rank=True,
        ),
        Case(
            f"eca-{pool}",
            lambda: spem.ECA(CHANNELS, pool=make_pool()),
            partial(oracles.eca, pool=word),
            any_rank=True,
        ),
        Case(
            f"srm-{pool}",
            lambda: spem.SRM(CHANNELS, pool=make_pool()),
            partial(oracles.srm, pool=word),
            any_rank=True,
            batch_statistics=True,
        ),
        Case(
            f"sge-{pool}",
            lambda: spem.SGE(CHANNELS, groups=4, pool=make_pool()),
            partial(oracles.sge, groups=4, pool=word),
            any_rank=False,
        ),
        Case(
            f"ese-{pool}",
            lambda: attention.ESE(CHANNELS, pool=make_pool()),
            partial(oracles_wide.ese, pool=word),
            any_rank=True,
        ),
        Case(
            f"ge-{pool}",
            lambda: attention.GE(CHANNELS, pool=make_pool()),
            partial(oracles_wide.ge_minus, pool=word),
            any_rank=True,
        ),
        Case(
            f"ean-{pool}",
            lambda: attention.EAN(CHANNELS, reduction=1, pool=make_pool()),
            partial(oracles.se, pool=word),
            any_rank=True,
        ),
        Case(
            f"dia-{pool}",
            lambda: attention.DIA(CHANNELS, reduction=1, pool=make_pool()),
            lambda parameters, x: oracles_wide.dia(parameters, x, pool=word)[0],
            any_rank=True,
            idle=("state1.weight",),  # the state before the first block is zero
        ),
        Case(
            f"iebn-{pool}",
            lambda: attention.IEBN(CHANNELS, pool=make_pool()),
            lambda parameters, x, training: oracles_wide.iebn_gate(parameters, x, pool=word),
            any_rank=True,
            batch_statistics=True,
            whole=partial(oracles_wide.iebn, pool=word),
        ),
        *(_bam("mul", 4, pool) + _sk(8, pool) if pool in ("avg", "squares") else []),
    ]


def _bam(fusion: str, dilation: int, pool: str = "avg") -> list[Case]:
    make_pool, word = POOLS[pool]
    return [
        Case(
            f"bam-{fusion}-{dilation}-{pool}",
            lambda: attention.BAM(
                CHANNELS, reduction=2, fusion=fusion, dilation=dilation, pool=make_pool()
            ),
            partial(oracles_wide.bam, fusion=fusion, dilation=dilation, pool=word),
            any_rank=False,
            batch_statistics=True,
            idle=("fc1.bias", "reduce.bias", "context1.bias", "context2.bias"),
        )
    ]


def _sk(groups: int, pool: str = "avg") -> list[Case]:
    make_pool, word = POOLS[pool]
    oracle = partial(oracles_wide.sk, groups=groups, pool=word)
    return [
        Case(
            f"sk-{groups}-{pool}",
            lambda: attention.SK(CHANNELS, groups=groups, reduction=2, least=3, pool=make_pool()),
            lambda parameters, x, training: oracle(parameters, x, training=training)[0],
            any_rank=False,
            batch_statistics=True,
            whole=lambda parameters, x, training: oracle(parameters, x, training=training)[1],
        )
    ]


def _cbam(first: str, second: str, kernel: int = 7) -> Case:
    (make_first, word_first), (make_second, word_second) = POOLS[first], POOLS[second]
    return Case(
        f"cbam-{first}-{second}-{kernel}",
        lambda: spem.CBAM(
            CHANNELS, reduction=2, pools=(make_first(), make_second()), kernel=kernel
        ),
        partial(oracles.cbam, pools=(word_first, word_second)),
        any_rank=False,
        batch_statistics=True,
    )


def _gc(fusion: str) -> Case:
    return Case(
        f"gc-{fusion}",
        lambda: attention.GC(CHANNELS, fusion=fusion, reduction=2),
        partial(oracles_wide.gc_gate, fusion=fusion),
        any_rank=False,
        shift=partial(oracles_wide.gc_shift, fusion=fusion),
        idle=("mask.bias",),
    )


def _ge_theta(form: str) -> Case:
    return Case(
        f"ge-{form}",
        lambda size: attention.GE(CHANNELS, form=form, size=size, reduction=2),
        partial(oracles_wide.ge_theta, form=form),
        any_rank=False,
        batch_statistics=True,
        sized=True,
    )


def _ge_windows(extent: int) -> Case:
    return Case(
        f"ge-extent-{extent}",
        lambda: attention.GE(CHANNELS, extent=extent),
        partial(oracles_wide.ge_windows, extent=extent),
        any_rank=False,
    )


def _fca(size: tuple[int, int], frequencies: int) -> Case:
    return Case(
        f"fca-{size[0]}x{size[1]}-{frequencies}",
        lambda: attention.FCA(CHANNELS, size=size, frequencies=frequencies, reduction=2),
        partial(oracles_wide.fca, size=size, frequencies=frequencies),
        any_rank=False,
    )


def _ela(form: str, norm_groups: int) -> Case:
    return Case(
        f"ela-{form}",
        lambda: attention.ELA(CHANNELS, form=form, norm_groups=norm_groups),
        partial(oracles_wide.ela, norm_groups=norm_groups),
        any_rank=False,
    )


def _gsop(stride: int) -> Case:
    return Case(
        f"gsop-{stride}",
        lambda: attention.GSoP(CHANNELS, dims=4, stride=stride),
        partial(oracles_wide.gsop, stride=stride),
        any_rank=False,
        batch_statistics=True,
        idle=("reduce.bias",),
    )


WIDE: list[Case] = [
    Case("gct", lambda: attention.GCT(CHANNELS), partial(oracles_wide.gct, mode="l2"), True),
    Case(
        "gct-l1",
        lambda: attention.GCT(CHANNELS, mode="l1"),
        partial(oracles_wide.gct, mode="l1"),
        any_rank=False,
    ),
    Case(
        "simam",
        lambda: attention.SimAM(CHANNELS),
        partial(oracles_wide.simam, lam=1e-4),
        any_rank=False,
    ),
    Case(
        "simam-0.1",
        lambda: attention.SimAM(CHANNELS, lam=0.1),
        partial(oracles_wide.simam, lam=0.1),
        any_rank=False,
    ),
    Case(
        "nam",
        lambda: attention.NAM(CHANNELS),
        oracles_wide.nam,
        any_rank=False,
        batch_statistics=True,
        stopped=("norm.weight",),
    ),
    _fca((7, 8), 8),
    _fca((9, 14), 4),
    Case(
        "coord",
        lambda: attention.CoordAtt(CHANNELS),
        oracles_wide.coord,
        any_rank=False,
        batch_statistics=True,
        idle=("conv.bias",),
    ),
    *(_gc(fusion) for fusion in ("add", "mul", "both")),
    *(
        Case(
            f"triplet-{kernel}",
            partial(attention.Triplet, CHANNELS, kernel=kernel),
            oracles_wide.triplet,
            any_rank=False,
            batch_statistics=True,
        )
        for kernel in (7, 3)
    ),
    *(_ela(form, groups) for form, groups in (("B", 4), ("T", 2), ("S", 4), ("L", 1))),
    *(_ge_theta(form) for form in ("theta", "theta_plus")),
    *(_ge_windows(extent) for extent in (2, 3)),
    Case("spa", lambda: attention.SPA(CHANNELS, reduction=2), oracles_wide.spa, any_rank=False),
    *(_gsop(stride) for stride in (1, 2)),
    *_bam("add", 1),
    *_sk(2),
    Case(
        "ge-theta-bias",
        lambda size: attention.GE(CHANNELS, form="theta", size=size, bias=True),
        partial(oracles_wide.ge_theta, form="theta"),
        any_rank=False,
        batch_statistics=True,
        sized=True,
        idle=("gather.bias",),
    ),
]


def _with_pools() -> list[Case]:
    """Every module with a pool: the average, the learned mix, and one of the others in turn."""
    others = [pool for pool in POOLS if pool not in ("avg", "squares")]
    found: dict[str, Case] = {}
    for pool in ("avg", "squares"):
        found |= {case.label: case for case in _pooling(pool)}
    for number, pool in enumerate(others * 2):
        rest = [case for case in _pooling(pool) if not case.label.startswith(("bam", "sk"))]
        if number < len(rest):
            found[rest[number].label] = rest[number]
    return list(found.values())


CASES: list[Case] = [
    *(_spem(form, variant, "squares") for form in ("text", "figure") for variant in REWEIGHTS),
    *(
        _spem(form, "shared_sum", pool)
        for form in ("text", "figure")
        for pool in POOLS
        if pool != "squares"
    ),
    *(_spem("code", "shared_sum", pool) for pool in POOLS),
    *_with_pools(),
    Case(
        "se-no-bias",
        lambda: spem.SE(CHANNELS, reduction=4, bias=False),
        partial(oracles.se, pool="avg"),
        any_rank=True,
    ),
    Case(
        "eca-5",
        lambda: spem.ECA(CHANNELS, kernel=5),
        partial(oracles.eca, pool="avg"),
        any_rank=True,
    ),
    Case(
        "sge-one-channel-groups",
        lambda: spem.SGE(CHANNELS, groups=CHANNELS),
        partial(oracles.sge, groups=CHANNELS, pool="avg"),
        any_rank=False,
    ),
    _cbam("avg", "max"),
    _cbam("avg", "max", 3),
    _cbam("min", "mix0.3"),
    _cbam("avg", "squares"),
    _cbam("anchored", "max"),
    _cbam("squares", "sigmoid"),
    Case("scale", lambda: spem.Scale(CHANNELS), oracles.scale, any_rank=True),
    *WIDE,
]


def spread(each: int) -> list[Case]:
    """Up to so many cases of every module, evenly from its list."""
    of_module: dict[str, list[Case]] = {}
    for case in CASES:
        of_module.setdefault(case.label.split("-")[0], []).append(case)
    return [case for own in of_module.values() for case in own[:: -(-len(own) // each)]]
