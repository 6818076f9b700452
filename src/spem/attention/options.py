"""Options that modules share, and their checks: each raises one sentence that names the module."""

import math
from collections.abc import Callable, Mapping
from typing import TypedDict, TypeGuard

import torch

Device = torch.device | str | None
Dtype = torch.dtype | None
Size = int | tuple[int, int]
"""H = W, or (H, W)."""


class Factory(TypedDict):
    """What the constructor of a layer is given about its parameters."""

    device: Device
    dtype: Dtype


def _all(
    label: str, options: Mapping[str, object], right: Callable[[object], bool], wrong: str
) -> None:
    for name, value in options.items():
        if not right(value):
            raise ValueError(f"{label}: {name}={value!r} is {wrong}.")


def is_int(value: object) -> TypeGuard[int]:
    """Whether it is an integer; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def positive_int(label: str, **options: object) -> None:
    """Raises ValueError unless every option is a positive integer."""
    wrong = "not a positive integer. Use 1 or more"
    _all(label, options, lambda v: is_int(v) and v >= 1, wrong)


def odd_int(label: str, use: str = "3, 5 or 7", **options: object) -> None:
    """Raises ValueError unless every option is an odd positive integer, a kernel's side."""
    wrong = f"not an odd positive integer. Use {use}"
    _all(label, options, lambda v: is_int(v) and v >= 1 and v % 2 == 1, wrong)


def number(label: str, **options: object) -> None:
    """Raises ValueError unless every option is a finite number."""

    def right(value: object) -> bool:
        return is_int(value) or (isinstance(value, float) and math.isfinite(value))

    _all(label, options, right, "not a finite number. Use an int or a float")


def positive(label: str, most: float = math.inf, **options: float) -> None:
    """Raises ValueError unless every option is a finite number above 0 and up to ``most``."""
    number(label, **options)
    limit = "a positive number" if most == math.inf else f"a number above 0 and up to {most}"
    _all(label, options, lambda v: isinstance(v, int | float) and 0 < v <= most, f"not {limit}")


def one_of(label: str, allowed: tuple[str, ...], **options: object) -> None:
    """Raises ValueError unless every option is one of the words."""
    wrong = f"unknown. Use one of {', '.join(allowed)}"
    _all(label, options, lambda value: value in allowed, wrong)


def flag(label: str, **options: object) -> None:
    """Raises ValueError unless every option is True or False."""
    _all(label, options, lambda v: isinstance(v, bool), "not a bool. Use True or False")


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
    pair = size if isinstance(size, tuple) else (size, size)
    if len(pair) != 2 or not all(map(is_int, pair)) or min(pair) < 1:
        raise ValueError(
            f"{label}: size={size!r} is not a positive integer or pair (H, W) of them."
        )
    return pair
