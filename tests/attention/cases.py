"""Every module with every option that changes its formula, beside its oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from attention import oracles
from torch import nn

import spem

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
    """One module: how it is made for CHANNELS channels, and the oracle of its gate."""

    label: str
    make: Callable[[], nn.Module]
    gate: Callable[
        ..., np.ndarray
    ]  # (parameters, x), or (parameters, x, training=...) with batch statistics
    any_rank: bool
    batch_statistics: bool = False

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


CASES: list[Case] = [
    *(_spem(form, variant, "squares") for form in ("text", "figure") for variant in REWEIGHTS),
    *(
        _spem(form, "shared_sum", pool)
        for form in ("text", "figure")
        for pool in POOLS
        if pool != "squares"
    ),
    *(_spem("code", "shared_sum", pool) for pool in POOLS),
    *(case for pool in POOLS for case in _pooling(pool)),
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
]
