"""Every module with every option that changes its formula, beside its oracle; and all by name."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from itertools import product
from typing import Any, get_args

import numpy as np
import pytest
import torch
from attention import oracles
from attention.drawing import feature_map, randomise
from torch import Tensor

import spem
from spem.attention.spem import Reweight

Oracle = Callable[..., np.ndarray]
CHANNELS = 8
REWEIGHTS: tuple[str, ...] = get_args(Reweight)
POOLS: dict[str, oracles.Pool] = {
    "avg": "avg",
    "mix()": "squares",
    "max": "max",
    "min": "min",
    "mix(0.3)": 0.3,
    "mix(parametrization=anchored)": "anchored",
    "mix(parametrization=sigmoid)": "sigmoid",
}
"""A pool's text, and the oracle's word for it."""
POOLED: dict[str, tuple[str, Oracle]] = {
    "se": ("reduction=2", oracles.se),
    "eca": ("kernel=None", oracles.eca),
    "srm": ("", oracles.srm),
    "sge": ("groups=4", partial(oracles.sge, groups=4)),
    "ese": ("", oracles.ese),
    "ge": ("", oracles.ge_minus),
    "ean": ("reduction=1", oracles.se),
    "dia": ("reduction=1", oracles.dia_first),
    "iebn": ("", oracles.iebn),
    "bam": ("reduction=2", partial(oracles.bam, fusion="mul", dilation=4)),
    "sk": ("groups=8, least=3, reduction=2", partial(oracles.sk, groups=8)),
}
"""The modules with a pool: other options, and the oracle that takes ``pool``."""
OTHERS: dict[str, Oracle] = {
    "se(bias=False, reduction=4)": partial(oracles.se, pool="avg"),
    "eca(kernel=5)": partial(oracles.eca, pool="avg"),
    "sge(groups=8)": partial(oracles.sge, groups=8, pool="avg"),
    "bam(dilation=1, fusion=add, reduction=2)": partial(
        oracles.bam, fusion="add", dilation=1, pool="avg"
    ),
    "sk(groups=2, least=3, reduction=2)": partial(oracles.sk, groups=2, pool="avg"),
    "scale": oracles.scale,
    "gct": partial(oracles.gct, mode="l2"),
    "gct(mode=l1)": partial(oracles.gct, mode="l1"),
    "simam": partial(oracles.simam, lam=1e-4),
    "simam(lam=0.1)": partial(oracles.simam, lam=0.1),
    "nam": oracles.nam,
    "fca(frequencies=8, reduction=2, size=(7, 8))": partial(
        oracles.fca, size=(7, 8), frequencies=8
    ),
    "fca(frequencies=4, reduction=2, size=(9, 14))": partial(
        oracles.fca, size=(9, 14), frequencies=4
    ),
    "coord": oracles.coord,
    "triplet": oracles.triplet,
    "triplet(kernel=3)": oracles.triplet,
    "spa(reduction=2)": oracles.spa,
    "ge(form=theta, reduction=2)": partial(oracles.ge_theta, form="theta"),
    "ge(form=theta_plus, reduction=2)": partial(oracles.ge_theta, form="theta_plus"),
    "ge(bias=True, form=theta)": partial(oracles.ge_theta, form="theta"),
    **{f"ge(extent={e})": partial(oracles.ge_windows, extent=e) for e in (2, 3)},
    **{
        f"gc(fusion={f}, reduction=2)": partial(oracles.gc, fusion=f)
        for f in ("add", "mul", "both")
    },
    **{
        f"ela(form={form}, norm_groups={groups})": partial(oracles.ela, norm_groups=groups)
        for form, groups in (("B", 4), ("T", 2), ("S", 4), ("L", 1))
    },
    **{f"gsop(dims=4, stride={s})": partial(oracles.gsop, stride=s) for s in (1, 2)},
}
WHOLE: dict[str, Oracle] = {"iebn": oracles.iebn_whole, "sk": oracles.sk_whole}
"""The output of what replaces a layer, by name."""
IDLE = {
    "dia": ("state1.weight",),  # the state before the first block is zero
    "bam": ("fc1.bias", "reduce.bias", "context1.bias", "context2.bias"),
    "gc": ("mask.bias",),
    "coord": ("conv.bias",),
    "gsop": ("reduce.bias",),
    "ge": ("gather.bias",),
}
"""Parameters that do not move the output in training: a norm or a softmax takes them away."""


@dataclass(frozen=True)
class Case:
    """One module: its text for CHANNELS channels, and the oracles of its gate and its output."""

    spec: str
    gate: Oracle
    whole: Oracle | None = None
    shift: Oracle | None = None

    @property
    def name(self) -> str:
        return self.spec.partition("(")[0]

    @property
    def idle(self) -> tuple[str, ...]:
        return IDLE.get(self.name, ())

    def module(self, *size: int) -> spem.ChannelAttention:
        """A new module in float64, for maps of a size where it must know it."""
        return spem.create_attention(self.spec, CHANNELS, size=size, dtype=torch.float64)

    def expected(self, p: oracles.Parameters, x: np.ndarray, *, training: bool) -> np.ndarray:
        """The oracle's gate."""
        return _called(self.gate, p, x, training)

    def output(self, p: oracles.Parameters, x: np.ndarray, *, training: bool) -> np.ndarray:
        """The oracle's x * gate + shift, or what else the module is."""
        if self.whole is not None:
            return _called(self.whole, p, x, training)
        y = x * self.expected(p, x, training=training)
        return y if self.shift is None else y + self.shift(p, x)


