"""How large a difference so many paired seeds find, and how many seeds a difference needs."""

import itertools
import math
from typing import Any

import numpy as np

from spem.extras import require
from spem.reproduce.statistics import check_level


def power_of(difference: float, sd: float, n: int, level: float = 0.95) -> float:
    """The probability that a two-sided paired t test of n pairs rejects.

    **Formula** P(|T| > t(n - 1, (1 + level) / 2)), T of the noncentral t distribution with n - 1
    degrees and noncentrality |difference| sqrt(n) / sd.

    Args:
        difference: The true mean difference.
        sd: Deviation of the differences, above 0.
        n: Number of pairs, at least 2.
        level: 1 minus the level of the test.

    Raises:
        ValueError: An argument is outside of its range.
    """
    _check("power_of", sd, n, 0.8, level)
    if sd == 0:
        raise ValueError("power_of: sd=0 leaves nothing to test. Use a deviation above 0.")
    return _power(abs(difference) * math.sqrt(n) / sd, n - 1, level)


def smallest_visible(sd: float, n: int, power: float = 0.8, level: float = 0.95) -> float:
    """The difference that a two-sided paired t test of n pairs finds with this power.

    Args:
        sd: Deviation of the differences, at least 0.
        n: Number of pairs, at least 2.
        power: Probability of finding it, above 1 - level and below 1.
        level: 1 minus the level of the test.

    Raises:
        ValueError: An argument is outside of its range.

    >>> round(smallest_visible(0.35, 3), 2), round(smallest_visible(0.35, 6), 2)
    (1.14, 0.5)
    """
    _check("smallest_visible", sd, n, power, level)
    high = 1.0
    while _power(high, n - 1, level) < power:
        high *= 2
    optimize = require("scipy.optimize", extra="train", purpose="the power of a paired test")
    shift = optimize.brentq(lambda at: _power(at, n - 1, level) - power, 0.0, high)
    return float(shift) * sd / math.sqrt(n)


def seeds_needed(difference: float, sd: float, power: float = 0.8, level: float = 0.95) -> int:
    """The smallest number of pairs with which a difference is found with this power.

    Args:
        difference: The true mean difference, not 0.
        sd: Deviation of the differences, at least 0.
        power: Probability of finding it, above 1 - level and below 1.
        level: 1 minus the level of the test.

    Raises:
        ValueError: An argument is outside of its range.

    >>> seeds_needed(0.3, 0.35), seeds_needed(0.3, 0.5)
    (13, 24)
    """
    _check("seeds_needed", sd, 2, power, level)
    if not math.isfinite(difference) or difference == 0:
        raise ValueError(
            f"seeds_needed: no number of seeds shows a difference of {difference}. Use a finite "
            "number other than 0."
        )

    def enough(n: int) -> bool:
        return _power(abs(difference) * math.sqrt(n) / sd, n - 1, level) >= power

    if sd == 0:
        return 2
    high = 2
    while not enough(high):
        high *= 2
    low = high // 2  # too few, or 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _power(shift: float, degrees: int, level: float) -> float:
    """P(|T| > edge), integrated over the ratio of the measured deviation to the true one.

    scipy's own noncentral t gives NaN far out in its tails, which few degrees of freedom reach.
    """
    stats: Any = require("scipy.stats", extra="train", purpose="the power of a paired test")
    special: Any = require("scipy.special", extra="train", purpose="the power of a paired test")
    edge = float(stats.t.ppf((1 + level) / 2, degrees))
    scale = 1 / math.sqrt(degrees)
    low = float(stats.chi.ppf(1e-13, degrees, scale=scale))
    high = float(stats.chi.isf(1e-13, degrees, scale=scale))
    # The chance to reject falls from 1 to 0 around shift / edge, within a few 1 / edge.
    ends = np.clip([low, (shift - 9) / edge, (shift + 9) / edge, high], low, high)
    knots, weights = np.polynomial.legendre.leggauss(80)
    total = 0.0
    for start, end in itertools.pairwise(ends):
        ratio = start + (end - start) * (knots + 1) / 2
        rejects = special.ndtr(shift - edge * ratio) + special.ndtr(-shift - edge * ratio)
        density = stats.chi.pdf(ratio, degrees, scale=scale)
        total += float(weights @ (rejects * density)) * float(end - start) / 2
    return total


def _check(subject: str, sd: float, n: int, power: float, level: float) -> None:
    check_level(subject, level)
    if not (math.isfinite(sd) and sd >= 0):
        raise ValueError(f"{subject}: sd={sd} is no deviation. Use a finite number from 0 on.")
    if n < 2:
        raise ValueError(f"{subject}: n={n} pairs have no deviation. Use 2 or more.")
    if not 1 - level < power < 1:
        raise ValueError(
            f"{subject}: power={power} is outside of what a test can have. Use a number between "
            f"{1 - level:.3g} and 1."
        )
