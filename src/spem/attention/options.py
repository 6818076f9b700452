"""Options that modules share, and their checks: each raises one sentence that names the module."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypedDict, TypeGuard

import torch

Device = torch.device | str | None
Dtype = torch.dtype | None
Size = int | tuple[int, int]
"""H = W, or (H, W)."""


class Factory(TypedDict):
    """What the constructor of a layer is given about its parameters."""

    device: Device
    dtype: Dtype


class Rule(NamedTuple):
    """What is right for an option."""

    right: Callable[[Any], bool]
    wrong: str

    def __call__(self, label: str, **options: object) -> None:
        """Raises ValueError, which names the module, unless all options are right."""
        for name, value in options.items():
            if not self.right(value):
                raise ValueError(f"{label}: {name}={value!r} is {self.wrong}.")


def is_int(value: object) -> TypeGuard[int]:
    """Whether it is an integer; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return is_int(value) or (isinstance(value, float) and math.isfinite(value))


positive_int = Rule(lambda v: is_int(v) and v >= 1, "not a positive integer. Use 1 or more")
odd_int = Rule(
    lambda v: is_int(v) and v >= 1 and v % 2 == 1, "not an odd positive integer. Use 3, 5 or 7"
)
number = Rule(_is_number, "not a finite number. Use an int or a float")
positive = Rule(lambda v: _is_number(v) and v > 0, "not a positive number")
fraction = Rule(lambda v: _is_number(v) and 0 < v <= 1, "not a number above 0 and up to 1")
unit = Rule(lambda v: _is_number(v) and 0 <= v <= 1, "not a number from 0 to 1")
flag = Rule(lambda v: isinstance(v, bool), "not a bool. Use True or False")


def one_of(label: str, allowed: tuple[str, ...], **options: object) -> None:
    """Raises ValueError unless every option is one of the words."""
    Rule(lambda v: v in allowed, f"unknown. Use one of {', '.join(allowed)}")(label, **options)


def divides(label: str, channels: int, **options: int) -> None:
    """Raises ValueError unless every option is a positive integer that divides the channels."""
    positive_int(label, **options)
    for name, value in options.items():
        if channels % value:
            use = next(k for k in range(min(channels, value), 0, -1) if channels % k == 0)
            raise ValueError(
                f"{label}: {name}={value} does not divide channels={channels}. "
                f"Use a divisor of {channels}, for example {name}={use}."
            )


def hidden_units(label: str, channels: int, reduction: int, least: int = 1) -> int:
    """The width C // r of a bottleneck; raises ValueError if it is below ``least``."""
    positive_int(label, reduction=reduction)
    units = channels // reduction
    if units < least:
        left = "no hidden unit" if units == 0 else f"only {units} hidden unit"
        raise ValueError(
            f"{label}: reduction={reduction} leaves {left} for channels={channels} "
            f"({channels} // {reduction} = {units}). Use reduction <= {channels // least}."
        )
    return units


def map_size(label: str, size: Size | None) -> tuple[int, int]:
    """(H, W) of the option ``size``; raises ValueError if there is none."""
    if size is None:
        raise ValueError(
            f"{label}: needs the size of its maps. Give the option size, for example size=32, or "
            f"size=(32, 16), or create_attention(..., size=32)."
        )
    pair = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    if len(pair) != 2 or not all(map(is_int, pair)) or min(pair) < 1:
        raise ValueError(
            f"{label}: size={size!r} is not a positive integer or pair (H, W) of them."
        )
    return pair
