"""Options that modules share, and their checks: each raises one sentence that names the module."""

import math
from typing import TypeGuard

import torch

Device = torch.device | str | None
Dtype = torch.dtype | None
Size = int | tuple[int, int]
"""H = W, or (H, W)."""


def positive_int(label: str, **options: object) -> None:
    """Raises ValueError unless every option is a positive integer."""
    for name, value in options.items():
        if not is_int(value) or value < 1:
            raise ValueError(f"{label}: {name}={value!r} is not a positive integer. Use 1 or more.")


def odd_int(label: str, use: str = "3, 5 or 7", **options: object) -> None:
    """Raises ValueError unless every option is an odd positive integer, a kernel's side."""
    for name, value in options.items():
        if not is_int(value) or value < 1 or value % 2 == 0:
            raise ValueError(
                f"{label}: {name}={value!r} is not an odd positive integer. Use {use}."
            )


def number(label: str, **options: object) -> None:
    """Raises ValueError unless every option is a finite number."""
    for name, value in options.items():
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not math.isfinite(value)
        ):
            raise ValueError(
                f"{label}: {name}={value!r} is not a finite number. Use an int or a float."
            )


def one_of(label: str, allowed: tuple[str, ...], **options: object) -> None:
    """Raises ValueError unless every option is one of the words."""
    for name, value in options.items():
        if value not in allowed:
            raise ValueError(
                f"{label}: {name}={value!r} is unknown. Use one of {', '.join(allowed)}."
            )


def flag(label: str, **options: object) -> None:
    """Raises ValueError unless every option is True or False."""
    for name, value in options.items():
        if not isinstance(value, bool):
            raise ValueError(f"{label}: {name}={value!r} is not a bool. Use True or False.")


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
            f"{label}: size={size!r} is no positive integer and no pair (H, W) of them."
        )
    return pair


def is_int(value: object) -> TypeGuard[int]:
    """Whether it is an integer; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)