def _called(oracle: Oracle, p: oracles.Parameters, x: np.ndarray, training: bool) -> np.ndarray:
    return (
        oracle(p, x, training=training)
        if "training" in signature(oracle).parameters
        else oracle(p, x)
    )


def _pooled() -> list[Case]:
    """The average and the learned mix of every module, and one of the other pools in turn."""
    found: list[Case] = []
    for number, (name, (options, oracle)) in enumerate(POOLED.items()):
        for pool in ("avg", "mix()", list(POOLS)[2 + number % 5]):
            text = f"{name}({', '.join(filter(None, (options, f'pool={pool}')))})"
            whole = WHOLE.get(name)
            if whole is not None:
                whole = partial(whole, **getattr(oracle, "keywords", {}), pool=POOLS[pool])
            found.append(Case(text, partial(oracle, pool=POOLS[pool]), whole))
    return found


def _spem() -> list[Case]:
    kinds = [(form, variant, "mix()") for form in ("text", "figure") for variant in REWEIGHTS]
    kinds += [(form, "shared_sum", pool) for form in ("text", "figure", "code") for pool in POOLS]
    return [
        Case(
            f"spem(form={form}, pool={pool}, reweight={variant})",
            partial(oracles.spem, form=form, variant=variant, pool=POOLS[pool]),
        )
        for form, variant, pool in dict.fromkeys(kinds)
    ]


def _cbam() -> list[Case]:
    pairs = [("avg", "max"), ("min", "mix(0.3)"), ("avg", "mix()"), ("mix()", list(POOLS)[-1])]
    found = [
        Case(
            f"cbam(pools=({first}, {second}), reduction=2)",
            partial(oracles.cbam, pools=(POOLS[first], POOLS[second])),
        )
        for first, second in pairs
    ]
    small = "cbam(kernel=3, reduction=2)"
    return [*found, Case(small, partial(oracles.cbam, pools=("avg", "max")))]


def _other(text: str, oracle: Oracle) -> Case:
    name = text.partition("(")[0]
    if name == "gc":
        return Case(text, oracle, shift=partial(oracles.gc_shift, **oracle.keywords))
    whole = WHOLE.get(name)
    return Case(text, oracle, whole and partial(whole, **oracle.keywords))


CASES = [*_spem(), *_pooled(), *_cbam(), *(_other(*pair) for pair in OTHERS.items())]


def cases_of(name: str, most: int | None = None) -> list[Case]:
    """The cases of a module, or so many of them evenly from the list."""
    own = [case for case in CASES if case.name == name]
    return own if most is None else own[:: -(-len(own) // most)]


# ---- every registered module for 64 channels, drawn at random

C = 64
SIZE = 7
"""The map size that modules are given which must know one."""
ALL = spem.list_attention()
EVERY = pytest.mark.parametrize("name", ALL)
REPLACES = {name: spem.attention.attention_class(name).needs.replaces for name in ALL}
"""The layer that a module is used instead of, or None."""
PRECISE = [name for name in ALL if REPLACES[name] != "conv"]
"""All but those whose convolutions run in the map's dtype before the gate, as any convolution."""
MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def fresh(name: str, **factory: Any) -> spem.ChannelAttention:
    return spem.create_attention(name, C, size=SIZE, **factory)


def drawn(
    name: str, dtype: torch.dtype = torch.float32, *, training: bool = True
) -> spem.ChannelAttention:
    return randomise(fresh(name), "contract", name).to(dtype).train(training)


def maps(dtype: torch.dtype = torch.float32, *shape: int, key: object = "contract") -> Tensor:
    return feature_map(*(shape or (4, C, 5, 7)), key=key, dtype=dtype)


def sampled(names: Sequence[Any], *axes: Sequence[Any], each: int = 1) -> list[tuple[Any, ...]]:
    """For every name some combinations of the axes; always the same ones, spread over all values.

    Every value of an axis is met with about the same number of names, so that a fault of a dtype, a
    layout or a mode is found by many modules, and one of a module by several of these.
    """
    every = list(product(*axes))
    order = random.Random(len(every))
    queue: list[tuple[Any, ...]] = []
    found: list[tuple[Any, ...]] = []
    for name in names:
        for _ in range(each):
            queue = queue or order.sample(every, len(every))
            found.append((name, *queue.pop()))
    return found


def said(value: object) -> str:
    """What a test is called."""
    modes = {True: "train", False: "eval"}
    return modes[value] if isinstance(value, bool) else str(value).removeprefix("torch.")
