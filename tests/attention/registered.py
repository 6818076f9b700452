"""Every registered module for C channels, drawn at random, for tests over the registry."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch
from attention.drawing import feature_map, randomise
from torch import Tensor

import spem

C = 64
SIZE = 7
"""The map size that modules are given which must know one."""
ALL = spem.list_attention()
EVERY = pytest.mark.parametrize("name", ALL)
REPLACES = {name: spem.attention.attention_class(name).needs.replaces for name in ALL}
"""The layer that a module is used instead of, or None."""
GATES = pytest.mark.parametrize("name", [name for name in ALL if REPLACES[name] is None])
"""Modules that are the map times a gate: the contract's part that no stand-in for a layer has."""
PRECISE = pytest.mark.parametrize("name", [name for name in ALL if REPLACES[name] != "conv"])
"""All but those whose convolutions run in the map's dtype before the gate, as any convolution."""
MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def fresh(
    name: str,
    *,
    device: str | None = None,
    dtype: torch.dtype | None = None,
) -> spem.ChannelAttention:
    return spem.create_attention(name, C, size=SIZE, device=device, dtype=dtype)


def drawn(
    name: str, dtype: torch.dtype = torch.float32, *, training: bool = True
) -> spem.ChannelAttention:
    return randomise(fresh(name), "contract", name).to(dtype).train(training)


def maps(dtype: torch.dtype = torch.float32, *shape: int, key: object = "contract") -> Tensor:
    return feature_map(*(shape or (4, C, 5, 7)), key=key, dtype=dtype)


def needs(name: str) -> spem.Needs:
    return fresh(name).needs


def refused(name: str, *, batch: int, pixels: int, training: bool) -> bool:
    """Whether the module declares that it cannot work on such a map."""
    declared = needs(name)
    if pixels < declared.pixels:
        return True
    return training and (batch < declared.batch or batch * pixels < declared.values)


def sampled(names: Sequence[Any], *axes: Sequence[Any], each: int) -> list[tuple[Any, ...]]:
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
            if not queue:
                queue = order.sample(every, len(every))
            found.append((name, *queue.pop()))
    return found
